"""One request to a pipeline, measured: where its time went, the memory it took, what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from porter.bench import clock, compiled
from porter.bench.whole.marks import Marks, watched
from porter.bench.whole.phases import split

GLOBAL_SEED = 20


class Pipeline(Protocol):
    """A pipeline of one side. `facts` say how it was built and what a run chose."""

    facts: dict[str, Any]
    denoisers: tuple[str, ...]

    def components(self) -> Mapping[str, Any]: ...

    def serve(self, call: Mapping[str, Any]) -> None:
        """Answer the request of a call; what comes out is seen by the watch."""

    def settle(self, case: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`run()`, with what a side may still choose chosen."""

    def compile(self, options: Mapping[str, Any]) -> None: ...


def request(pipeline: Pipeline, job: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Serve the job's call; with `out`, its latents and decoded pictures go there. `first_seconds` holds compilation."""
    kept: dict[str, Any] = {}
    start = time.perf_counter()
    figures = pipeline.settle(job["case"], lambda: _once(pipeline, job["call"], kept, device))
    seconds = time.perf_counter() - start
    answer = {"figures": figures, "first_seconds": seconds, "compiled": compiled.statistics(), "facts": pipeline.facts}
    if job.get("out"):
        outputs = {"latents": kept["latents"], "decoded": torch.cat(list(kept["decoded"])) if kept["decoded"] else None}
        outputs = {k: v.detach().cpu() for k, v in outputs.items() if v is not None}
        torch.save(outputs, job["out"])
        answer["finite"] = bool(outputs) and all(bool(torch.isfinite(v).all()) for v in outputs.values())
        answer["shapes"] = {k: list(v.shape) for k, v in outputs.items()}
    return answer


def _once(pipeline: Pipeline, call: Mapping[str, Any], kept: dict[str, Any], device: torch.device) -> dict[str, Any]:
    torch.manual_seed(GLOBAL_SEED)  # some pipelines also draw without a generator
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the cache stays: a request of a warm server
    marks = Marks(device)
    with watched(pipeline.components(), pipeline.denoisers, marks.add, kept):
        clock.synchronize(device)
        marks.add("start")
        pipeline.serve(call)
        marks.add("end")
    found = split(marks.times()).to_json()
    return found | {"peak_gib": round(clock.peak_gib(device), 3), "clock": clock.card_state(device)}
