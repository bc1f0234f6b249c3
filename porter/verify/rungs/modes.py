"""Rungs `cfg` and `step`: other ways of running a request give the same result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.manifest import Port
from porter.verify.outcome import CaseResult, RungResult, VerifyError, rung_of, skipped
from porter.verify.pipeline_spec import SEED, PipelineSpec, RequestCase
from porter.verify.rungs.alone import same_as_alone, unequal_pictures
from porter.verify.rungs.pipeline import (
    MUST_WORK,
    call_of,
    checkpoint_of,
    judge,
    port_job,
    raised,
    reference,
    table_of,
    timed,
)  # fmt: skip


def not_runnable(rung: str, port: Port, spec: PipelineSpec | None) -> RungResult | None:
    if port.module is None:
        return skipped(rung, port.source_class, "the pipeline is not converted yet")
    if spec is None:
        return skipped(rung, port.source_class, f"no tests/corpus/pipelines/{port.source_class}.yaml")
    return None


def guided(bench: Bench, spec: PipelineSpec) -> list[RequestCase]:
    """Requests with both guidance branches: what the pipeline's file names, else with a negative prompt."""
    table = {c.name: c for c in table_of(bench, spec)}
    base = table.get("negative-prompt", table["plain"])
    if spec.get("cfg"):
        return [replace(base, name="guided", kwargs={**base.kwargs, **spec.get("cfg")})]
    return [base]


def cfg(bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None) -> RungResult:
    """Guidance branches on two ranks: same result on both, and each rank calls the denoiser half as often."""
    import torch

    if (no := not_runnable("cfg", port, spec)) is not None:
        return no
    assert spec is not None
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    cases = guided(bench, spec)
    pairs = reference(bench, spec, checkpoint, cases)
    calls = [p["call"] for p in pairs]
    out = bench.path("cfg")
    try:
        bench.engine(port_job(generated, port, checkpoint, calls, out=f"{out}.one"))
        bench.engine_pair(port_job(generated, port, checkpoint, calls, out=out, parallel={"cfg_parallel_size": 2}))
    except (JobError, VerifyError) as error:
        return rung_of("cfg", port.source_class, [CaseResult("guided", "failed", raised(error))], clock())
    one = torch.load(f"{out}.one", weights_only=True)
    two = [torch.load(f"{out}.rank{r}", weights_only=True) for r in range(2)]
    results = []
    for index, (case, pair) in enumerate(zip(cases, pairs, strict=True)):
        ranks = [records[index] for records in two]
        judged = [judge(case, pair["want"], got) for got in ranks]
        worst = max(judged, key=lambda c: (c.status == "failed", c.figures.get("rel_l2", 0.0)))
        counts = [r["calls"] for r in ranks]
        figures = dict(worst.figures) | {"calls": one[index]["calls"], "calls_per_rank": counts}
        problems = [worst.message] if worst.status == "failed" else []
        if not all(0 < n < one[index]["calls"] for n in counts):
            problems.append(f"nothing was divided: {counts} denoiser calls per rank, {one[index]['calls']} on one rank")
        results.append(CaseResult(case.name, "failed" if problems else "passed", "; ".join(problems), figures))
    return rung_of("cfg", port.source_class, results, clock())


def step(bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None) -> RungResult:
    """Step execution through the engine's own runner and step scheduler, alone and two requests at a time.

    Two requests with other numbers of steps take turns, and each gets what it gets alone.
    """
    import torch

    if (no := not_runnable("step", port, spec)) is not None:
        return no
    assert spec is not None
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    cases = [*guided(bench, spec), *table_of(bench, spec, ("plain", "two-prompts", "odd-size"))]
    cases, pairs = _answered(cases, reference(bench, spec, checkpoint, cases))
    out = bench.path("step")
    job = port_job(generated, port, checkpoint, [p["call"] for p in pairs], out=out, mode="step", step=True)
    try:
        bench.engine(job | {"max_num_seqs": 2})
    except JobError as error:
        if "does not support that contract" in error.message:
            return skipped("step", port.source_class, "the port does not offer step execution")
        return rung_of("step", port.source_class, [CaseResult("load", "failed", raised(error))], clock())
    records = torch.load(out, weights_only=True)
    results = [timed(judge(c, p["want"], _unordered(r)), {}, r) for c, p, r in zip(cases, pairs, records, strict=True)]
    base = replace(guided(bench, spec)[0], stop_after=None)
    pairs_by_name = {"by-turns": _by_turns(base, spec), "other-pictures": unequal_pictures(base)}
    for name, both in pairs_by_name.items():
        if both is not None and all(r.status != "failed" for r in results):
            calls = [call_of(bench, spec, checkpoint, case, variant) for variant, case in enumerate(both)]
            bench.engine(job | {"max_num_seqs": 2, "calls": [{"requests": calls}, *calls]})
            together, *alone = torch.load(out, weights_only=True)
            results.append(same_as_alone(name, together, alone, how="beside another"))
    return rung_of("step", port.source_class, results, clock())


def _by_turns(base: RequestCase, spec: PipelineSpec) -> tuple[RequestCase, RequestCase] | None:
    """Two requests with other numbers of steps: as a further request of the corpus has it that differs in nothing else, or
    one more; None for a pipeline whose steps are fixed."""
    steps = base.kwargs.get("num_inference_steps")
    if not isinstance(steps, int):
        return None
    calls = [row.get("call", {}) for row in spec.get("extra") or () if "images" not in row]
    calls = [c for c in calls if c.get("num_inference_steps", steps) != steps and all(k.endswith("steps") for k in c)]
    other = calls[0] if calls else {"num_inference_steps": steps + 1}
    return base, replace(base, kwargs={**base.kwargs, **other}, seed=SEED + 1)


def _answered(cases: list[RequestCase], pairs: list[dict[str, Any]]) -> tuple[list[RequestCase], list[dict[str, Any]]]:
    """Requests that have steps: those that Diffusers refuses are compared by rung `pipeline`, and the engine's runner turns
    any exception into its own."""
    kept = [(c, p) for c, p in zip(cases, pairs, strict=True) if not p["want"]["error"] or c.name in MUST_WORK]
    return [c for c, _ in kept], [p for _, p in kept]


def _unordered(record: dict[str, Any]) -> dict[str, Any]:
    """Steps of several requests alternate in step mode; bring each request's own together."""
    count = record.get("requests") or 1
    steps = record["steps"]
    if count > 1 and len(steps) % count == 0:
        steps = [s for r in range(count) for s in steps[r::count]]
    return record | {"steps": steps}
