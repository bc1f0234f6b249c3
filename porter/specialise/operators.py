"""Operators and builtin calls on abstract values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import libcst as cst

from porter.specialise.values import (
    GIVEN,
    NONE,
    TOP,
    Const,
    Empty,
    Items,
    Opaque,
    Value,
    is_none,
)

if TYPE_CHECKING:
    from porter.specialise.interpret import Interpreter
    from porter.specialise.program import Spec

LITERALS: dict[str, Value] = {"None": NONE, "True": Const(True), "False": Const(False)}

TENSOR_METHODS_WITH_NONE = frozenset({"get", "pop"})
"""Methods of an otherwise known value that may return None."""

# Attributes that Diffusers' base classes define with a fixed value in serving.
_INHERITED: dict[str, Value] = {
    "training": Const(False),
    "fused_projections": Const(False),
    "_attention_backend": NONE,
    "_parallel_config": NONE,
}

_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    cst.Add: operator.add,
    cst.Subtract: operator.sub,
    cst.Multiply: operator.mul,
    cst.FloorDivide: operator.floordiv,
    cst.Divide: operator.truediv,
    cst.Power: operator.pow,
    cst.Modulo: operator.mod,
}

_ORDER: dict[Any, Callable[[Any, Any], bool]] = {
    cst.LessThan: operator.lt,
    cst.LessThanEqual: operator.le,
    cst.GreaterThan: operator.gt,
    cst.GreaterThanEqual: operator.ge,
}


def inherited_attribute(spec: Spec, name: str) -> Value:
    """An attribute neither set nor defined in the source that was read."""
    return _INHERITED.get(name, TOP)


def may_be_set_elsewhere(name: str) -> bool:
    """Attributes that a mixin may set behind our back; `hasattr` is not decided for them."""
    return name not in ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv", "fused_projections")


def arithmetic(op: cst.BaseBinaryOp, left: Value, right: Value) -> Value:
    """Numbers are computed; anything else is something."""
    if isinstance(left, Const) and isinstance(right, Const) and type(op) in _ARITHMETIC:
        if isinstance(left.value, (int, float)) and isinstance(right.value, (int, float)):
            try:
                return Const(_ARITHMETIC[type(op)](left.value, right.value))
            except ArithmeticError:
                return GIVEN
    return GIVEN


def compare(op: cst.BaseCompOp, left: Value, right: Value) -> Value:
    """Outcome of one comparison, `GIVEN` (a bool, unknown which) if it depends on the run."""
    if isinstance(op, (cst.Is, cst.IsNot)):
        return _identity(isinstance(op, cst.Is), left, right)
    if isinstance(left, Const) and isinstance(right, Const):
        if isinstance(op, (cst.Equal, cst.NotEqual)):
            return Const((left.value == right.value) == isinstance(op, cst.Equal))
        if type(op) in _ORDER and isinstance(left.value, (int, float)) and isinstance(right.value, (int, float)):
            return Const(_ORDER[type(op)](left.value, right.value))
    if isinstance(op, (cst.Equal, cst.NotEqual)) and NONE in (left, right):
        other = right if left == NONE else left
        if is_none(other) is False:
            return Const(isinstance(op, cst.NotEqual))
    if isinstance(op, (cst.In, cst.NotIn)):
        if isinstance(right, Empty):
            return Const(isinstance(op, cst.NotIn))
        if isinstance(right, Items) and isinstance(left, Const) and all(isinstance(i, Const) for i in right.items):
            return Const((left in right.items) == isinstance(op, cst.In))
    return GIVEN


def _identity(positive: bool, left: Value, right: Value) -> Value:
    if right == NONE or left == NONE:
        known = is_none(left if right == NONE else right)
        return GIVEN if known is None else Const(known == positive)
    if isinstance(left, Const) and isinstance(right, Const):
        return Const((left.value is right.value) == positive)
    return GIVEN


def torch_call(name: str) -> Value:
    """Result of a torch, math or numpy call."""
    return Opaque(name) if name.startswith("torch.nn.") and name.rsplit(".", 1)[1][:1].isupper() else GIVEN


def _len(interpreter: Interpreter, args: list[Value]) -> Value:
    if args and isinstance(args[0], Items):
        return Const(len(args[0].items))
    return Const(0) if args and isinstance(args[0], Empty) else GIVEN


def _constant(interpreter: Interpreter, args: list[Value]) -> Value:
    return GIVEN


def _list(interpreter: Interpreter, args: list[Value]) -> Value:
    return args[0] if args else Empty()


BUILTIN_CALLS: dict[str, Callable[[Interpreter, list[Value]], Value]] = {
    "len": _len, "list": _list, "tuple": _list, "int": _constant, "float": _constant, "bool": _constant, "str": _constant,
    "max": _constant, "min": _constant, "sum": _constant, "abs": _constant, "round": _constant, "isinstance": _constant,
    "range": _constant, "set": _constant, "sorted": _constant, "enumerate": _constant, "zip": _constant, "super": _constant,
    "iter": _constant, "next": _constant, "any": _constant, "all": _constant, "print": _constant, "dict": _constant,
    "type": _constant, "map": _constant, "slice": _constant, "divmod": _constant, "callable": _constant, "reversed": _list,
    "hasattr": _constant, "getattr": _constant,
}  # fmt: skip
