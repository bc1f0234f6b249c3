"""Rung `cache`: with Cache-DiT on, a step reuses what the same guidance branch computed, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.compare import difference
from porter.verify.manifest import Port
from porter.verify.outcome import BOUND, CaseResult, RungResult, VerifyError, rung_of, skipped
from porter.verify.pipeline_spec import PipelineSpec, RequestCase
from porter.verify.rungs.alone import same_as_alone
from porter.verify.rungs.batch import unlike
from porter.verify.rungs.modes import guided, not_runnable
from porter.verify.rungs.pipeline import call_of, checkpoint_of, judge, port_job, raised, reference, table_of

WARMUP, STEPS = 1, 4
"""Steps that are computed in full, and steps of a request, where their number is free."""
ALWAYS = 1e9
"""A threshold under which everything is alike."""
REFUSES = "Cache-DiT is on"
REUSED = "reused"
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
    other = call_of(bench, spec, checkpoint, unlike(cases[0], spec), 1)
    behind = [other, {"requests": [calls[0], other]}]
    jobs, records = _jobs(), {}
    for name, job in jobs.items():
        out = bench.path(f"cache-{name}")
        served = [*calls, *behind] if name == REUSED else calls
        try:
            facts = bench.engine(
                port_job(generated, port, checkpoint, served, out=out, counted=True, max_num_seqs=2, **job)
            )
        except JobError as error:
            return rung_of("cache", port.source_class, [CaseResult(name, "failed", raised(error))], clock())
        records[name] = torch.load(out, weights_only=True)
        if not any(record["blocks"]["first"] or record["error"] for record in records["plain"]):
            return skipped("cache", port.source_class, NO_LIST)
    results, refused = [], []
    for index, (case, pair) in enumerate(zip(cases, pairs, strict=True)):
        found = {name: each[index] for name, each in records.items()}
        if (refusal := refusal_of(found[REUSED])) is not None:
            refused.append(f"{case.name}: {refusal}")
            continue
        idle = judge(case, pair["want"], found["idle"])
        results += [replace(idle, name=f"{case.name}, nothing reused"), _reused(case, found)]
    if refused and all(r.status == "passed" for r in results):
        return skipped("cache", port.source_class, "; ".join(refused))
    if all(r.status == "skipped" for r in results[1::2]) and all(r.status == "passed" for r in results[::2]):
        return skipped("cache", port.source_class, results[1].message)
    if facts["supports_request_batch"]:
        first, *_, second, both = records[REUSED]
        results.append(_two_requests(both, [first, second]))
    if port.features.get("cfg_parallel", {}).get("status") not in (None, "unsupported"):
        job = port_job(generated, port, checkpoint, calls[:1], out=out, counted=True, **jobs[REUSED])
        results.append(_on_two_ranks(bench, job, records["by_hand"][0]))
    return rung_of("cache", port.source_class, results, clock())


def refusal_of(record: dict[str, Any]) -> str | None:
    """What a port says that refuses to run with Cache-DiT."""
    message = (record["error"] or {}).get("message", "")
    return message if message.startswith(REFUSES) else None


def _two_requests(both: dict[str, Any], alone: list[dict[str, Any]]) -> CaseResult:
    """Two requests of one batch beside each alone; those that share no loop may reuse nothing of each other."""
    shared = both["calls"] < sum(record["calls"] for record in alone)
    name = f"two requests {'in one loop' if shared else 'one after the other'}, reused"
    if (refusal := refusal_of(both)) is not None:
        return CaseResult(name, "skipped", refusal)
    return same_as_alone(name, both, alone)


def _on_two_ranks(bench: Bench, job: dict[str, Any], hand: dict[str, Any]) -> CaseResult:
    """The first request, its branches of guidance on ranks of their own: what is worked out by hand for one rank."""
    import torch

    name = "branches on two ranks, reused"
    try:
        bench.engine_pair(job | {"parallel": {"cfg_parallel_size": 2}})
    except (JobError, VerifyError) as error:
        return CaseResult(name, "failed", raised(error))
    ranks = [torch.load(f"{job['out']}.rank{r}", weights_only=True)[0] for r in range(2)]
    problems = [f"rank {n}: {r['error']['type']}: {r['error']['message']}" for n, r in enumerate(ranks) if r["error"]]
    figures: dict[str, Any] = {"blocks_computed": hand["blocks"]["others"], "rel_l2": 0.0}
    figures["blocks_per_rank"] = [r["blocks"]["others"] for r in ranks]
    if any(r["output"] is None for r in (hand, *ranks)):
        problems = problems or ["the port returned no tensor"]
    if not problems:
        figures["rel_l2"] = max(difference(r["output"], hand["output"])["rel_l2"] for r in ranks)
        if figures["rel_l2"] > BOUND:
            problems.append(f"differs from what is worked out without Cache-DiT: {figures['rel_l2']:.2e}")
        if sum(figures["blocks_per_rank"]) != figures["blocks_computed"]:
            problems.append(
                f"blocks computed {figures['blocks_per_rank']}, {figures['blocks_computed']} in all expected"
            )
    return CaseResult(name, "failed" if problems else "passed", "; ".join(problems), figures)


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

    return {"plain": {}, "by_hand": {"reuse_by_hand": WARMUP}, "idle": on(0.0), REUSED: on(ALWAYS)}


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
