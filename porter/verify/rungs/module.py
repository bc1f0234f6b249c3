"""Rung `module`: a denoiser of random weights in float32 gives what Diffusers' denoiser gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.cases import ModuleCase, build_inputs
from porter.verify.compare import worst_difference
from porter.verify.manifest import Denoiser
from porter.verify.outcome import BOUND, CaseResult, RungResult, rung_of


def prepare(bench: Bench, case: ModuleCase, *, probe: bool = False) -> dict[str, str]:
    """Build inputs and run the Diffusers side. Returns the files that hold inputs and reference.

    Results are kept per case, so that other rungs of the same run share them.
    """
    import torch

    cache: dict[Any, dict[str, str]] = bench.__dict__.setdefault("module_references", {})
    key = (case.denoiser, case.name, probe)
    if key not in cache:
        inputs, reference = bench.path(f"{case.name}-inputs"), bench.path(f"{case.name}-reference")
        torch.save(build_inputs(case.inputs, case.seed), inputs)
        bench.baseline.call(
            {
                "job": "module", "class": case.denoiser, "config": dict(case.config), "seed": case.seed,
                "inputs": inputs, "out": reference, "probe": probe,
            }
        )  # fmt: skip
        cache[key] = {"inputs": inputs, "reference": reference}
    return cache[key]


def engine_job(generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> dict[str, Any]:
    """What every denoiser job of an engine worker needs."""
    return {
        "job": "module", "arch": denoiser.source_class, "generated": str(Path(generated).resolve()),
        "folder": denoiser.folder, "module": denoiser.module, "class": denoiser.cls, "config": dict(case.config),
    }  # fmt: skip


def module(bench: Bench, generated: Path | str, denoiser: Denoiser, cases: Iterable[ModuleCase]) -> RungResult:
    """Compare every case with Diffusers. On a miss, both sides run again with probes to find the first divergence."""
    clock = Clock()
    results = [module_case(bench, generated, denoiser, case) for case in cases]
    return rung_of("module", denoiser.source_class, results, clock())


def module_case(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> CaseResult:
    import torch

    clock = Clock()
    try:
        files = prepare(bench, case)
    except JobError as error:
        return CaseResult(case.name, "failed", f"Diffusers itself raises {error}: mend the case", seconds=clock())
    out = bench.path(f"{case.name}-port")
    try:
        answer = bench.engine(engine_job(generated, denoiser, case) | files | {"out": out})
    except JobError as error:
        where = raised_at(error.trace, Path(generated) / denoiser.folder)
        return CaseResult(case.name, "failed", f"the port raises {error}"[:600], seconds=clock(), where=where)
    if answer["missing"]:
        return CaseResult(
            case.name, "failed", f"not loaded: {', '.join(answer['missing'][:6])}",
            {"missing": len(answer["missing"])}, clock(),
        )  # fmt: skip
    got = torch.load(out, weights_only=True)["output"]
    want = torch.load(files["reference"], weights_only=True)["output"]
    figures = worst_difference(got, want) | {"elements": answer["elements"]}
    if figures["rel_l2"] <= BOUND:
        return CaseResult(case.name, "passed", "", figures, clock())
    where = diagnose(bench, generated, denoiser, case)
    return CaseResult(case.name, "failed", _miss(figures, where), figures, clock(), where)


def _miss(figures: Mapping[str, Any], where: Mapping[str, Any] | None) -> str:
    text = f"relative L2 error {figures['rel_l2']:.2e} (bound {BOUND:.0e})"
    if "expected_shape" in figures:
        text = f"shape {figures['shape']}, expected {figures['expected_shape']}"
    if where:
        text += f"; first diverging module: {where['module']} ({where['rel_l2']:.1e}"
        text += ", its inputs agree)" if where["inputs_agree"] else f", after {where['last_agreeing']})"
        if "line" in where:
            text += f", called at {where['file']}:{where['line']}"
        if where.get("source"):
            text += f", from {where['source']}"
        if where.get("rules"):
            text += f", rules {', '.join(where['rules'])}"
    return text


def diagnose(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> dict[str, Any] | None:
    """The first module whose output differs, with its place in the generated file, the source and the rules."""
    import torch

    from porter.verify.probes import first_divergence

    try:
        files = prepare(bench, case, probe=True)
        out = bench.path(f"{case.name}-probe")
        bench.engine(engine_job(generated, denoiser, case) | files | {"out": out, "probe": True})
    except JobError:
        return None
    port = torch.load(out, weights_only=True)["records"]
    where = first_divergence(port, torch.load(files["reference"], weights_only=True)["records"], BOUND)
    if where and "line" in where:
        where |= source_of(Path(generated) / denoiser.folder, where["file"], where["line"])
    return where


def source_of(folder: Path, file: str, line: int) -> dict[str, Any]:
    """Source place and rules of a generated line, from port.json's line map; empty where there is none.

    The map of a file is rows [first line, last line, "source file:line" or null, rules].
    """
    path = folder / "port.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text()).get("lines", {}).get(file, ())
    for first, last, source, rules in rows:
        if first <= line <= last:
            return {"source": source, "rules": list(rules)}
    return {}


def raised_at(trace: str, folder: Path) -> dict[str, Any] | None:
    """Innermost line of the generated folder in a traceback."""
    marker = f'File "{folder.resolve()}/'
    found = [line for line in trace.splitlines() if marker in line]
    if not found:
        return None
    file, _, rest = found[-1].split(marker)[1].partition('", line ')
    number = int(rest.split(",")[0])
    return {"file": file, "line": number, "traceback": trace[-1500:], **source_of(folder, file, number)}
