"""Rung `bf16`: in bfloat16 a denoiser loses no more than Diffusers' own does.

The reference is Diffusers in float32, with weights and inputs that bfloat16 holds exactly, so that all three sides have
the same ones. Both bfloat16 sides are compared with it; Diffusers' is loaded with `from_pretrained`, which keeps the
modules of `_keep_in_fp32_modules` in float32. The ratio of the two errors of one run varies, because both are sums of
few roundings in a tiny model. So each case runs with several seeds, and its ratio is the geometric mean over them; it
fails when the mean, less its standard errors, is still above FACTOR. The class fails as well when the mean over all runs
is above FACTOR.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.cases import ModuleCase, build_inputs
from porter.verify.compare import difference
from porter.verify.manifest import Denoiser
from porter.verify.outcome import ALL_RUNS, CaseResult, RungResult, rung_of
from porter.verify.rungs.module import engine_job, raised_at, source_of

FACTOR = 1.1
"""Largest error of the port relative to Diffusers' own."""
ROUND, MOST = 6, 24
"""Seeds that are run at once, and at most, for a case."""
CERTAIN = 2.5
"""Standard errors that a mean must be away from FACTOR for a verdict before MOST seeds are run."""
EXCESS = 1.5
"""A module whose error is so many times that of Diffusers' is named as the place where precision is lost."""
POSITIONS = ("ids", "rotary", "rope", "freqs")
EXACT_INPUTS = (("timestep", "guidance", "sigma", *POSITIONS), POSITIONS, ())
"""Parts of names of inputs that stay in float32, as pipelines hand them over; the first choice that Diffusers can run."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Geometric mean of error ratios; `spread` is the standard error of its logarithm."""

    mean: float
    spread: float

    def surely_above(self, bound: float) -> bool:
        return self.mean > 0 and math.log(self.mean) - CERTAIN * self.spread > math.log(bound)

    def surely_below(self, bound: float) -> bool:
        return self.mean == 0 or math.log(self.mean) + CERTAIN * self.spread <= math.log(bound)


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """The mean of several runs. A run in which only the port is wrong (infinite ratio) makes the mean infinite."""
    if any(math.isinf(r) or math.isnan(r) for r in ratios):
        return Ratio(math.inf, 0.0)
    logs = [math.log(max(r, 1e-6)) for r in ratios]
    mean = sum(logs) / len(logs)
    variance = sum((x - mean) ** 2 for x in logs) / max(len(logs) - 1, 1)
    return Ratio(math.exp(mean), math.sqrt(variance / len(logs)))


def bf16(bench: Bench, generated: Path | str, denoiser: Denoiser, cases: Iterable[ModuleCase]) -> RungResult:
    """Every case over several seeds, and all of them together."""
    clock = Clock()
    results: list[CaseResult] = []
    pooled: list[float] = []
    for case in cases:
        result, ratios = _case(bench, generated, denoiser, case)
        results.append(result)
        pooled += ratios
    overall = ratio_of(pooled) if pooled else None
    if overall is not None:
        good = overall.mean <= FACTOR
        message = "" if good else f"error {overall.mean:.2f} times that of Diffusers (bound {FACTOR})"
        figures = {"error_ratio": _short(overall.mean), "runs": len(pooled)}
        results.append(CaseResult(ALL_RUNS, "passed" if good else "failed", message, figures))
    return rung_of("bf16", denoiser.source_class, results, clock())


