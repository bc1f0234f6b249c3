"""What is known of a test, and what a test tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import libcst as cst

from porter.facts.sequence.calls import TEXT, Env, tested_rank
from porter.facts.sequence.values import NONE, Const, Instance, Length, Many, Modules, Tokens, Whole, with_rank

if TYPE_CHECKING:
    from porter.facts.sequence.follow import Frame


def refine(test: cst.BaseExpression, env: Env) -> None:
    """`if x.ndim == 3`: what is known of x inside."""
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        name, number = tested_rank(test)
        if name in env and number is not None:
            env[name] = with_rank(env[name], number)
    elif isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.And):
        refine(test.left, env)
        refine(test.right, env)


def truth(frame: Frame, test: cst.BaseExpression, env: Env) -> bool | None:
    """Value of a test, or None where it is not known."""
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        inner = truth(frame, test.expression, env)
        return None if inner is None else not inner
    if isinstance(test, cst.BooleanOperation):
        left, right = truth(frame, test.left, env), truth(frame, test.right, env)
        decisive = isinstance(test.operator, cst.Or)
        if decisive in (left, right):
            return decisive
        return None if None in (left, right) else not decisive
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        known = compared(frame, test, env)
        if known is None:
            frame.compared_length(test, env)
        return known
    value = frame.eval(test, env)
    return bool(value.value) if isinstance(value, Const) else None


def compared(frame: Frame, test: cst.Comparison, env: Env) -> bool | None:
    target = test.comparisons[0]
    negated = isinstance(target.operator, (cst.IsNot, cst.NotEqual))
    if not negated and not isinstance(target.operator, (cst.Is, cst.Equal)):
        return None
    name, number = tested_rank(test)
    if name in env and number is not None:
        value = env[name]
        return (value.rank == number) != negated if isinstance(value, Tokens) else None
    left, right = frame.eval(test.left, env), frame.eval(target.comparator, env)
    if isinstance(left, Const) and isinstance(right, Const):
        return (left.value == right.value) != negated
    if right == NONE and isinstance(left, (Tokens, Many, Instance, Modules, Length)):
        return negated
    if right == NONE and isinstance(left, Whole) and (left.name == TEXT or left.kind in ("view", "join", "opaque")):
        return negated
    return None
