"""Rung `pipeline`: whole requests give what Diffusers gives: latents after every step, decoded output, exceptions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.compare import difference, rounded
from porter.verify.engine_requests import Reach, reach_of
from porter.verify.manifest import Port
from porter.verify.outcome import BOUND, PRE_PROCESS, CaseResult, RungResult, VerifyError, rung_of, skipped
from porter.verify.pipeline_spec import PipelineSpec, RequestCase, request_table

MUST_WORK = frozenset({"plain", "negative-prompt", "everything-given", "odd-size", "latent-output", "guided"})
"""Requests that compare something only if Diffusers answers them."""


def checkpoint_of(bench: Bench, spec: PipelineSpec) -> str:
    """A tiny checkpoint of the pipeline, built once per run in an engine process."""
    from porter.verify.checkpoint import check_checkpoint

    made: dict[str, str] = bench.__dict__.setdefault("checkpoints", {})
    if spec.pipeline not in made:
        folder = bench.folder / f"checkpoint-{spec.pipeline}"
        bench.engine({"job": "checkpoint", "class": spec.pipeline, "spec": dict(spec.data), "folder": str(folder)})
        check_checkpoint(folder)
        made[spec.pipeline] = str(folder)
    return made[spec.pipeline]


def table_of(bench: Bench, spec: PipelineSpec, names: Iterable[str] | None = None) -> list[RequestCase]:
    """The request table of a pipeline; `names` are prefixes of the cases wanted."""
    parameters = bench.baseline.call({"job": "signature", "class": spec.pipeline, "stand_ins": spec.get("stand_ins")})[
        "parameters"
    ]
    cases = list(request_table(spec, parameters))
    if names is not None:
        cases = [c for c in cases if c.name.startswith(tuple(names))]
    return cases


def call_of(bench: Bench, spec: PipelineSpec, checkpoint: str, case: RequestCase, variant: int = 0) -> dict[str, Any]:
    """A case as both workers read it: tensors and pictures in files. Each `variant` has others of the same shapes."""
    import torch

    call: dict[str, Any] = {"kwargs": dict(case.kwargs), "seed": case.seed, "stop_after": case.stop_after}
    call |= {"per_prompt": case.per_prompt, "apart": case.apart}
    draw = torch.Generator().manual_seed(9 + variant)
    tensors: dict[str, Any] = {n: _drawn(shape, draw) for n, shape in sorted(case.tensors.items())}
    for row in case.encode:
        out = bench.path("encoded")
        bench.baseline.call(
            {"job": "encode", "class": spec.pipeline, "checkpoint": checkpoint, "kwargs": row["encode"], "out": out}
        )
        values = torch.load(out, weights_only=True)
        tensors |= {n: v for n, v in zip(row["names"], values, strict=False) if n and v is not None}
    if tensors:
        call["tensors"] = bench.path("tensors")
        torch.save(tensors, call["tensors"])
    call["images"] = {n: pictures_of(bench, n, entry, variant) for n, entry in case.images.items()}
    return call


def _drawn(shape: list[Any], generator: Any) -> Any:
    """A random tensor of a shape, or tensors of a list of shapes."""
    import torch

    if shape and isinstance(shape[0], list):
        return [_drawn(each, generator) for each in shape]
    return torch.randn(shape, generator=generator)


def pictures_of(bench: Bench, name: str, entry: Any, variant: int = 0) -> str | list[str]:
    """File of a random picture, or files of several: `[height, width]`, `{size, mode, mask}`, `{size, frames}`, a list."""
    if isinstance(entry, dict) and "frames" in entry:
        entry = [{k: v for k, v in entry.items() if k != "frames"}] * entry["frames"]
    if isinstance(entry, list) and not all(isinstance(n, int) for n in entry):
        return [_picture(bench, f"{name}-{index}", one, 8 + index + 100 * variant) for index, one in enumerate(entry)]
    return _picture(bench, name, entry, 7 + 100 * variant)


def _picture(bench: Bench, name: str, entry: Any, seed: int) -> str:
    import torch
    from PIL import Image

    options = entry if isinstance(entry, dict) else {"size": entry}
    height, width = options["size"]
    mode = "L" if options.get("mask") else options.get("mode", "RGB")
    path = bench.folder / f"picture-{name}-{height}-{width}-{mode}-{seed}.png"
    if not path.exists():
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        if options.get("mask"):
            pixels = torch.zeros(shape, dtype=torch.uint8)
            pixels[height // 4 : -height // 3, width // 5 : -width // 4] = 255
        Image.fromarray(pixels.numpy()).save(path)
    return str(path)


def reference(bench: Bench, spec: PipelineSpec, checkpoint: str, cases: list[RequestCase]) -> list[dict[str, Any]]:
    """Each case's call with Diffusers' record of it under `want`. Kept for other rungs of the same run."""
    import torch

    cache: dict[Any, Any] = bench.__dict__.setdefault("pipeline_references", {})
    fresh = [c for c in cases if (checkpoint, c.name) not in cache]
    if fresh:
        calls = [call_of(bench, spec, checkpoint, c) for c in fresh]
        out = bench.path("reference")
        bench.baseline.call(
            {"job": "pipeline", "class": spec.pipeline, "checkpoint": checkpoint, "calls": calls, "out": out}
        )
        for case, call, want in zip(fresh, calls, torch.load(out, weights_only=True), strict=True):
            cache[checkpoint, case.name] = {"call": call, "want": want}
    return [cache[checkpoint, c.name] for c in cases]


def port_job(generated: Path | str, port: Port, checkpoint: str, calls: list[Any], **options: Any) -> dict[str, Any]:
    return {
        "job": "pipeline", "generated": str(Path(generated).resolve()), "arch": port.arch, "checkpoint": checkpoint,
        "calls": calls, **options,
    }  # fmt: skip


def pipeline(
    bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None, cases: Iterable[str] | None = None
) -> RungResult:
    """Run the request table on both sides. `cases` limits it to names that start so."""
    import torch

    if port.module is None:
        return skipped("pipeline", port.source_class, "the pipeline is not converted yet")
    if spec is None:
        return skipped("pipeline", port.source_class, f"no tests/corpus/pipelines/{port.source_class}.yaml")
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    table = table_of(bench, spec, cases)
    pairs = reference(bench, spec, checkpoint, table)
    out = bench.path("port")
    again = _in_worker(port, table, pairs)
    calls = [p["call"] for p in pairs] + [pairs[n]["call"] | {"unprepared": True} for n in again]
    try:
        bench.engine(port_job(generated, port, checkpoint, calls, out=out))
    except JobError as error:
        message = f"the engine cannot load the port: {error}"[:600]
        case = CaseResult("load", "failed", message, seconds=clock(), where={"traceback": error.trace[-2500:]})
        return rung_of("pipeline", port.source_class, [case], clock())
    records = torch.load(out, weights_only=True)
    results = [
        timed(judge(case, pair["want"], got), pair["want"], got)
        for case, pair, got in zip(table, pairs, records, strict=False)
    ]  # fmt: skip
    for n, got in zip(again, records[len(pairs) :], strict=True):
        results.append(
            timed(judge(replace(table[n], name=f"{table[n].name}-in-worker"), pairs[n]["want"], got), {}, got)
        )
    if port.pre_process is not None:
        results.append(_pre_process(table, pairs, records))
    return rung_of("pipeline", port.source_class, results, clock())


def _in_worker(port: Port, table: list[RequestCase], pairs: list[dict[str, Any]]) -> list[int]:
    """The request that is run once more with its media as they came, for a port with a pre-process function."""
    fit = [n for n, c in enumerate(table) if _brings_media(c) and not pairs[n]["want"]["error"]]
    return fit[:1] if port.pre_process is not None else []


def _brings_media(case: RequestCase) -> bool:
    return any(reach_of(name, frozenset()) is Reach.MEDIA for name in (*case.images, *case.tensors))


def _pre_process(table: list[RequestCase], pairs: list[dict[str, Any]], records: list[dict[str, Any]]) -> CaseResult:
    """Whether the function that runs in the engine process did prepare what the port then took.

    Where a pipeline takes several kinds of media, one of them alone may have to stay in the worker.
    """
    asked = [n for n, c in enumerate(table) if _brings_media(c) and not pairs[n]["want"]["error"]]
    names = sorted({name for n in asked for name in records[n]["prepared"]})
    figures = {"prepared": names, "requests": len(asked)}
    if not asked:
        return CaseResult(PRE_PROCESS, "skipped", "no request of the table brings media", figures)
    idle = [c.name for n in asked if (c := table[n]).name in MUST_WORK and not records[n]["prepared"]]
    if idle or not names:
        return CaseResult(
            PRE_PROCESS, "failed", f"nothing was prepared for {', '.join(idle) or 'any request'}", figures
        )
    return CaseResult(PRE_PROCESS, "passed", "", figures)


def judge(case: RequestCase, want: Mapping[str, Any], got: Mapping[str, Any]) -> CaseResult:
    """Compare the records of one call: exceptions, schedule, latents after each step, decoded output."""
    if want["error"] and case.name in MUST_WORK:
        reason = f"{want['error']['type']}: {want['error']['message']}"
        return CaseResult(case.name, "failed", f"Diffusers itself refuses this request, nothing is compared: {reason}")
    if want["error"] or got["error"]:
        return _judge_errors(case, want["error"], got["error"])
    figures: dict[str, Any] = {"steps": len(want["steps"]), "calls": got["calls"], "diffusers_calls": want["calls"]}
    steps = grouped(got["steps"], len(want["steps"]))
    if len(steps) != len(want["steps"]):
        return CaseResult(case.name, "failed", f"{len(steps)} scheduler steps, {len(want['steps'])} expected", figures)
    problems: list[str] = []
    worst = 0.0
    if case.images:
        figures["media"] = sorted(case.images)
    if case.prompts == 1 and want["first_call"] and got["first_call"]:
        figures["inputs_rel_l2"] = _inputs_error(want["first_call"], got["first_call"])
    if want["timesteps"] is not None and got["timesteps"] is not None:
        schedule = difference(got["timesteps"].float(), want["timesteps"].float())["rel_l2"]
        if schedule > BOUND:
            problems.append(f"the schedule differs ({schedule:.1e})")
    for index, (a, b) in enumerate(zip(steps, want["steps"], strict=True)):
        error = difference(a, by_branch(b, case.prompts, a) if case.apart else b)
        worst = max(worst, error["rel_l2"])
        if error["rel_l2"] > BOUND:
            problems.append(_text(f"latents after step {index + 1}", error))
            break
    figures["latents_rel_l2"] = worst
    if case.stop_after is None:
        target = want["decoded"] if want["decoded"] is not None else want["output"]
        if got["output"] is None:
            problems.append("the port returned no tensor")
        elif target is not None:
            error = difference(got["output"], target)
            if case.prompts > 1 and error["rel_l2"] > BOUND and rounded(got["output"], target):
                figures["rounded_rel_l2"] = error["rel_l2"]
            else:
                figures["output_rel_l2"] = error["rel_l2"]
                worst = max(worst, error["rel_l2"])
                if error["rel_l2"] > BOUND:
                    problems.append(_text("output", error))
        for index, (a, b) in enumerate(zip(got.get("others", []), want.get("others", []), strict=False)):
            error = difference(a, b)
            worst = max(worst, error["rel_l2"])
            if error["rel_l2"] > BOUND:
                problems.append(_text(f"output {index + 2}", error))
        if len(got.get("others", [])) != len(want.get("others", [])) and case.prompts == 1:
            problems.append(
                f"{len(got.get('others', []))} tensors beside the first, {len(want.get('others', []))} expected"
            )
    elif case.stop_after == 0:
        problems += _first_call(want["first_call"] or {}, got["first_call"] or {})
    figures["rel_l2"] = worst
    return CaseResult(case.name, "failed" if problems else "passed", "; ".join(problems), figures)


def timed(case: CaseResult, want: Mapping[str, Any], got: Mapping[str, Any]) -> CaseResult:
    """The case with the seconds of both sides."""
    return replace(case, seconds=want.get("seconds", 0.0) + got.get("seconds", 0.0))


def grouped(steps: list[Any], count: int) -> list[Any]:
    """Steps of requests that ran one after the other, joined per step."""
    import torch

    if count and len(steps) > count and len(steps) % count == 0:
        return [torch.cat(steps[i::count]) for i in range(count)]
    return steps


def by_branch(want: Any, prompts: int, got: Any) -> Any:
    """A step of calls for one prompt each, [prompts * branches, ...], with the rows in the order of a joint call.

    A loop that steps both guidance branches has them request by request if the requests ran alone, and branch by branch
    if they shared the loop: whichever order is nearer to `got`. What is decoded has one row per prompt, so no choice.
    """
    rows = len(want)
    if prompts < 2 or rows <= prompts or rows % prompts or got.shape != want.shape:
        return want
    turned = want.unflatten(0, (prompts, -1)).transpose(0, 1).flatten(0, 1)
    return min((want, turned), key=lambda each: difference(got, each)["rel_l2"])


def _judge_errors(case: RequestCase, want: Mapping[str, Any] | None, got: Mapping[str, Any] | None) -> CaseResult:
    expected = want["type"] if want else "no exception"
    found = got["type"] if got else "no exception"
    figures = {"diffusers": expected, "port": found}
    if want and got and want["type"] == got["type"]:
        return CaseResult(case.name, "passed", f"both raise {expected}", figures)
    message = f"Diffusers: {expected}"
    message += f" ({want['message'][:120]})" if want else ""
    message += f"; port: {found}" + (f" ({got['message'][:200]})" if got else "")
    where = {"traceback": got["trace"]} if got else None
    return CaseResult(case.name, "failed", message, figures, where=where)


def _first_call(want: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """What differs in the arguments of the first denoiser call, by name."""
    errors = {name: _argument_error(want[name], got[name]) for name in sorted(set(want) & set(got))}
    problems = [_text(f"{n} of the first denoiser call", e) for n, e in errors.items() if e["rel_l2"] > BOUND]
    if not set(want) & set(got):
        problems.append("the first denoiser calls have no tensor in common")
    return problems


def _inputs_error(want: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """Largest error among the arguments that both first denoiser calls have."""
    return max((_argument_error(want[n], got[n])["rel_l2"] for n in set(want) & set(got)), default=0.0)


def _argument_error(want: Any, got: Any) -> dict[str, Any]:
    """Error of one argument; Diffusers may have several guidance branches in one batch."""
    a, b = got.float(), want.float()
    parts = [b]
    if a.dim() and b.dim() and a.shape[0] < b.shape[0] and b.shape[0] % a.shape[0] == 0:
        parts = list(b.split(a.shape[0]))
    return min((difference(a, part) for part in parts), key=lambda error: error["rel_l2"])


def _text(what: str, error: Mapping[str, Any]) -> str:
    if "expected_shape" in error:
        return f"{what}: shape {error['shape']}, expected {error['expected_shape']}"
    if "not_finite" in error:
        return f"{what}: {error['not_finite']} values are not finite"
    return f"{what}: relative L2 error {error['rel_l2']:.2e} (bound {BOUND:.0e})"


def raised(error: Exception) -> str:
    """One line for a worker's failure."""
    return re.sub(r"\s+", " ", str(error))[:600]


__all__ = [
    "VerifyError", "call_of", "checkpoint_of", "grouped", "judge", "pictures_of", "pipeline", "port_job", "raised", "reference",
    "table_of", "timed",
]  # fmt: skip
