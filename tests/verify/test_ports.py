"""Every checked-in denoiser on the engine beside Diffusers: what the manifest claims is what happens, no more, no less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from porter.verify import verify

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "generated"
RUNGS = {"weights": "weights", "module": "transformer", "tp": "tensor_parallel"}
"""Rung -> feature of the manifest."""


def claims() -> dict[str, dict[str, Any]]:
    """Denoiser class -> features of the first port that holds it."""
    found: dict[str, dict[str, Any]] = {}
    for port in json.loads((GENERATED / "manifest.json").read_text(encoding="utf-8"))["ports"]:
        for denoiser in port["denoisers"].values():
            found.setdefault(denoiser["class"], port["features"])
    return found


@pytest.mark.parametrize(("name", "features"), sorted(claims().items()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_denoiser_does_what_the_manifest_claims(name: str, features: dict[str, Any], bench: Any) -> None:
    report = verify(name, GENERATED, tuple(RUNGS), corpus=ROOT / "tests/corpus", bench=bench)
    messages = [f"{r.rung} {c.name}: {c.message}" for r in report.rungs for c in r.failures()]
    passed = {RUNGS[r.rung]: r.status == "passed" for r in report.rungs}
    claimed = {feature: features.get(feature, {}).get("status") == "validated" for feature in passed}
    assert passed == claimed, "\n".join(messages)
    assert passed["weights"] and passed["transformer"], "\n".join(messages)


def test_the_checked_in_coverage_is_the_current_one() -> None:
    """New passes and new failures are committed knowingly: porter coverage > tests/corpus/coverage.csv."""
    from porter.coverage import table

    now = table(GENERATED, ROOT / "tests/corpus", ROOT / "rules/models")
    assert (ROOT / "tests/corpus/coverage.csv").read_text(encoding="utf-8") == now


def test_evidence_is_about_the_code_that_is_checked_in() -> None:
    """A port that changed after it was proven reads "not tested"; each denoiser's proof is of today's code."""
    stale = [name for name, features in claims().items() if "transformer" not in features]
    assert stale == []
