"""What is done with the two predictions of a guided step."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.liveness import live_before, uses
from porter.source.tree import body, expression, normal, same


class Combination(Struct, frozen=True):
    """Statements that bind `result` from `positive`, `negative` (the predictions) and from `reads`.

    `scale` and `normalize` are set when it is the textbook formula, which the engine has built in.
    """

    statements: tuple[cst.BaseStatement, ...]
    positive: str
    negative: str
    result: str
    reads: tuple[str, ...]
    scale: cst.BaseExpression | None = None
    normalize: bool = False

    @property
    def textbook(self) -> bool:
        return self.scale is not None


def combination(statements: Sequence[cst.BaseStatement], positive: str, negative: str, result: str) -> Combination:
    """Recognise the combination of two predictions."""
    values: list[tuple[str, cst.BaseExpression]] = []
    for s in statements:
        if not isinstance(s, cst.SimpleStatementLine) or not isinstance(s.body[0], cst.Assign):
            values = []
            break
        target = s.body[0].targets[0].target
        values.append((target.value if isinstance(target, cst.Name) else "", s.body[0].value))
    reads = tuple(sorted(live_before(statements) - {positive, negative}))
    plain = Combination(tuple(statements), positive, negative, result, reads)
    scale = textbook_scale(values[0][1], positive, negative) if values else None
    if scale is None:
        return plain
    if len(values) == 1:
        return Combination(tuple(statements), positive, negative, result, reads, scale)
    if _is_norm_rescale(values[1:], values[0][0], positive):
        return Combination(tuple(statements), positive, negative, result, reads, scale, normalize=True)
    return plain


def textbook_scale(value: cst.BaseExpression, positive: str, negative: str) -> cst.BaseExpression | None:
    """`s` of `negative + s * (positive - negative)`."""
    difference = normal(expression(f"{positive} - {negative}"))
    if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.Add):
        return None
    product = value.right
    if not same(value.left, cst.Name(negative)) or not isinstance(product, cst.BinaryOperation):
        return None
    if not isinstance(product.operator, cst.Multiply):
        return None
    for scale, other in ((product.left, product.right), (product.right, product.left)):
        if normal(other) == difference and not {positive, negative} & uses(scale):
            return scale
    return None


def _is_norm_rescale(values: Sequence[tuple[str, cst.BaseExpression]], combined: str, positive: str) -> bool:
    """The three statements of the engine's own `cfg_normalize_function`."""
    if len(values) != 3:
        return False
    (condition, first), (norm, second), (_, third) = values
    wanted = [
        f"torch·norm({positive}, dim=-1, keepdim=True)",
        f"torch·norm({combined}, dim=-1, keepdim=True)",
        f"{combined} * ({condition} / {norm})",
    ]
    return [normal(v) for v in (first, second, third)] == [normal(expression(w)) for w in wanted]


def result_of(statements: Sequence[cst.BaseStatement]) -> str | None:
    """The variable that the last statement binds."""
    last = statements[-1] if statements else None
    if isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[0], cst.Assign):
        target = last.body[0].targets[0].target
        if isinstance(target, cst.Tuple):
            target = target.elements[0].value
        return target.value if isinstance(target, cst.Name) else None
    if isinstance(last, cst.If):
        return result_of(body(last))
    return None
