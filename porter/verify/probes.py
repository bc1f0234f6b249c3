"""Recording what every module of a port received and returned, and where in the generated file it was called."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in nested containers, in order."""
    if torch.is_tensor(value):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_of(v)]
    return []


def _caller(root: str) -> tuple[str, int] | None:
    """File (below `root`) and line of the nearest generated statement up the stack."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(root):
            return frame.f_code.co_filename[len(root) + 1 :], frame.f_lineno
        frame = frame.f_back
    return None


def attach(module: torch.nn.Module, root: Path | str, records: list[dict[str, Any]]) -> list[Any]:
    """Hook every submodule; `records` fills in order of completion. Returns the handles to remove."""
    base = str(Path(root).resolve())

    def hook(name: str, _module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        records.append(
            {
                "name": name,
                "inputs": tensors_of(args) + tensors_of(kwargs),
                "outputs": tensors_of(output),
                "at": _caller(base),
            }
        )

    return [
        child.register_forward_hook(functools.partial(hook, name), with_kwargs=True)
        for name, child in module.named_modules()
        if name
    ]


def _agree(left: list[torch.Tensor], right: list[torch.Tensor], bound: float) -> tuple[bool, float]:
    """Whether the tensors of two records agree, and the worst relative L2 error."""
    from porter.verify.compare import difference

    worst = 0.0
    for a, b in zip(left, right, strict=False):
        if a.numel() != b.numel() or not a.is_floating_point() or not b.is_floating_point():
            continue
        worst = max(worst, difference(a.reshape(-1), b.reshape(-1))["rel_l2"])
    return worst <= bound, worst


def _sizes(tensors: list[torch.Tensor]) -> list[int]:
    """Sizes of the floating tensors: equal when a module has the same inputs on both sides."""
    return sorted(t.numel() for t in tensors if t.is_floating_point())


def first_excess(
    port: list[dict[str, Any]], half: list[dict[str, Any]], full: list[dict[str, Any]], factor: float
) -> dict[str, Any] | None:
    """The first module whose output in the port is more than `factor` times as far from `full` as that in `half`.

    All three are records of the same inputs; modules that not all of them have are left out.
    """
    queues: list[dict[str, list[dict[str, Any]]]] = []
    for records in (port, half):
        queue: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            queue.setdefault(record["name"], []).append(record)
        queues.append(queue)
    for wanted in full:
        pair = [queue[wanted["name"]].pop(0) for queue in queues if queue.get(wanted["name"])]
        if len(pair) < 2 or _sizes(pair[0]["inputs"]) != _sizes(wanted["inputs"]):
            continue
        own, theirs = (_agree(record["outputs"], wanted["outputs"], 0.0)[1] for record in pair)
        if own > factor * max(theirs, SMALLEST_HALF_ERROR):
            where: dict[str, Any] = {"module": wanted["name"], "ratio": own / max(theirs, SMALLEST_HALF_ERROR)}
            if pair[0]["at"]:
                where["file"], where["line"] = pair[0]["at"]
            return where
    return None


SMALLEST_HALF_ERROR = 1e-3
"""Relative L2 error of rounding to bfloat16 once, about; a module that is better than that may lose as much."""


def first_divergence(
    port: list[dict[str, Any]], reference: list[dict[str, Any]], bound: float
) -> dict[str, Any] | None:
    """The first module, in the reference's order, whose output differs. None when all that is on both sides agrees.

    `inputs_agree` says whether the fault lies in this module, or between `last_agreeing` and it.
    """
    remaining: dict[str, list[dict[str, Any]]] = {}
    for record in port:
        remaining.setdefault(record["name"], []).append(record)
    last = None
    for wanted in reference:
        queue = remaining.get(wanted["name"])
        if not queue:
            continue
        got = queue.pop(0)
        same, error = _agree(got["outputs"], wanted["outputs"], bound)
        if not same and _sizes(got["inputs"]) != _sizes(wanted["inputs"]):
            continue  # the port gives this module another job (modulation inside a norm, for one)
        if same:
            last = wanted["name"]
            continue
        inputs_agree, _ = _agree(got["inputs"], wanted["inputs"], bound)
        where: dict[str, Any] = {
            "module": wanted["name"], "rel_l2": error, "inputs_agree": inputs_agree, "last_agreeing": last
        }  # fmt: skip
        if got["at"]:
            where["file"], where["line"] = got["at"]
        return where
    return None
