"""Figures of a comparison of two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def worst_difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> dict[str, Any]:
    """`difference` of the pair that differs most; rel_l2 is inf when one side returns more tensors."""
    if len(got) != len(want):
        return {"rel_l2": float("inf"), "shape": [len(got)], "expected_shape": [len(want)]}
    return max((difference(a, b) for a, b in zip(got, want, strict=True)), key=lambda figures: figures["rel_l2"])


def difference(got: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """rel_l2, max_abs and absmax of the reference; rel_l2 is inf for another shape or a value that is not finite.

    Shapes that differ only in axes of length 1 are the same.
    """
    import torch

    if squeezed(tuple(got.shape)) != squeezed(tuple(want.shape)):
        return {"rel_l2": float("inf"), "shape": list(got.shape), "expected_shape": list(want.shape)}
    a, b = got.detach().double().reshape(want.shape), want.detach().double()
    for values, key in ((a, "not_finite"), (b, "reference_not_finite")):
        if not torch.isfinite(values).all():  # NaN is not greater than any bound
            return {"rel_l2": float("inf"), key: int((~torch.isfinite(values)).sum())}
    scale = b.norm().item()
    return {
        "rel_l2": (a - b).norm().item() / (scale if scale > 0 else 1.0),
        "max_abs": (a - b).abs().max().item() if a.numel() else 0.0,
        "reference_absmax": b.abs().max().item() if b.numel() else 0.0,
    }


def rounded(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two pictures of 8 bits differ by one level in at most one of 500 values.

    A pipeline that shows its pictures to a checker rounds them itself; a value within rounding error of a level's edge
    falls to either side.
    """
    if squeezed(tuple(got.shape)) != squeezed(tuple(want.shape)):
        return False
    levels = [(t.detach().double().reshape(want.shape) + 1) * 127.5 for t in (got, want)]
    if any(((v - v.round()).abs() > 1e-3).any() for v in levels):
        return False
    apart = (levels[0].round() - levels[1].round()).abs()
    return bool(apart.max() <= 1 and apart.count_nonzero() * 500 <= apart.numel())