def _case(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> tuple[CaseResult, list[float]]:
    clock = Clock()
    ratios: list[float] = []
    errors: list[tuple[float, float]] = []
    while len(ratios) < MOST:
        seeds = range(case.seed + len(ratios), case.seed + len(ratios) + ROUND)
        try:
            errors += _runs(bench, generated, denoiser, case, list(seeds))
        except _Baseline as error:
            return CaseResult(case.name, "skipped", f"Diffusers itself raises {error}", seconds=clock()), []
        except _Buffers as error:
            return CaseResult(case.name, "failed", f"unlike Diffusers' buffer, {error}", seconds=clock()), []
        except JobError as error:
            where = raised_at(error.trace, Path(generated) / denoiser.folder)
            return CaseResult(case.name, "failed", f"the port raises {error}"[:600], seconds=clock(), where=where), []
        ratios = [_ratio(*pair) for pair in errors]
        found = ratio_of(ratios)
        if found.surely_above(FACTOR) or found.surely_below(FACTOR):
            break
    figures: dict[str, Any] = {
        "error_ratio": _short(found.mean),
        "seeds": len(ratios),
        "error": _short(max(p for p, _ in errors)),
        "diffusers_error": _short(max(d for _, d in errors)),
    }
    if not found.surely_above(FACTOR):
        return CaseResult(case.name, "passed", "", figures, clock()), ratios
    where = _diagnose(bench, generated, denoiser, case)
    message = f"error {found.mean:.2f} times that of Diffusers (bound {FACTOR})"
    if where is not None:
        message += f"; {where['module']} is the first with more than {EXCESS} times ({where['ratio']:.1f})"
        if "line" in where:
            message += f", called at {where['file']}:{where['line']}"
        if where.get("source"):
            message += f", from {where['source']}"
    return CaseResult(case.name, "failed", message, figures, clock(), where), ratios


class _Baseline(Exception):
    """Diffusers can't run the case in bfloat16."""


class _Buffers(Exception):
    """Buffers of a checkpoint have another dtype in the port, and which."""


def _runs(
    bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase, seeds: list[int], *, probe: bool = False
) -> list[Any]:
    """(error of the port, error of Diffusers) for each seed; with `probe` the records of both sides instead."""
    import torch

    files = _reference(bench, case, seeds, probe)
    out = bench.path("bf16-port")
    job = engine_job(generated, denoiser, case) | files | {"job": "bf16", "out": out, "probe": probe}
    if other := bench.engine(job)["buffers"]:
        raise _Buffers(", ".join(f"{name} is {dtype}" for name, dtype in other.items()))
    port, reference = torch.load(out, weights_only=True), torch.load(files["reference"], weights_only=True)
    if probe:
        return [(port[0]["records"], reference[0]["half_records"], reference[0]["records"])]
    return [
        (_error(p["output"], r["output"]), _error(r["half"], r["output"])) for p, r in zip(port, reference, strict=True)
    ]


def _reference(bench: Bench, case: ModuleCase, seeds: list[int], probe: bool) -> dict[str, str]:
    """Files with inputs and the Diffusers side. Raises _Baseline when Diffusers takes none of EXACT_INPUTS."""
    import torch

    job = {"job": "bf16", "class": case.denoiser, "config": dict(case.config), "seeds": seeds, "probe": probe}
    problem = ""
    for exact in EXACT_INPUTS:
        files = {"inputs": bench.path("bf16-inputs"), "reference": bench.path("bf16-reference")}
        torch.save([halved(build_inputs(case.inputs, seed), exact) for seed in seeds], files["inputs"])
        try:
            bench.baseline.call(job | {"inputs": files["inputs"], "out": files["reference"]})
            return files
        except JobError as error:
            problem = problem or str(error)[:300]
    raise _Baseline(problem)


def halved(inputs: dict[str, Any], exact: tuple[str, ...]) -> dict[str, Any]:
    """Floating tensors in bfloat16, but for those with a part of `exact` in the name."""
    return {n: v if any(part in n for part in exact) else _half(v) for n, v in inputs.items()}


def _half(value: Any) -> Any:
    import torch

    if torch.is_tensor(value):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {n: _half(v) for n, v in value.items()}
    return type(value)(_half(v) for v in value) if isinstance(value, (list, tuple)) else value


def _error(got: Sequence[Any], want: Sequence[Any]) -> float:
    """Root mean square over the outputs of their relative L2 errors; infinite for another number of outputs."""
    if len(got) != len(want):
        return math.inf
    errors = [difference(a, b)["rel_l2"] for a, b in zip(got, want, strict=True) if b.is_floating_point()]
    return math.sqrt(sum(e * e for e in errors) / max(len(errors), 1))


def _ratio(port: float, diffusers: float) -> float:
    if port == diffusers:
        return 1.0
    return port / diffusers if diffusers > 0 else math.inf


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _diagnose(bench: Bench, generated: Path | str, denoiser: Denoiser, case: ModuleCase) -> dict[str, Any] | None:
    """The first module that loses much more than Diffusers' does, with its place in the generated file and the source."""
    from porter.verify.probes import first_excess

    try:
        port, half, full = _runs(bench, generated, denoiser, case, [case.seed], probe=True)[0]
    except (JobError, _Baseline):
        return None
    where = first_excess(port, half, full, EXCESS)
    if where and "line" in where:
        where |= source_of(Path(generated) / denoiser.folder, where["file"], where["line"])
    return where
