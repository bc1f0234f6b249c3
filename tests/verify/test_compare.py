"""Figures of a comparison: what is not finite on either side is never within a bound."""

from __future__ import annotations

import math

import pytest

from porter.verify.compare import difference, rounded, worst_difference

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


def test_pictures_of_8_bits_may_differ_by_a_level_here_and_there() -> None:
    picture = torch.arange(256).repeat(8) / 127.5 - 1
    one, many, far = picture.clone(), picture.clone(), picture.clone()
    one[7] += 1 / 127.5
    many[:16] += 1 / 127.5
    far[7] += 2 / 127.5
    assert rounded(one, picture)
    assert not rounded(many, picture)
    assert not rounded(far, picture)


def test_values_between_levels_are_no_picture_of_8_bits() -> None:
    picture = torch.arange(256).repeat(8) / 127.5 - 1
    assert not rounded(picture + 0.001, picture)
