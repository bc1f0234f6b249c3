"""Rung `cache`: with Cache-DiT on, a step reuses what the same guidance branch computed, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.compare import difference
from porter.verify.manifest import Port
from porter.verify.outcome import BOUND, CaseResult, RungResult, rung_of, skipped
from porter.verify.pipeline_spec import PipelineSpec, RequestCase
from porter.verify.rungs.modes import guided, not_runnable
from porter.verify.rungs.pipeline import checkpoint_of, judge, port_job, raised, reference, table_of

WARMUP, STEPS = 1, 4
"""Steps that are computed in full, and steps of a request, where their number is free."""
ALWAYS = 1e9
"""A threshold under which everything is alike."""
REFUSES = "Cache-DiT is on"
NO_LIST = "no list of blocks is called one block after the other in a form that Cache-DiT knows"


def cache(bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None) -> RungResult:
    """Requests with and without guidance: with nothing to reuse Cache-DiT changes nothing; when all later steps reuse, the
    blocks compute as often as they should and the result is the one that is worked out without Cache-DiT."""
    import torch

    if (no := not_runnable("cache", port, spec)) is not None:
        return no
    assert spec is not None
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    cases, pairs = _answered(bench, spec, checkpoint)
    calls = [p["call"] for p in pairs]
    records: dict[str, list[dict[str, Any]]] = {}
    for name, job in _jobs().items():
        out = bench.path(f"cache-{name}")
        try:
            bench.engine(port_job(generated, port, checkpoint, calls, out=out, counted=True, **job))
        except JobError as error:
            return rung_of("cache", port.source_class, [CaseResult(name, "failed", raised(error))], clock())
        records[name] = torch.load(out, weights_only=True)
        if not any(record["blocks"]["first"] or record["error"] for record in records["plain"]):
            return skipped("cache", port.source_class, NO_LIST)
    results, refused = [], []
    for index, (case, pair) in enumerate(zip(cases, pairs, strict=True)):
        found = {name: each[index] for name, each in records.items()}
        refusal = (found["reused"]["error"] or {}).get("message", "")
        if refusal.startswith(REFUSES):
            refused.append(f"{case.name}: {refusal}")
            continue
        idle = judge(case, pair["want"], found["idle"])
        results += [replace(idle, name=f"{case.name}, nothing reused"), _reused(case, found)]
    if refused and all(r.status == "passed" for r in results):
        return skipped("cache", port.source_class, "; ".join(refused))
    if all(r.status == "skipped" for r in results[1::2]) and all(r.status == "passed" for r in results[::2]):
        return skipped("cache", port.source_class, results[1].message)
    return rung_of("cache", port.source_class, results, clock())


def _answered(bench: Bench, spec: PipelineSpec, checkpoint: str) -> tuple[list[RequestCase], list[dict[str, Any]]]:
    """Requests with enough steps to reuse some, and what Diffusers says to them; as they are where it refuses that number."""
    cases, pairs = _cases(bench, spec), []
    for index, case in enumerate(cases):
        cases[index] = _longer(case)
        (pair,) = reference(bench, spec, checkpoint, [cases[index]])
        if pair["want"]["error"]:
            cases[index] = replace(case, name=f"{case.name}, whole")
            (pair,) = reference(bench, spec, checkpoint, [cases[index]])
        pairs.append(pair)
    return cases, pairs


def _cases(bench: Bench, spec: PipelineSpec) -> list[RequestCase]:
    """A guided request, and the plain one."""
    found = {c.name: c for c in [*guided(bench, spec), *table_of(bench, spec, ("plain",))]}
    return [replace(c, stop_after=None) for c in found.values()]


def _longer(case: RequestCase) -> RequestCase:
    """The request with more steps; under a name of its own, because answers are kept by name."""
    steps = case.kwargs.get("num_inference_steps")
    more = {"num_inference_steps": STEPS} if isinstance(steps, int) and steps < STEPS else {}
    return replace(case, name=f"{case.name}, longer", kwargs={**case.kwargs, **more})


def _jobs() -> dict[str, dict[str, Any]]:
    def on(threshold: float) -> dict[str, Any]:
        config = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": WARMUP,
                  "residual_diff_threshold": threshold, "max_continuous_cached_steps": -1}  # fmt: skip
        return {"engine": {"cache_backend": "cache_dit", "cache_config": config}}

    return {"plain": {}, "by_hand": {"reuse_by_hand": WARMUP}, "idle": on(0.0), "reused": on(ALWAYS)}


def _reused(case: RequestCase, found: dict[str, dict[str, Any]]) -> CaseResult:
    name = f"{case.name}, reused"
    for what in ("plain", "by_hand", "reused"):
        if (error := found[what]["error"]) is not None:
            message = f"{what}: {error['type']}: {error['message']}"
            return CaseResult(name, "failed", message, where={"traceback": error["trace"]})
    plain, hand, reused = (found[n] for n in ("plain", "by_hand", "reused"))
    figures: dict[str, Any] = {
        "steps": len(plain["steps"]), "calls": plain["calls"], "blocks": plain["blocks"]["others"],
        "blocks_computed": reused["blocks"]["others"],
    }  # fmt: skip
    if len(plain["steps"]) <= WARMUP or not plain["blocks"]["others"]:
        said = (
            f"{len(plain['steps'])} steps of {plain['blocks']['others']} blocks behind the first leave nothing to reuse"
        )
        return CaseResult(name, "skipped", said, figures)
    problems = []
    if reused["blocks"] != hand["blocks"]:
        problems.append(f"blocks computed {reused['blocks']}, {hand['blocks']} expected, {plain['blocks']} without")
    if reused["blocks"] == plain["blocks"]:
        problems.append("nothing was reused")
    if reused["output"] is None or hand["output"] is None:
        problems.append("the port returned no tensor")
    else:
        error = difference(reused["output"], hand["output"])
        figures["rel_l2"] = error["rel_l2"]
        if error["rel_l2"] > BOUND:
            problems.append(f"differs from what is worked out without Cache-DiT: {error['rel_l2']:.2e}")
    return CaseResult(name, "failed" if problems else "passed", "; ".join(problems), figures)
