"""Rung `weights`: every Diffusers parameter is used exactly once, and a faulty checkpoint is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.cases import ModuleCase
from porter.verify.manifest import Denoiser
from porter.verify.outcome import CaseResult, RungResult, rung_of
from porter.verify.rungs.module import engine_job, prepare


def weights(bench: Bench, generated: Path | str, denoiser: Denoiser, cases: Iterable[ModuleCase]) -> RungResult:
    """One case per configuration: each variant of a checkpoint has its own parameters."""
    clock = Clock()
    results = [_case(bench, generated, denoiser, case) for case in cases]
    return rung_of("weights", denoiser.source_class, results, clock())


def _case(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> CaseResult:
    import torch

    clock = Clock()
    try:
        reference = torch.load(prepare(bench, case)["reference"], weights_only=True)
        names = {n: list(reference["weights"][n].shape) for n in reference["persistent"]}
        job = engine_job(generated, denoiser, case) | {"job": "weights", "names": names}
        account = bench.engine(job)
    except JobError as error:
        return CaseResult(case.name, "failed", f"raises {error}"[:600], seconds=clock())
    parameters = set(reference["parameters"])
    problems = find_problems(account, parameters)
    figures = {
        "diffusers_names": len(names),
        "packed": len(account["packed"]),
        "elements": account["elements"],
        "unknown_raises": account["unknown_raises"] or "no",
        "dropped_shards": account["drops"],
    }
    return CaseResult(case.name, "failed" if problems else "passed", "; ".join(problems), figures, clock())


def find_problems(account: Mapping[str, Any], parameters: set[str]) -> list[str]:
    """What is wrong in a worker's account of weights. Buffers that need no place (tables) are not counted."""
    lists = {
        "not used by the port": [n for n in account["unplaced"] if n in parameters],
        "used more than once": [n for n in account["twice"] if n in parameters],
        "never loaded": account["missing"],
        "loaded but not reported by load_weights": [n for n in account["unreported"] if n not in account["missing"]],
        "values that no Diffusers tensor has": sorted(account["foreign"]),
        "a dropped shard goes unnoticed": sorted(n for n, how in account["drops"].items() if not how),
    }
    problems = [f"{what}: {_some(names)}" for what, names in lists.items() if names]
    if account["unknown_raises"] is None:
        problems.append("an unknown name in the checkpoint does not raise")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
