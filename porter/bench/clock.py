"""Timing, memory and the state of the card. Events on an accelerator, the wall clock elsewhere."""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

GIB = 2**30
ROUND_SECONDS = 1.5
LEAST, MOST = 6, 30
LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Round:
    """One round of timed calls, in milliseconds. `clock` is the mean [SM MHz, W, C] while they ran, where it can be read."""

    median: float
    p10: float
    p90: float
    least: float
    calls: int
    samples: list[float]
    peak_gib: float
    clock: list[int] | None

    def to_json(self) -> dict[str, Any]:
        return {k: _short(v) for k, v in asdict(self).items()}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_round(
    call: Callable[[], object], device: torch.device, warm: int = 4, together: Callable[[float], float] | None = None
) -> Round:
    """Warm up, estimate, then time calls for about 1.5 seconds. `together` makes ranks agree on the estimate."""
    reset_peak(device)
    for _ in range(warm):
        call()
    estimate = statistics.median(spans(call, 2 if device.type == "cuda" else 1, device))
    if together is not None:
        estimate = together(estimate)
    most = MOST if device.type == "cuda" else 3
    count = max(min(LEAST, most), min(most, int(1000 * ROUND_SECONDS / max(estimate, 1e-3))))
    with watched(device) as states:
        times = spans(call, count, device)
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Round(
        statistics.median(times), ordered[tenth], ordered[-1 - tenth], ordered[0], len(times), times,
        peak_gib(device), [round(statistics.fmean(column)) for column in zip(*states, strict=True)] or None,
    )  # fmt: skip


def spans(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of `count` calls, one after another without a pause."""
    if device.type != "cuda":
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - start))
        return found
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    synchronize(device)
    for start_event, end_event in pairs:
        start_event.record()
        call()
        end_event.record()
    synchronize(device)
    return [start_event.elapsed_time(end_event) for start_event, end_event in pairs]


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Most memory that tensors of this process took since `reset_peak`; 0 where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def allocated_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[list[int]]]:
    """States of the card while the body runs, one every 20 ms: a side that draws more power runs at a
    lower clock, which a reading after the last call no longer shows."""
    states: list[list[int]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            states.extend([state] if (state := card_state(device)) else [])

    first = card_state(device)
    if first is None:  # nothing can be read here: no thread that would try it all the time
        yield states
        return
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield states
    finally:
        done.set()
        watcher.join()
        states.extend([] if states else [first])


def card_state(device: torch.device) -> list[int] | None:
    """SM clock in MHz, power in W, temperature in C; None where pynvml or the card is missing."""
    if device.type != "cuda":
        return None
    with contextlib.suppress(Exception):
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        handle = _card(device)
        return [
            pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        ]
    return None


@functools.cache
def _card(device: torch.device) -> Any:
    """NVML's handle of a torch device: they number cards differently."""
    import pynvml

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def ceilings(device: torch.device) -> dict[str, float]:
    """What the card can do, measured: bfloat16 matrix products (TFLOP/s) and copies (GB/s, read plus written)."""
    cuda = device.type == "cuda"
    n, elements = (8192, 2**30) if cuda else (512, 2**22)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(elements // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    for _ in range(3):
        a @ b
        target.copy_(source)
    count = 30 if cuda else 3
    product = statistics.median(spans(lambda: a @ b, count, device))
    copy = statistics.median(spans(lambda: target.copy_(source), count, device))
    bytes_moved = 2 * source.numel() * source.element_size()
    return {"matmul_tflops": 2 * n**3 / product / 1e9, "copy_gbs": bytes_moved / copy / 1e6}


LINK_MB = (1, 25, 75, 150)
"""Sizes of one rank's tensor for `links`: a text stream, an image stream, and two video sequences."""


def links(device: torch.device) -> list[dict[str, float]]:
    """What the connection of the ranks can do, measured: [{mb, all_reduce_ms, all_to_all_ms}] for tensors of `mb` megabytes
    on each rank, through the default process group. Every rank must call it."""
    import torch.distributed as dist

    found = []
    count = 20 if device.type == "cuda" else 2
    for mb in LINK_MB:
        source = torch.zeros(mb * 10**6 // 2, device=device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        calls: dict[str, Callable[[], object]] = {"all_reduce_ms": partial(dist.all_reduce, source)}
        if device.type == "cuda":  # gloo has no all-to-all
            calls["all_to_all_ms"] = partial(dist.all_to_all_single, target, source)
        row: dict[str, float] = {"mb": mb}
        for name, call in calls.items():
            for _ in range(3):
                call()
            row[name] = round(statistics.median(spans(call, count, device)), 4)
        found.append(row)
    return found
