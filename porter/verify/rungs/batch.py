"""Rung `batch`: several requests given to the engine at once get what each gets alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.verify.bench import Bench, Clock, JobError
from porter.verify.manifest import Port
from porter.verify.outcome import CaseResult, RungResult, rung_of, skipped
from porter.verify.pipeline_spec import PER_PROMPT, SEED, PipelineSpec, RequestCase
from porter.verify.rungs.alone import same_as_alone, unequal_pictures
from porter.verify.rungs.modes import guided, not_runnable
from porter.verify.rungs.pipeline import call_of, checkpoint_of, port_job, raised

STEPS = "num_inference_steps"
TOGETHER = "three"
"""The case whose requests must share a denoising loop."""


def batch(bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None) -> RungResult:
    """Three requests in one batch give what each gives alone, and those that are alike in shape run together."""
    import torch

    if (no := not_runnable("batch", port, spec)) is not None:
        return no
    assert spec is not None
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    base = replace(guided(bench, spec)[0], stop_after=None)
    groups = {
        name: [call_of(bench, spec, checkpoint, case, variant) for case, variant in cases]
        for name, cases in _groups(base, spec)
    }
    out = bench.path("batch")
    job = port_job(generated, port, checkpoint, [{"requests": calls} for calls in groups.values()], max_num_seqs=3)
    try:
        facts = bench.engine(job | {"out": out, "batched": True})
        if not facts["supports_request_batch"]:
            return skipped("batch", port.source_class, "the port does not take several requests at once")
        singles = [call for calls in groups.values() for call in calls]
        bench.engine(job | {"calls": singles, "out": f"{out}.single", "batched": False})
    except JobError as error:
        return rung_of("batch", port.source_class, [CaseResult(TOGETHER, "failed", raised(error))], clock())
    together = torch.load(out, weights_only=True)
    alone = iter(torch.load(f"{out}.single", weights_only=True))
    results = [
        same_as_alone(name, record, [next(alone) for _ in calls], shared=name == TOGETHER)
        for (name, calls), record in zip(groups.items(), together, strict=True)
    ]
    return rung_of("batch", port.source_class, results, clock())


def _groups(base: RequestCase, spec: PipelineSpec) -> Iterator[tuple[str, list[tuple[RequestCase, int]]]]:
    """Groups of requests by name. A request is a case and the number of its pictures and drawn tensors."""
    turned = [_with_texts(base, lambda text, n=n: _turned(text, n)) for n in range(3)]  # type: ignore[misc]
    yield TOGETHER, [(replace(c, seed=SEED + n), n) for n, c in enumerate(turned)]
    yield "same-inputs", [(replace(base, seed=SEED + n), 0) for n in range(3)]
    endings = ("", ", and longer", " seen from far away in the evening")
    longer = [_with_texts(base, lambda text, e=e: text + e) for e in endings]  # type: ignore[misc]
    yield "other-lengths", [(replace(c, seed=SEED + n), n) for n, c in enumerate(longer)]
    pictures = unequal_pictures(base)
    if pictures is not None:
        yield "other-pictures", [(case, 0) for case in pictures]
    settings = _two_settings(base, spec)
    if settings is not None:
        one, other = settings
        kwargs = [{**case.kwargs, **setting} for case, setting in zip(turned, (one, other, one), strict=True)]
        yield "other-settings", [(replace(c, kwargs=k), n) for n, (c, k) in enumerate(zip(turned, kwargs, strict=True))]


def unlike(base: RequestCase, spec: PipelineSpec) -> RequestCase:
    """A request with another guidance than `base`, which keeps them apart, or with a longer text where that is fixed."""
    guidance = _two_guidances(spec)
    if guidance is not None:
        return replace(base, kwargs={**base.kwargs, **guidance[1]}, seed=SEED + 1)
    return replace(_with_texts(base, lambda text: text + " seen from far away in the evening"), seed=SEED + 1)


def _two_guidances(spec: PipelineSpec) -> tuple[dict[str, Any], dict[str, Any]] | None:
    guidance = {name: max(values) for name, values in spec.get("guidance", {}).items() if values}
    return (guidance, {name: value + 0.5 for name, value in guidance.items()}) if guidance else None


def _two_settings(base: RequestCase, spec: PipelineSpec) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Two values of guidance, which change no shape, else of the number of steps; None where both are fixed."""
    guidance = _two_guidances(spec)
    if guidance is not None:
        return guidance
    steps = base.kwargs.get(STEPS)
    return ({STEPS: steps}, {STEPS: steps + 1}) if isinstance(steps, int) else None


def _with_texts(case: RequestCase, change: Callable[[str], str]) -> RequestCase:
    texts = {k: _changed(v, change) for k, v in case.kwargs.items() if isinstance(v, str) and PER_PROMPT.fullmatch(k)}
    return replace(case, kwargs={**case.kwargs, **texts})


def _changed(text: str, change: Callable[[str], str]) -> str:
    """The text, or the texts in a prompt that is a JSON object, changed."""
    if not text.startswith("{"):
        return change(text)
    return json.dumps({k: change(v) if isinstance(v, str) else v for k, v in json.loads(text).items()})


def _turned(text: str, places: int) -> str:
    """The same words in another order: another text with as many tokens."""
    words = text.split()
    places %= max(len(words), 1)
    return " ".join(words[places:] + words[:places])
