"""`x[...]` of tokens, and of a tensor that every rank has in full."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst

from porter.facts.sequence import shapes
from porter.facts.sequence.values import NONE, NotShardable, Tokens, Value, Whole, has_tokens, opaque, whole
from porter.source import tree

ValueOf = Callable[[cst.BaseExpression], Value]


def indexed(x: Tokens, node: cst.Subscript, value_of: ValueOf) -> Value:
    """`x[...]` of tokens: the token axis only by whole streams."""
    spelled = [e.slice for e in node.slice]
    dots = [i for i, e in enumerate(spelled) if isinstance(e, cst.Index) and isinstance(e.value, cst.Ellipsis)]
    taken = sum(not (isinstance(e, cst.Index) and (isinstance(e.value, cst.Ellipsis) or tree.is_none(e.value)))
                for e in spelled)  # fmt: skip
    axis = 0
    result, removed, added = x, 0, 0
    for position, each in enumerate(spelled):
        if position in dots:
            axis += x.rank - taken
            continue
        if isinstance(each, cst.Index) and tree.is_none(each.value):
            added += axis <= x.axis
            result = Tokens(result.rank + 1, result.axis, result.parts)
            continue
        if axis == x.axis:
            if not isinstance(each, cst.Slice) or each.step is not None:
                raise NotShardable("single tokens are picked")
            low = value_of(each.lower) if each.lower is not None else None
            high = value_of(each.upper) if each.upper is not None else None
            result = shapes.taken(result, low, high)
        elif isinstance(each, cst.Index):
            if isinstance(value_of(each.value), Tokens):
                raise NotShardable("tokens are picked by an index")
            removed += axis < x.axis
            result = Tokens(result.rank - 1, result.axis, result.parts)
        axis += 1
    return Tokens(result.rank, x.axis - removed + added, result.parts)


def whole_indexed(owner: Whole, node: cst.Subscript, value_of: ValueOf) -> Value:
    entries: list[str] = []
    for each in (e.slice for e in node.slice):
        if isinstance(each, cst.Slice):
            bounds = [value_of(b) for b in (each.lower, each.upper, each.step) if b is not None]
            if has_tokens(*bounds):
                raise NotShardable("a tensor that every rank has in full is cut to this rank's number of tokens")
            entries.append("part" if bounds else "all")
        elif isinstance(each.value, cst.Ellipsis):  # type: ignore[attr-defined]
            entries.append("...")
        else:
            value = value_of(each.value)  # type: ignore[attr-defined]
            if has_tokens(value):
                raise NotShardable("entries of a table are picked by tokens")
            entries.append("new" if value == NONE else "one")
    if entries == ["one"]:
        at = shapes.number(value_of(node.slice[0].slice.value))
        return whole("item", args=(at,), base=(owner,)) if at is not None else opaque([owner])
    return whole("view", op="index", args=tuple(entries), base=(owner,))
