"""Figures of a comparison: what is not finite on either side is never within a bound."""

from __future__ import annotations

import math

import pytest

from porter.verify.compare import difference, worst_difference

torch = pytest.importorskip("torch")


def test_a_value_that_is_not_finite_is_beyond_any_bound_on_either_side() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    assert difference(bad, good)["rel_l2"] == math.inf
    assert difference(good, bad)["rel_l2"] == math.inf
    assert worst_difference([good, good], [good, bad])["rel_l2"] == math.inf


def test_axes_of_length_one_make_no_other_shape() -> None:
    assert difference(torch.ones(1, 3), torch.ones(3))["rel_l2"] == 0.0
    assert difference(torch.ones(2, 3), torch.ones(3, 2))["rel_l2"] == math.inf


def test_the_error_is_relative_to_the_reference() -> None:
    figures = difference(torch.tensor([3.0, 4.0]) * 1.1, torch.tensor([3.0, 4.0]))
    assert figures["rel_l2"] == pytest.approx(0.1)
    assert figures["max_abs"] == pytest.approx(0.4)
