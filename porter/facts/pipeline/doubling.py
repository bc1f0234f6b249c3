"""Which variables hold both guidance branches at once.

Batched guidance concatenates the inputs of both branches, runs the denoiser once and cuts its result in two. Here the
concatenations are followed forward, under the assumption that guidance is on, to the variables the loop reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.pipeline.liveness import names_of, uses
from porter.model import Unknown
from porter.source.tree import body, find, own_parameters, same, self_attribute, strip_docstring

Kind = Literal["tensor", "list", "dict"]
ELEMENTWISE = frozenset({"to", "float", "half", "bool", "int", "long", "type", "contiguous", "clone", "detach"})
RESHAPES = frozenset({"view", "reshape", "flatten", "squeeze"})
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})


class Doubled(Struct, frozen=True):
    """Two equally long halves along axis `dim`, one per branch; `equal` if they are the same.

    A list or dict holds such tensors (a dict may hold None as well).
    """

    dim: int = 0
    equal: bool = False
    kind: Kind = "tensor"


Value = Doubled | Unknown | None
"""None: one branch's value, or none at all."""
Functions = Mapping[str, cst.FunctionDef]


def doubled_names(
    statements: Sequence[cst.BaseStatement], conditions: Sequence[cst.BaseExpression], helpers: Functions
) -> dict[str, Doubled | Unknown]:
    """Variables that hold both branches after the statements, when one of `conditions` (all the same test) holds."""
    walk = _Walk(tuple(conditions), helpers)
    walk.run(statements, guided=False)
    return {n: v for n, v in walk.values.items() if v is not None}


def conditions_of(condition: cst.BaseExpression, statements: Sequence[cst.BaseStatement]) -> list[cst.BaseExpression]:
    """The test itself, and other spellings of it: what its variable was assigned, and variables assigned the same."""
    found = [condition]
    for _ in range(2):
        for each in statements:
            if isinstance(each, cst.SimpleStatementLine) and isinstance(each.body[0], cst.Assign):
                target, value = each.body[0].targets[0].target, each.body[0].value
                known = [any(same(f, x) for f in found) for x in (target, value)]
                if isinstance(target, cst.Name) and known == [True, False]:
                    found.append(value)
                elif isinstance(target, cst.Name) and known == [False, True]:
                    found.append(target)
    return found


def halved(node: cst.BaseExpression) -> cst.BaseExpression:
    """An expression that repeats its value for two branches, without the repetition."""
    return node.visit(_Once())  # type: ignore[return-value]


def concatenated(node: cst.BaseExpression) -> tuple[cst.BaseExpression, cst.BaseExpression, int] | None:
    """First part, second part and axis of `torch.cat([a, b], dim)` or `torch.cat([a] * 2)`."""
    if not isinstance(node, cst.Call) or not isinstance(node.func, cst.Name) or not node.args:
        return None
    if node.func.value not in ("torch·cat", "torch·concat"):
        return None
    parts, dim = node.args[0].value, 0
    for arg in node.args[1:]:
        value = _integer(arg.value)
        if value is None:
            return None
        dim = value
    if isinstance(parts, cst.BinaryOperation) and isinstance(parts.operator, cst.Multiply):
        if _integer(parts.right) == 2 and isinstance(parts.left, cst.List) and len(parts.left.elements) == 1:
            only = parts.left.elements[0].value
            return only, only, dim
    if isinstance(parts, (cst.List, cst.Tuple)) and len(parts.elements) == 2:
        return parts.elements[0].value, parts.elements[1].value, dim
    return None


def _integer(node: cst.BaseExpression) -> int | None:
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        inner = _integer(node.expression)
        return -inner if inner is not None else None
    return node.evaluated_value if isinstance(node, cst.Integer) else None


def _repeats_twice(node: cst.Call) -> bool:
    """`x.repeat(2, 1, ...)`."""
    if not isinstance(node.func, cst.Attribute) or node.func.attr.value != "repeat":
        return False
    counts = [_integer(a.value) for a in node.args]
    return bool(counts) and counts[0] == 2 and all(c == 1 for c in counts[1:])


def _by_row(node: cst.Call) -> bool:
    """A call that keeps rows apart: `torch.where`, an `einsum` whose parts share a first axis, a VAE's `encode`."""
    if isinstance(node.func, cst.Attribute) and node.func.attr.value == "encode" and self_attribute(node.func.value):
        return True
    if not isinstance(node.func, cst.Name) or not node.args:
        return False
    if node.func.value == "torch·where":
        return True
    text = node.args[0].value
    if node.func.value != "torch·einsum" or not isinstance(text, cst.SimpleString):
        return False
    parts = str(text.evaluated_value).replace(" ", "").replace("->", ",").split(",")
    return len({p[:1] for p in parts}) == 1


