"""Rungs `tp` and `sp`: two ranks give what Diffusers gives on one, and something really was sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.cases import ModuleCase
from porter.verify.compare import worst_difference
from porter.verify.manifest import Denoiser
from porter.verify.outcome import BOUND, CaseResult, RungResult, VerifyError, rung_of
from porter.verify.rungs.module import engine_job, prepare

NAMED = 6
"""How many of the replicated parameters a result names."""

PARALLEL: dict[str, dict[str, Any]] = {
    "tp": {"tensor_parallel_size": 2},
    "sp": {"ulysses_degree": 2, "mask_sp_padding": True},
}


def tp(bench: Bench, generated: Path | str, denoiser: Denoiser, cases: Iterable[ModuleCase]) -> RungResult:
    """Tensor parallel size 2 on two processes; parameters per rank must be fewer than on one rank.

    Memory is saved where the model repeats itself, so the share that counts is that of the blocks (`block_elements`).
    """
    clock = Clock()
    chosen = [c for c in cases if c.tp]
    return rung_of("tp", denoiser.source_class, [_case(bench, generated, denoiser, c, "tp") for c in chosen], clock())


def sp(bench: Bench, generated: Path | str, denoiser: Denoiser, cases: Iterable[ModuleCase]) -> RungResult:
    """Ulysses degree 2 on two processes; the blocks must see shorter sequences than on one rank."""
    clock = Clock()
    chosen = [c for c in cases if c.sp]
    return rung_of("sp", denoiser.source_class, [_case(bench, generated, denoiser, c, "sp") for c in chosen], clock())


def block_shares(whole: Mapping[str, int], ranks: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Elements of the repeated blocks on one rank and on each of several, and the largest parameters that every rank
    holds whole. `whole` and `ranks` give elements by parameter, as `engine_jobs.block_elements` counts them."""
    if not whole:
        return {}
    replicated = {n: size for n, size in whole.items() if all(r.get(n) == size for r in ranks)}
    largest = sorted(replicated, key=lambda n: (-replicated[n], n))[:NAMED]
    return {
        "block_elements": sum(whole.values()),
        "block_elements_per_rank": [sum(r.values()) for r in ranks],
        "replicated_in_blocks": {n: replicated[n] for n in largest},
    }


def _case(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase, mode: str) -> CaseResult:
    import torch

    clock = Clock()
    out = bench.path(f"{case.name}-{mode}")
    try:
        files = prepare(bench, case)
        job = engine_job(generated, denoiser, case) | files
        one = bench.engine(job | {"out": out, "sp": mode == "sp"})
        if one.get("no_plan"):
            return CaseResult(case.name, "skipped", "the class declares no _sp_plan", seconds=clock())
        two = bench.engine_pair(job | {"out": out, "parallel": PARALLEL[mode], "sp": mode == "sp"})
    except (JobError, VerifyError) as error:
        return CaseResult(case.name, "failed", f"raises {error}"[:600], seconds=clock())
    for rank, answer in enumerate(two):
        if answer["missing"]:
            return CaseResult(
                case.name, "failed", f"rank {rank} did not load {', '.join(answer['missing'][:4])}", seconds=clock()
            )
    want = torch.load(files["reference"], weights_only=True)["output"]
    errors = [worst_difference(torch.load(f"{out}.rank{r}", weights_only=True)["output"], want) for r in range(2)]
    figures: dict[str, Any] = max(errors, key=lambda e: e["rel_l2"])
    figures |= {"elements": one["elements"], "elements_per_rank": [a["elements"] for a in two]}
    if mode == "sp":
        figures |= _sequence(one["sequence_lengths"], [a["sequence_lengths"] for a in two])
        # Half of every stream, and one token of padding for each of at most two.
        sharded = all(
            0 < n <= figures["sequence"] // 2 + 2 and n < figures["sequence"] for n in figures["sequence_per_rank"]
        )
    else:
        figures |= block_shares(one["block_elements"], [a["block_elements"] for a in two])
        sharded = all(a["elements"] < one["elements"] for a in two)
    problems = [] if sharded else ["nothing was sharded: both ranks hold everything"]
    if left := max((a.get("open", 0) for a in two), default=0):
        problems.append(f"{left} regions of divided tokens are still open after the forward")
    if not figures["rel_l2"] <= BOUND:
        problems.append(f"relative L2 error {figures['rel_l2']:.2e} (bound {BOUND:.0e})")
    return CaseResult(case.name, "failed" if problems else "passed", "; ".join(problems), figures, clock())


def _sequence(one: list[int], two: list[list[int]]) -> dict[str, Any]:
    """Tokens of the longest call of a block on one rank, and of the same calls on each of two."""
    longest = max(one, default=0)
    calls = [i for i, n in enumerate(one) if n == longest]
    per_rank = [max((r[i] for i in calls), default=0) if len(r) == len(one) else 0 for r in two]
    return {"sequence": longest, "sequence_per_rank": per_rank}
