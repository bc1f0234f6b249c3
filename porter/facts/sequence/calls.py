"""What calls need: parameters bound to values, what is unpacked, and what is noted about attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import libcst as cst
from msgspec import Struct

from porter.facts.sequence import shapes
from porter.facts.sequence.tables import PER_TOKEN, Met
from porter.facts.sequence.values import (
    FIXED,
    OTHER,
    Conflict,
    Const,
    Either,
    Instance,
    Many,
    Modules,
    NotShardable,
    Tokens,
    Value,
    Whole,
    flattened,
    has_tokens,
    joined,
    per_token,
    whole,
)
from porter.source import tree

Env = dict[str, Value]
TEXT = "encoder_hidden_states"
"""The one optional input that is always given: a denoiser is conditioned on it."""


class AttentionUse(Struct, frozen=True):
    """What one attention call was given: the streams of query and key (None: every rank has it in full), and its mask.

    `origin` is the attribute of the root through which the layer was reached.
    """

    owner: str
    origin: str
    call: cst.Call
    query: tuple[str, ...] | None
    key: tuple[str, ...] | None
    mask: Value


class Counted(Struct, frozen=True):
    """A number of this rank's tokens of `parts` that stands for the number of all of them; `beside` is what it is compared
    with."""

    owner: str
    node: cst.BaseExpression
    parts: tuple[str, ...]
    beside: Value


@dataclass
class Findings:
    """What following a forward brings up. With `pairs`, tensors that are made by their shape are of all ranks' tokens."""

    pairs: bool = False
    counted: dict[int, Counted] = field(default_factory=dict)
    attention: dict[int, list[AttentionUse]] = field(default_factory=dict)
    met: Met = field(default_factory=Met)
    calls: dict[tuple[object, ...], Value] = field(default_factory=dict)
    mixing: set[tuple[str, str]] = field(default_factory=set)


def count(findings: Findings, found: Counted) -> None:
    """Note a number of all tokens. Raises NotShardable where it is one of other tokens elsewhere."""
    before = findings.counted.setdefault(id(found.node), found)
    if (before.owner, before.parts) != (found.owner, found.parts):
        raise NotShardable("the number of tokens is used in arithmetic")


def with_origin(value: Value, origin: str) -> Value:
    """A module of the root, with the attribute that holds it."""
    if isinstance(value, Instance):
        return Instance(value.classes, origin)
    if isinstance(value, Modules):
        return Modules(Instance(value.element.classes, origin), tuple(Instance(e.classes, origin) for e in value.chain))
    return value


def same_tokens(mask: Tokens, key: tuple[str, ...]) -> None:
    """A mask of the keys: where it is another variable than the keys' stream, both have the same tokens."""
    if mask.axis != mask.rank - 1 or len(mask.parts) != len(key):
        raise NotShardable("a mask that is divided covers other tokens than the keys")
    different = [(a, b) for a, b in zip(mask.parts, key, strict=True) if a != b]
    if different:
        raise shapes.Parallel("a mask covers a stream", *different[0])


def bound(
    function: cst.FunctionDef,
    args: list[Value],
    kwargs: Mapping[str, Value],
    receiver: Instance | None,
    default: Callable[[cst.BaseExpression], Value],
) -> Env:
    """Parameters of a call by name; those not given have their default."""
    static = any(isinstance(d.decorator, cst.Name) and d.decorator.value == "staticmethod" for d in function.decorators)
    given = list(args) if receiver is None or static else [receiver, *args]
    env: Env = {}
    params = [*function.params.posonly_params, *function.params.params]
    for param, value in zip(params, given, strict=False):
        env[param.name.value] = value
    if isinstance(function.params.star_arg, cst.Param):
        env[function.params.star_arg.name.value] = Many(tuple(given[len(params) :]))
    for param in [*params, *function.params.kwonly_params]:
        name = param.name.value
        if name in kwargs:
            env[name] = kwargs[name]
        elif name not in env:
            known = param.default is not None and "**" not in kwargs
            env[name] = default(param.default) if known and param.default is not None else OTHER
    for name, value in env.items():
        if isinstance(value, Whole) and value.kind == "boundary" and PER_TOKEN.search(name):
            per_token.add(value.name)
    return env


def unpacked(value: Value, count: int) -> list[Value]:
    """Elements of a value that is unpacked into `count` targets."""
    if isinstance(value, Either):
        value = next((o for o in value.options if isinstance(o, Many) and len(o.items) == count), value.options[0])
    if isinstance(value, Many):
        if len(value.items) == count:
            return list(value.items)
        if value.items and len(set(value.items)) == 1:
            return [value.items[0]] * count
        return [
            joined(flattened(value)) if not has_tokens(value) else Conflict("it is unpacked into other parts")
        ] * count
    if isinstance(value, Whole):
        return [whole("item", args=(i,), base=(value,)) if value.kind != "fixed" else FIXED for i in range(count)]
    if isinstance(value, Tokens):
        return [Conflict("a tensor of tokens is unpacked")] * count
    return [value if isinstance(value, Conflict) else OTHER] * count


def arithmetic(operator: cst.BaseBinaryOp, left: object, right: object) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        if isinstance(operator, cst.Add):
            return Const(left + right)
        if isinstance(operator, cst.Subtract):
            return Const(left - right)
    return OTHER


def tested_rank(test: cst.Comparison) -> tuple[str, int | None]:
    """(x, n) of `x.ndim == n`, `x.dim() == n` or `len(x.shape) == n`."""
    left: cst.BaseExpression = test.left
    comparator = test.comparisons[0].comparator
    if not isinstance(comparator, cst.Integer):
        return "", None
    if isinstance(left, cst.Call):
        if tree.call_name(left) == "len" and len(left.args) == 1:
            left = left.args[0].value
            if not (isinstance(left, cst.Attribute) and left.attr.value == "shape"):
                return "", None
        elif isinstance(left.func, cst.Attribute) and left.func.attr.value == "dim" and not left.args:
            left = left.func
    if (
        isinstance(left, cst.Attribute)
        and left.attr.value in ("ndim", "dim", "shape")
        and isinstance(left.value, cst.Name)
    ):
        return left.value.value, int(comparator.value)
    return "", None