class _Once(cst.CSTTransformer):
    def leave_Call(self, original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        parts = concatenated(updated)
        if parts is not None and same(parts[0], parts[1]):
            return parts[0]
        if _repeats_twice(updated):
            return updated.func.value  # type: ignore[attr-defined]
        return updated

    def leave_BinaryOperation(self, original: cst.BinaryOperation, updated: cst.BinaryOperation) -> cst.BaseExpression:
        if isinstance(updated.operator, cst.Multiply):
            for one, other in ((updated.left, updated.right), (updated.right, updated.left)):
                if _integer(one) == 2 and isinstance(other, cst.Name):
                    return other
        return updated


class _Walk:
    """Forward propagation through statements; `guided` while inside a branch that runs only with guidance."""

    def __init__(self, conditions: tuple[cst.BaseExpression, ...], helpers: Functions, depth: int = 0) -> None:
        self.conditions = conditions
        self.helpers = helpers
        self.depth = depth
        self.values: dict[str, Value] = {}
        self.returned: list[list[Value]] = []

    def run(self, statements: Sequence[cst.BaseStatement], guided: bool) -> None:
        for each in statements:
            if isinstance(each, cst.If):
                self._if(each, guided)
            elif isinstance(each, (cst.For, cst.With)):
                self.run(body(each), guided)
            elif isinstance(each, cst.SimpleStatementLine):
                for small in each.body:
                    if isinstance(small, cst.Assign):
                        for target in small.targets:
                            self._bind(target.target, small.value, guided)
                    elif isinstance(small, cst.Return) and small.value is not None:
                        self.returned.append(self._parts(small.value, guided))

    def _if(self, node: cst.If, guided: bool) -> None:
        test, positive = node.test, True
        if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
            test, positive = test.expression, False
        if self.is_condition(test):
            if positive:
                self.run(body(node), True)
            elif isinstance(node.orelse, cst.Else):
                self.run(body(node.orelse), True)
            return
        start = dict(self.values)
        self.run(body(node), guided)
        then, self.values = self.values, dict(start)
        if isinstance(node.orelse, cst.If):
            self._if(node.orelse, guided)
        elif node.orelse is not None:
            self.run(body(node.orelse), guided)
        for name in set(then) | set(self.values):
            self.values[name] = self._either(then.get(name), self.values.get(name))

    @staticmethod
    def _either(one: Value, other: Value) -> Value:
        if one is None or other is None:
            return one if one is not None else other
        return one if one == other else Unknown("its halves lie differently on different paths")

    def is_condition(self, test: cst.BaseExpression) -> bool:
        return any(same(test, c) for c in self.conditions)

    def _bind(self, target: cst.BaseExpression, value: cst.BaseExpression, guided: bool) -> None:
        if isinstance(target, cst.Name):
            self.values[target.value] = self.kind(value, guided)
            return
        if isinstance(target, (cst.Tuple, cst.List)):
            parts = self._parts(value, guided)
            if len(parts) != len(target.elements):
                parts = [parts[0] if len(parts) == 1 else None] * len(target.elements)
            for element, part in zip(target.elements, parts, strict=True):
                for name in names_of(element.value):
                    self.values[name] = part
            return
        if isinstance(target, cst.Subscript) and isinstance(target.value, cst.Name):  # mapping["key"] = value
            kind = self.kind(value, guided)
            if kind is not None:
                self.values[target.value.value] = replace(kind, kind="dict") if isinstance(kind, Doubled) else kind

    def _parts(self, value: cst.BaseExpression, guided: bool) -> list[Value]:
        if isinstance(value, cst.Tuple):
            return [self.kind(e.value, guided) for e in value.elements]
        if isinstance(value, cst.Call) and (name := self_attribute(value.func)) in self.helpers:
            return self._helper(self.helpers[name or ""], value, guided)
        return [self.kind(value, guided)]

    def _helper(self, function: cst.FunctionDef, call: cst.Call, guided: bool) -> list[Value]:
        names = [p.name.value for p in own_parameters(function)]
        inner = _Walk((), self.helpers, self.depth + 1)
        conditions: list[cst.BaseExpression] = []
        for position, arg in enumerate(call.args):
            name = arg.keyword.value if arg.keyword else names[position] if position < len(names) else ""
            if self.is_condition(arg.value):
                conditions.append(cst.Name(name))
            inner.values[name] = self.kind(arg.value, guided)
        if self.depth > 3 or not (conditions or any(v is not None for v in inner.values.values())):
            return [None]
        inner.conditions = tuple(conditions)
        inner.run(strip_docstring(body(function)), False)
        if not inner.returned:
            return [None]
        width = len(inner.returned[0])
        if any(len(r) != width for r in inner.returned):
            return [Unknown(f"{function.name.value} returns different numbers of values")]
        merged = inner.returned[0]
        for more in inner.returned[1:]:
            merged = [self._either(a, b) for a, b in zip(merged, more, strict=True)]
        return merged

    def kind(self, node: cst.BaseExpression, guided: bool) -> Value:
        """What an expression holds."""
        if isinstance(node, cst.Name):
            return self.values.get(node.value)
        if isinstance(node, cst.Attribute):
            if node.attr.value in ATTRIBUTES:
                return None
            return self.kind(node.value, guided) if isinstance(node.value, cst.Call) else self._reading(node)
        if isinstance(node, cst.Call):
            return self._call(node, guided)
        if isinstance(node, cst.IfExp):
            if self.is_condition(node.test):
                return self.kind(node.body, True)
            return self._either(self.kind(node.body, guided), self.kind(node.orelse, guided))
        if isinstance(node, (cst.BinaryOperation, cst.Comparison, cst.UnaryOperation)):
            operands = [node.expression] if isinstance(node, cst.UnaryOperation) else [node.left]
            operands += [node.right] if isinstance(node, cst.BinaryOperation) else []
            operands += [c.comparator for c in node.comparisons] if isinstance(node, cst.Comparison) else []
            found = [k for o in operands if (k := self.kind(o, guided)) is not None]
            return self._all(found)
        if isinstance(node, cst.Dict):
            found = [k for e in node.elements if (k := self.kind(e.value, guided)) is not None]
            return self._container(found, "dict")
        if isinstance(node, cst.List):
            found = [k for e in node.elements if (k := self.kind(e.value, guided)) is not None]
            return self._container(found, "list")
        if isinstance(node, cst.ListComp):
            return self._container([k for k in [self.kind(node.elt, guided)] if k is not None], "list")
        if isinstance(node, cst.Subscript):
            return self._subscript(node, guided)
        return self._reading(node)

    def _all(self, found: list[Doubled | Unknown]) -> Value:
        if not found:
            return None
        first = found[0]
        for each in found:
            if isinstance(each, Unknown):
                return each
            if isinstance(first, Doubled) and each.dim != first.dim:
                return Unknown("its halves lie along different axes")
        assert isinstance(first, Doubled)
        return replace(first, equal=all(isinstance(f, Doubled) and f.equal for f in found))

    def _container(self, found: list[Doubled | Unknown], kind: Kind) -> Value:
        merged = self._all(found)
        return replace(merged, kind=kind) if isinstance(merged, Doubled) else merged

    def _reading(self, node: cst.BaseExpression) -> Value:
        """An expression of another shape: fine if it reads nothing that is doubled."""
        name = next((n for n in sorted(reads_whole(node)) if self.values.get(n) is not None), None)
        return None if name is None else Unknown(f"what becomes of {name}, which holds both branches, is not followed")

    def _call(self, node: cst.Call, guided: bool) -> Value:
        if (name := self_attribute(node.func)) in self.helpers:
            parts = self._helper(self.helpers[name or ""], node, guided)
            return parts[0] if len(parts) == 1 else None
        if same(node.func, cst.Name("len")):
            return None
        joined = concatenated(node)
        if joined is not None:
            inner = [self.kind(p, guided) for p in joined[:2]]
            if all(k is None for k in inner):
                return Doubled(joined[2], same(joined[0], joined[1])) if guided else None
            if all(isinstance(k, Doubled) and k.dim != joined[2] for k in inner):
                return self._all([k for k in inner if k is not None])
        if _by_row(node):
            return self._all([k for a in node.args if (k := self.kind(a.value, guided)) is not None])
        if isinstance(node.func, cst.Attribute):
            receiver = self.kind(node.func.value, guided)
            if receiver is None and guided and _repeats_twice(node):
                return Doubled(equal=True)
            if isinstance(receiver, Doubled) and receiver.kind == "tensor":
                kept = self._method(node, node.func.attr.value, receiver)
                if kept is not None:
                    return kept
            if isinstance(receiver, Unknown):
                return receiver
        return self._reading(node)

    def _method(self, node: cst.Call, name: str, receiver: Doubled) -> Value:
        if name in ELEMENTWISE or (name in RESHAPES and receiver.dim == 0):
            return receiver
        if name == "unsqueeze" and node.args:
            axis = _integer(node.args[0].value)
            if axis is None or -1 < axis <= receiver.dim:
                return replace(receiver, dim=receiver.dim + 1) if axis is not None else None
            return receiver
        if name == "repeat" and receiver.dim == 0:
            first = _integer(node.args[0].value) if node.args else None
            return receiver if receiver.equal or first == 1 else None
        if name == "repeat_interleave":
            return receiver
        return None

    def _subscript(self, node: cst.Subscript, guided: bool) -> Value:
        owner = self.kind(node.value, guided)
        if owner is None:
            return None
        first = node.slice[0].slice
        if isinstance(owner, Doubled) and owner.kind != "tensor":
            return owner if isinstance(first, cst.Slice) else replace(owner, kind="tensor")
        whole = isinstance(first, cst.Slice) and first.lower is None and first.upper is None
        if isinstance(owner, Doubled) and owner.dim == 0 and whole and len(node.slice) > 1:
            return owner
        return Unknown("a part of what holds both branches is taken")


def reads_whole(node: cst.CSTNode) -> frozenset[str]:
    """Names whose values, and not only their type or place, an expression or statement reads."""
    parts: set[int] = set()
    for each in find(node, cst.Attribute):
        if each.attr.value in ATTRIBUTES - {"shape"} and isinstance(each.value, cst.Name):
            parts.add(id(each.value))
    if not parts:
        return uses(node)
    names = [n for n in find(node, cst.Name) if id(n) not in parts]
    return uses(node) & {n.value for n in names}
