"""What the evidence claims about checked-in ports is what happens on the engine beside Diffusers.

Rung `module` for every denoiser and a few pipelines in full run each time; of all other rungs of all other classes, a part
does (`rotation`, printed at the head of a run; PORTER_TURN=N repeats it). A claim that doesn't hold fails; what nobody
claims does not, so that a port which changed on its own is "not tested" until the next sweep.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from porter.evidence import digests, features_of, read_evidence, reader, short
from porter.verify import verify
from porter.verify.report import FEATURE_OF_RUNG
from tests.verify.rotation import share

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "generated"
CORPUS = ROOT / "tests/corpus"
ALWAYS = ("QwenImagePipeline", "FluxPipeline")
DENOISER_PARTS, PIPELINE_PARTS = 8, 16
"""Pipelines take longer than denoisers, so that a run takes fewer of them."""
RESTART_AFTER, MEMORY = 30, 3 * 2**30


@cache
def claims() -> dict[str, dict[str, Any]]:
    """Class -> features that hold for its code, denoisers and pipelines alike."""
    known = read_evidence(CORPUS / "evidence.json")
    current: dict[str, str] = {}
    for port in json.loads((GENERATED / "manifest.json").read_text(encoding="utf-8"))["ports"]:
        current.update(digests(port, reader(GENERATED)))
    return {name: features_of(known.get(name), digest) for name, digest in sorted(current.items())}


def denoisers() -> list[str]:
    ports = json.loads((GENERATED / "manifest.json").read_text(encoding="utf-8"))["ports"]
    return sorted({short(d["source"]) for p in ports for d in p["denoisers"].values()})


def pipelines() -> list[str]:
    return [name for name in claims() if name not in denoisers()]


def broken(name: str, rungs: tuple[str, ...], bench: Any) -> list[str]:
    """Claims about a class that do not hold."""
    claimed = {f for f, state in claims()[name].items() if state["status"] == "validated"}
    wanted = [r for r in rungs if FEATURE_OF_RUNG[r] in claimed]
    if not wanted:
        return []
    report = verify(name, GENERATED, wanted, corpus=CORPUS, bench=bench)
    bench.tidy(restart_after=RESTART_AFTER, memory=MEMORY)
    return [f"{r.rung} {c.name}: {c.message}" for r in report.rungs for c in r.failures()]


@pytest.mark.parametrize("name", denoisers())
def test_a_denoiser_equals_that_of_diffusers(name: str, bench: Any) -> None:
    assert broken(name, ("module",), bench) == []


@pytest.mark.parametrize("name", share(denoisers(), DENOISER_PARTS))
def test_a_denoiser_of_this_part_does_all_that_is_claimed(name: str, bench: Any) -> None:
    assert broken(name, ("weights", "bf16", "tp", "sp"), bench) == []


@pytest.mark.parametrize("name", sorted({*ALWAYS, *share(pipelines(), PIPELINE_PARTS)}))
def test_a_pipeline_of_this_part_does_all_that_is_claimed(name: str, bench: Any) -> None:
    assert broken(name, ("pipeline", "cfg", "step", "batch", "cache"), bench) == []


@pytest.mark.parametrize(("names", "parts"), [(denoisers(), DENOISER_PARTS), (pipelines(), PIPELINE_PARTS)])
def test_over_all_turns_every_class_comes_once(names: list[str], parts: int) -> None:
    seen = [name for number in range(700, 700 + parts) for name in share(names, parts, number)]
    assert sorted(seen) == sorted(names)


def test_what_always_runs_is_proven() -> None:
    for name in ALWAYS:
        assert claims()[name].get("pipeline", {}).get("status") == "validated", name


def test_the_checked_in_coverage_is_the_current_one() -> None:
    """New passes and new failures are committed knowingly: porter coverage > tests/corpus/coverage.csv."""
    from porter.coverage import table

    now = table(GENERATED, CORPUS, ROOT / "rules/models")
    assert (CORPUS / "coverage.csv").read_text(encoding="utf-8") == now


def test_evidence_is_about_the_code_that_is_checked_in() -> None:
    """Each denoiser's proof is of today's code: a sweep was run before it was checked in."""
    assert [name for name in denoisers() if "transformer" not in claims()[name]] == []
