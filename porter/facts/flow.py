"""Flows: what is known of one tensor while a forward is followed, and how operations combine them."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.geometry import HEAD_COUNTS, KV_HEAD_COUNTS
from porter.source import tree

Linear = tuple[str, str]
"""(class, path) of a linear."""

_SPLITTING = frozenset({"unflatten", "view", "reshape"})
SHAPE_ONLY = frozenset({"shape", "dtype", "device", "ndim", "size", "dim"})
_ELEMENTWISE_METHODS = frozenset(
    {"to", "type_as", "float", "contiguous", "chunk", "half", "bfloat16", "clone", "sigmoid", "square"}
)


class Flow(Struct, frozen=True):
    """What is known of one tensor: the linears and attention sites it comes from.

    `split` says that heads are an axis of their own, `heads_first` that this axis stands before the sequence; `parts` are
    flows side by side in the last dimension. `tainted`: what happened to it may not act on each shard alone.
    """

    linears: frozenset[Linear] = frozenset()
    attention: frozenset[int] = frozenset()
    split: bool = False
    elementwise: bool = True
    mixed: bool = False
    parts: tuple[Flow, ...] = ()
    tainted: bool = False
    heads_first: bool = False

    @property
    def whole(self) -> bool:
        """Nothing in it could be sharded."""
        return not self.linears and not self.attention


WHOLE = Flow()
PARAMETER = Flow(tainted=True)
"""A parameter of the class itself: its shape may count heads, so what it meets is not sharded."""
NOTHING = Flow(split=True)
"""`None`: a variable that holds no tensor on this path."""
Shape = Flow | tuple["Shape", ...]


class AttentionSite(Struct, frozen=True):
    """One attention call: query, key and value flows, where it stands, and its layout (`bshd` or `bhsd`)."""

    owner: str
    method: str
    call: cst.Call
    layout: str
    query: Flow
    key: Flow
    value: Flow


def as_flow(value: Shape) -> Flow:
    return value if isinstance(value, Flow) else pass_through(list(value))  # type: ignore[return-value]


def merge(left: Flow, right: Flow) -> Flow:
    """What a variable is after two paths came together; whole on one path and sharded on the other is mixed."""
    if left == NOTHING or right == NOTHING:
        return right if left == NOTHING else left
    if left.whole != right.whole:
        return replace(right if left.whole else left, mixed=True)
    return Flow(
        left.linears | right.linears, left.attention | right.attention, left.split or right.split,
        left.elementwise and right.elementwise, left.mixed or right.mixed,
        left.parts if left.parts == right.parts else (),
        left.tainted or right.tainted, left.heads_first or right.heads_first,
    )  # fmt: skip


def union(values: list[Shape]) -> Shape:
    if not values:
        return WHOLE
    if all(isinstance(v, tuple) for v in values) and len({len(v) for v in values}) == 1:  # type: ignore[arg-type]
        columns = zip(*(v for v in values if isinstance(v, tuple)), strict=True)
        return tuple(union(list(column)) for column in columns)
    result = as_flow(values[0])
    for each in values[1:]:
        result = merge(result, as_flow(each))
    return result


def pass_through(values: list[Shape]) -> Flow:
    result = WHOLE
    for each in values:
        flow = as_flow(each)
        if flow.tainted and not result.whole:
            result = replace(result, tainted=True)
        result = flow if result.whole else result if flow.whole else merge(result, flow)
    return result


def combine(left: Flow, right: Flow, number: bool = False, axes: int = 0) -> Flow:
    """Arithmetic on two tensors; a shard with a whole tensor is mixed unless the whole one is a number or is the same for
    all that is sharded: `axes` is the number of its last axes that have length one."""
    if left.whole and right.whole:
        return PARAMETER if left.tainted or right.tainted else WHOLE
    both = not left.whole and not right.whole
    result = merge(left, right) if both else right if left.whole else left
    result = replace(result, tainted=left.tainted or right.tainted)
    uniform = axes >= (2 if result.split else 1) and not result.heads_first
    return replace(result, mixed=result.mixed or not (both or number or uniform), parts=())


def broadcast_axes(node: cst.BaseExpression) -> int:
    """How many of the last axes of a tensor have length one by construction: `m[:, :, None, None]` two, `m.unsqueeze(-1)`
    one, `m.view(b, -1, 1, 1)` two."""
    if isinstance(node, cst.Subscript):
        last = [isinstance(e.slice, cst.Index) and tree.is_none(e.slice.value) for e in reversed(node.slice)]
        return last.index(False) if False in last else 0
    if not isinstance(node, cst.Call) or not isinstance(node.func, cst.Attribute):
        return 0
    name, arguments = node.func.attr.value, [tree.code(a.value) for a in node.args]
    if name in ("to", "float", "type_as"):
        return broadcast_axes(node.func.value)
    if name == "unsqueeze" and arguments == ["-1"]:
        return 1 + broadcast_axes(node.func.value)
    ones = [a == "1" for a in reversed(arguments)]
    return ones.index(False) if name in ("view", "reshape") and False in ones else 0


def method_call(node: cst.Call, owner: Flow, values: list[Flow]) -> Shape:
    assert isinstance(node.func, cst.Attribute)
    name = node.func.attr.value
    if name in SHAPE_ONLY:
        return WHOLE
    result = owner if not owner.whole else as_flow(tuple(values))
    if result.whole:
        return WHOLE
    if name in _SPLITTING:
        stars = [a for a in node.args if a.star]
        if stars and len(node.args) == 1:  # `x.reshape(*x.shape)`
            return replace(result, elementwise=False, parts=())
        counts = any(tree.self_attribute(a.value) in (*HEAD_COUNTS, *KV_HEAD_COUNTS) for a in node.args)
        heads = name == "unflatten" or len(node.args) >= (3 if stars or counts else 4)
        return replace(result, split=heads, elementwise=False, parts=(), heads_first=False)
    if name == "transpose" and result.split and [tree.code(a.value) for a in node.args] == ["1", "2"]:
        return replace(result, heads_first=not result.heads_first, elementwise=False, parts=())
    if name == "permute":
        return replace(result, heads_first=True, elementwise=False, parts=())
    if name == "flatten":
        return replace(result, split=False, parts=())
    if name in _ELEMENTWISE_METHODS:
        return result
    return replace(result, elementwise=False, parts=())


def concatenate(node: cst.Call, values: list[Shape]) -> Flow:
    """Concatenation; along the last dimension the parts are remembered side by side."""
    parts = values[0] if values and isinstance(values[0], tuple) else tuple(values[:1])
    flows = tuple(as_flow(p) for p in parts)
    result = pass_through(list(flows))
    dim = next((a.value for a in node.args[1:] if a.keyword is None or a.keyword.value == "dim"), None)
    last = dim is not None and tree.code(dim) in ("-1", "2") and not any(f.split for f in flows)
    if last and any(not f.whole for f in flows):
        mixed = any(f.whole for f in flows)
        return replace(result, parts=flows, mixed=result.mixed or mixed)
    return replace(result, parts=())
