"""Guidance by an object: it prepares one batch of inputs per branch, a loop predicts for each, and it combines them."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.liveness import uses, writes
from porter.model import Unknown
from porter.source.tree import body, find, same


class GuiderLoop(Struct, frozen=True):
    """`for batch in batches:` with the denoiser call of a branch, at the end of the predict region.

    `inner` is what a branch evaluates ahead of the call, as far as the call reads it; `prediction` the expression around
    `call` that is stored as the batch's prediction; `above` the lines above its statement.
    """

    loop: cst.For
    guider: cst.BaseExpression
    batch: cst.Name
    batches: cst.BaseExpression
    inner: tuple[cst.BaseStatement, ...]
    call: cst.Call
    prediction: cst.BaseExpression
    above: tuple[cst.EmptyLine, ...]


def guider_loop(predict: Sequence[cst.BaseStatement]) -> GuiderLoop | Unknown:
    """The loop at the end of the predict region, if a guider runs it."""
    loop = predict[-1]
    if not isinstance(loop, cst.For) or not isinstance(loop.target, cst.Name) or loop.orelse is not None:
        return Unknown("no loop over guidance branches")
    inner = body(loop)
    prepared = [c for s in inner if (c := _method(s, "prepare_models")) is not None]
    cleaned = [c for s in inner if (c := _method(s, "cleanup_models")) is not None]
    if len(prepared) != 1 or len(cleaned) != 1 or not same(_owner(prepared[0]), _owner(cleaned[0])):
        return Unknown("the loop over guidance branches does not prepare and clean up the model once")
    model = prepared[0].args[0].value
    left = [s for s in inner if _method(s, "prepare_models") is None and _method(s, "cleanup_models") is None]
    place = next((i for i, s in enumerate(left) if any(same(c.func, model) for c in find(s, cst.Call))), None)
    if place is None:
        return Unknown("the loop over guidance branches does not call the model that it prepares")
    prediction = _stored(left[place:], loop.target)
    if prediction is None:
        return Unknown("a guidance branch does more than to store its prediction")
    ahead = left[:place]
    if not all(isinstance(s, cst.SimpleStatementLine) and isinstance(s.body[0], cst.Assign) for s in ahead):
        return Unknown("a guidance branch prepares more than the arguments of its call")
    calls = [c for c in find(prediction, cst.Call) if same(c.func, model)]
    if len(calls) != 1 or any(a.keyword is None and a.star != "**" for a in calls[0].args):
        return Unknown("a guidance branch calls the model with positional arguments")
    if writes(ahead) & uses(loop.iter):
        return Unknown("a guidance branch changes the list of branches")
    above = tuple(cst.ensure_type(left[place], cst.SimpleStatementLine).leading_lines)
    inner = _read_by(calls[0], ahead)
    return GuiderLoop(loop, _owner(prepared[0]), loop.target, loop.iter, tuple(inner), calls[0], prediction, above)


def _read_by(call: cst.Call, ahead: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """Assignments that the call needs; a name of the branch for a cache of the model is none of them."""
    live, kept = set(uses(call)), list[cst.BaseStatement]()
    for each in reversed(ahead):
        if writes([each]) & live or any(not same(c.func, cst.Name("getattr")) for c in find(each, cst.Call)):
            live |= uses(each)
            kept.insert(0, each)
    return kept


def _method(node: cst.BaseStatement, name: str) -> cst.Call | None:
    """The call of a statement `x.<name>(y)`."""
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Expr):
        return None
    call = node.body[0].value
    if not isinstance(call, cst.Call) or not isinstance(call.func, cst.Attribute) or len(call.args) != 1:
        return None
    return call if call.func.attr.value == name else None


def _owner(call: cst.Call) -> cst.BaseExpression:
    return cst.ensure_type(call.func, cst.Attribute).value


def _stored(statements: Sequence[cst.BaseStatement], batch: cst.Name) -> cst.BaseExpression | None:
    """The value of `batch.noise_pred = value`, or of `x = value` with `batch.noise_pred = x` behind it."""
    pairs = []
    for each in statements:
        if not isinstance(each, cst.SimpleStatementLine) or not isinstance(each.body[0], cst.Assign):
            return None
        pairs.append((each.body[0].targets[0].target, each.body[0].value))
    target, value = pairs[-1]
    wanted = cst.Attribute(batch, cst.Name("noise_pred"))
    if not same(target, wanted) or len(pairs) > 2:
        return None
    if len(pairs) == 2 and not (isinstance(pairs[0][0], cst.Name) and same(pairs[0][0], value)):
        return None
    return pairs[0][1]
