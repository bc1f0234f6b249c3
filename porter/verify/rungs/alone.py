"""Requests that the engine runs together, beside the same requests alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from porter.verify.compare import difference, rounded
from porter.verify.outcome import BOUND, CaseResult
from porter.verify.pipeline_spec import SEED, RequestCase


def unequal_pictures(base: RequestCase) -> tuple[RequestCase, RequestCase] | None:
    """Two requests whose results have the sizes of their pictures, which differ; None where no picture gives a size."""
    if not base.images or {"height", "width"} & base.kwargs.keys():
        return None
    larger = {name: _larger(entry) for name, entry in base.images.items()}
    return base, replace(base, images=larger, seed=SEED + 1)


def _larger(entry: Any) -> Any:
    """The description of a picture, or of several, with another shape."""
    if isinstance(entry, dict):
        return {**entry, "size": _larger(entry["size"])}
    if all(isinstance(n, int) for n in entry):
        return [2 * entry[0], entry[1]]
    return [_larger(each) for each in entry]


def same_as_alone(
    name: str, together: dict[str, Any], alone: list[dict[str, Any]], *, shared: bool = False, how: str = "in a batch"
) -> CaseResult:
    """Each request gave what it gives alone; with `shared`, they also had denoiser calls in common."""
    for record, what in ((together, how), *((r, "alone") for r in alone)):
        if record["error"]:
            error = record["error"]
            message = f"{what}: {error['type']}: {error['message']}"
            return CaseResult(name, "failed", message, where={"traceback": error["trace"]})
    calls, singly = together["calls"], sum(r["calls"] for r in alone)
    figures: dict[str, Any] = {"requests": len(alone), "calls": calls, "calls_alone": singly, "rel_l2": 0.0}
    problems = []
    if not all(together["each"]) or not all(e for r in alone for e in r["each"]):
        problems.append("the port returned no tensor")
    for index, (got, record) in enumerate(zip(together["each"], alone, strict=True)):
        for a, b in zip(got, record["each"][0], strict=True):
            error = difference(a, b)
            if error["rel_l2"] > BOUND and rounded(a, b):
                figures["rounded_to_8_bits"] = True
                continue
            figures["rel_l2"] = max(figures["rel_l2"], error["rel_l2"])
            if error["rel_l2"] > BOUND:
                shapes = f", shape {error['shape']}, alone {error['expected_shape']}" if "shape" in error else ""
                problems.append(f"request {index + 1} {how} differs from itself alone: {error['rel_l2']:.2e}{shapes}")
    if shared and calls >= singly:
        problems.append(f"nothing was shared: {calls} denoiser calls in a batch, {singly} one by one")
    return CaseResult(name, "failed" if problems else "passed", "; ".join(problems[:2]), figures)
