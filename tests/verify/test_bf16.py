"""When an error ratio is above the bound and when it is chance, and that the rung looks at the right thing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from porter.verify.cases import load_cases
from porter.verify.manifest import find, read_manifest
from porter.verify.outcome import ALL_RUNS
from porter.verify.rungs.bf16 import FACTOR, ratio_of
from tests.verify.hand_port import SUBJECT


def test_equal_errors_are_surely_below_the_bound() -> None:
    found = ratio_of([1.0] * 6)
    assert found.mean == 1.0 and found.surely_below(FACTOR) and not found.surely_above(FACTOR)


def test_a_ratio_and_its_inverse_cancel() -> None:
    assert ratio_of([2.0, 0.5]).mean == pytest.approx(1.0)


def test_a_constant_excess_is_surely_above() -> None:
    assert ratio_of([1.2, 1.21, 1.19, 1.2]).surely_above(FACTOR)


def test_scatter_around_the_bound_is_neither() -> None:
    found = ratio_of([0.8, 1.5, 0.9, 1.3, 1.0, 1.4])
    assert not found.surely_above(FACTOR) and not found.surely_below(FACTOR)


def test_one_run_that_is_wrong_is_enough() -> None:
    assert ratio_of([1.0, 1.0, math.inf]).surely_above(FACTOR)
    assert ratio_of([1.0, math.nan]).surely_above(FACTOR)


def test_a_right_port_loses_no_more_than_diffusers(bench: Any, port_folder: Path) -> None:
    from porter.verify.rungs.bf16 import bf16

    _, denoisers = find(read_manifest(port_folder), SUBJECT)
    cases = [c for c in load_cases(denoisers[0].source_class) if c.name == "masked-text"]
    result = bf16(bench, port_folder, denoisers[0], cases)
    assert result.status == "passed", result
    one, everything = result.cases
    assert one.figures["diffusers_error"] > 1e-3, "nothing was rounded"
    assert everything.name == ALL_RUNS and everything.figures["error_ratio"] <= FACTOR
