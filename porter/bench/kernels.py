"""Which kernels ran, and which attention they are. Names come from the profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

TOP = 12

ATTENTION = (
    ("FlashAttention 3", re.compile(r"flash.*(sm90|hopper|CollectiveMainloopFwdSm90)|FlashAttnFwdSm90|fa3", re.I)),
    ("cuDNN", re.compile(r"cudnn.*sdpa", re.I)),
    ("memory-efficient", re.compile(r"fmha_cutlass|efficient_attention|fmha.*cutlass", re.I)),
    ("FlashAttention 2", re.compile(r"flash_fwd|pytorch_flash", re.I)),
)
"""Names of attention kernels, most telling first."""


def attention_of(names: list[str]) -> list[str]:
    """Kinds of attention among kernel names, each once. Names that a compiler made up tell nothing."""
    found: list[str] = []
    for name in names:
        if name.startswith("triton_"):
            continue
        kind = next((kind for kind, pattern in ATTENTION if pattern.search(name)), None)
        if kind and kind not in found:
            found.append(kind)
    return found


def profiled(call: Callable[[], object], device: torch.device, calls: int = 3) -> dict[str, Any]:
    """Kernels of a call by time: {kernels: [[name, count, microseconds]], total_us, launches, attention}.

    Figures are of one call, the mean of several; `total_us` is how long kernels ran, without gaps between launches.

    On the CPU the operators take their place, and attention is the name of the operator.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as seen:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    events = seen.key_averages()
    spent = [
        (e.key, e.count / calls, (e.self_device_time_total if cuda else e.self_cpu_time_total) / calls) for e in events
    ]
    spent.sort(key=lambda row: -row[2])
    names = [row[0] for row in spent]
    attention = attention_of(names)
    if not attention:
        attention = sorted({n for n in names if "scaled_dot_product" in n and n.startswith("aten::_")})
    return {
        "kernels": [[name[:120], round(count, 1), round(us, 1)] for name, count, us in spent[:TOP]],
        "total_us": round(sum(row[2] for row in spent), 1),
        "launches": round(sum(row[1] for row in spent), 1),
        "attention": attention,
    }
