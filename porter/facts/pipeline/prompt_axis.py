"""Which variables hold something for each request of a call, and how: followed forward from the call's own inputs.

What a request brings (texts, embeddings, pictures, latents, generators) is followed through the statements. A variable
that it reaches has *rows*: a first axis, or a list, with an entry for each prompt. A number of such rows is a *count*. A
fact about what a request brought (a length, whether it is there) is a *fact*: one call can serve several requests only if
they agree on it. What none of it reaches follows from the settings of the call alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto

import libcst as cst

from porter.facts.pipeline.liveness import names_of
from porter.source.names import dotted
from porter.source.tree import body, children, find, literal_value, self_attribute, walk

_NOT_VALUES = frozenset({"dtype", "device"})
_GROWS = frozenset({"append", "extend", "insert", "update", "add_"})
_CATS = frozenset({"torch·cat", "torch·concat"})
_NUMBERS = frozenset({"ndim", "size", "height", "width"})
"""Attributes of tensors and pictures that are numbers."""
_NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"})
"""Tensor methods that ask their tensor for its type and place only."""


class Share(Flag):
    """What a variable holds of the requests of a call."""

    NOTHING = 0
    FACT = auto()
    COUNT = auto()
    UNSURE = auto()
    """A number that was computed from a count in a way that is not followed."""
    ROWS = auto()
    BRANCHES = auto()
    """Perhaps two or three rows for each prompt: one for each branch of guidance."""


NOTHING = Share.NOTHING


@dataclass(frozen=True, slots=True)
class PromptAxis:
    """What each variable holds after the statements; names that are missing hold nothing. `self.x` is a name, too."""

    shares: Mapping[str, Share] = field(default_factory=dict)

    def of(self, name: str) -> Share:
        return self.shares.get(name, NOTHING)


def prompt_axis(
    statements: Sequence[cst.BaseStatement],
    inputs: Collection[str],
    helpers: Mapping[str, cst.FunctionDef],
) -> PromptAxis:
    """Follow `inputs`, what a request brings, through the statements of a call."""
    walk_ = _Walk(dict.fromkeys(inputs, Share.ROWS), _doubling(helpers))
    while walk_.run(statements):  # a loop may carry a value to a statement ahead of it
        pass
    return PromptAxis(walk_.shares)


def _doubling(helpers: Mapping[str, cst.FunctionDef]) -> frozenset[str]:
    """Methods that put the branches of guidance one behind the other, themselves or through another method."""
    found = {n for n, f in helpers.items() if any(_is_doubled(c) for c in find(f, cst.Call))}
    while True:
        more = {n for n, f in helpers.items() if n not in found and _self_calls(f) & found}
        if not more:
            return frozenset(found)
        found |= more


def _self_calls(node: cst.CSTNode) -> set[str]:
    return {n for c in find(node, cst.Call) if (n := self_attribute(c.func)) is not None}


def _is_doubled(call: cst.Call) -> bool:
    """`torch.cat([a, b])` or `torch.cat([a] * 2)` along the first axis."""
    if not isinstance(call.func, cst.Name) or call.func.value not in _CATS or not call.args:
        return False
    if any(_integer(a.value) != 0 for a in call.args[1:]):
        return False
    parts = call.args[0].value
    if isinstance(parts, cst.BinaryOperation):
        return (_integer(parts.right) or 0) > 1
    return isinstance(parts, (cst.List, cst.Tuple)) and len(parts.elements) > 1


def _integer(node: cst.BaseExpression) -> int | None:
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        inner = _integer(node.expression)
        return None if inner is None else -inner
    value = literal_value(node.value) if isinstance(node, cst.Integer) else None
    return value if isinstance(value, int) else None


class _Walk:
    """One pass over statements after the other, until no variable holds more than before."""

    def __init__(self, shares: dict[str, Share], doubling: frozenset[str]) -> None:
        self.shares = shares
        self.doubling = doubling
        self.changed = False

    def run(self, statements: Iterable[cst.BaseStatement]) -> bool:
        """Whether anything was learnt."""
        self.changed = False
        for each in statements:
            self._statement(each, NOTHING)
        return self.changed

    def _statement(self, node: cst.CSTNode, under: Share) -> None:
        """`under`: what the tests that lead here say about the requests."""
        if isinstance(node, cst.If):
            inner = under | _as_fact(self.share(node.test))
            for each in body(node):
                self._statement(each, inner)
            if isinstance(node.orelse, cst.If):
                self._statement(node.orelse, inner)
            elif node.orelse is not None:
                for each in body(node.orelse):
                    self._statement(each, inner)
        elif isinstance(node, (cst.For, cst.While, cst.With, cst.Try)):
            self._block(node, under)
        elif isinstance(node, cst.SimpleStatementLine):
            for small in node.body:
                self._small(small, under)

    def _block(self, node: cst.For | cst.While | cst.With | cst.Try, under: Share) -> None:
        if isinstance(node, cst.For):
            self._bind(node.target, node.iter, under)
        elif isinstance(node, cst.While):
            under |= _as_fact(self.share(node.test))
        parts = [node, getattr(node, "orelse", None), *getattr(node, "handlers", ()), getattr(node, "finalbody", None)]
        for part in parts:
            for each in body(part) if part is not None else ():
                self._statement(each, under)

    def _small(self, node: cst.BaseSmallStatement, under: Share) -> None:
        if isinstance(node, cst.Assign):
            for target in node.targets:
                self._bind(target.target, node.value, under)
        elif isinstance(node, cst.AnnAssign) and node.value is not None:
            self._bind(node.target, node.value, under)
        elif isinstance(node, cst.AugAssign):
            self._bind(node.target, cst.BinaryOperation(node.target, cst.Add(), node.value), under)
        elif isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
            call = node.value
            if isinstance(call.func, cst.Attribute) and call.func.attr.value in _GROWS:
                self._add(_root(call.func.value), under | _in_rows(self._all(a.value for a in call.args)))

    def _bind(self, target: cst.BaseExpression, value: cst.BaseExpression, under: Share) -> None:
        if isinstance(target, (cst.Tuple, cst.List)):
            self._unpack(target, value, under)
        elif isinstance(target, (cst.Subscript, cst.Attribute)) and self_attribute(target) is None:
            self._add(_root(target), under | _in_rows(self.share(value)))
        else:
            self._add(_root(target), under | self.share(value))

    def _unpack(self, target: cst.Tuple | cst.List, value: cst.BaseExpression, under: Share) -> None:
        elements = [e.value for e in target.elements]
        if isinstance(value, (cst.Tuple, cst.List)) and len(value.elements) == len(elements):
            for one, part in zip(elements, value.elements, strict=True):
                self._bind(one, part.value, under)
            return
        share = self.share(value)
        sizes = isinstance(value, cst.Attribute) and value.attr.value == "shape" and share & Share.COUNT
        for index, one in enumerate(elements):
            for name in names_of(one):
                self._add(name, under | (Share.FACT if sizes and index else share))

    def _add(self, name: str | None, share: Share) -> None:
        before = self.shares.get(name or "", NOTHING)
        if name is not None and before | share != before:
            self.shares[name] = before | share
            self.changed = True

    def _all(self, nodes: Iterable[cst.CSTNode]) -> Share:
        found = NOTHING
        for node in nodes:
            found |= self.share(node)
        return found

    def share(self, node: cst.CSTNode) -> Share:
        """What an expression holds."""
        if isinstance(node, cst.Name):
            return self.shares.get(node.value, NOTHING)
        if isinstance(node, cst.Attribute):
            return self._attribute(node)
        if isinstance(node, cst.Subscript):
            return self._subscript(node)
        if isinstance(node, cst.Call):
            return self._call(node)
        if isinstance(node, cst.BinaryOperation):
            return self._binary(node)
        if isinstance(node, (cst.Comparison, cst.FormattedString)):
            return _as_fact(self._all(children(node)))
        if isinstance(node, cst.UnaryOperation):
            inner = self.share(node.expression)
            return _as_fact(inner) if isinstance(node.operator, cst.Not) else inner
        if isinstance(node, cst.IfExp):
            return _as_fact(self.share(node.test)) | self.share(node.body) | self.share(node.orelse)
        if isinstance(node, cst.Arg):
            return self.share(node.value)
        if isinstance(node, (cst.ListComp, cst.GeneratorExp, cst.SetComp, cst.DictComp, cst.Lambda)):
            found = _in_rows(self._all(n for n in walk(node) if isinstance(n, cst.Name)))
            doubled = found & Share.ROWS and any(_is_doubled(c) for c in find(node, cst.Call))
            return found | Share.BRANCHES if doubled else found
        return self._all(children(node))

    def _attribute(self, node: cst.Attribute) -> Share:
        own = self_attribute(node)
        if own is not None:
            return self.shares.get(f"self.{own}", NOTHING)
        inner = self.share(node.value)
        if node.attr.value in _NOT_VALUES:
            return NOTHING
        if node.attr.value == "shape":
            return Share.COUNT if inner & Share.ROWS else inner
        return _as_fact(inner) if node.attr.value in _NUMBERS else inner

    def _subscript(self, node: cst.Subscript) -> Share:
        inner = self.share(node.value)
        index = node.slice[0].slice
        if isinstance(node.value, cst.Attribute) and node.value.attr.value == "shape" and inner & Share.COUNT:
            start = index.value if isinstance(index, cst.Index) else getattr(index, "lower", None)
            place = _integer(start) if start is not None else 0
            return Share.COUNT if place == 0 or place is None else Share.FACT
        return inner | _as_fact(self._all(node.slice))

    def _binary(self, node: cst.BinaryOperation) -> Share:
        left, right = self.share(node.left), self.share(node.right)
        found = left | right
        if (
            isinstance(node.operator, cst.Add)
            and all(_is_list(n) for n in (node.left, node.right))
            and found & Share.ROWS
        ):
            return _in_rows(found) | Share.BRANCHES
        if not found & Share.COUNT:
            return found
        lists = any(isinstance(n, (cst.List, cst.Tuple)) for n in (node.left, node.right))
        if lists or found & Share.ROWS:
            return _in_rows(found)
        plain = isinstance(node.operator, cst.Multiply) and not (left & Share.COUNT and right & Share.COUNT)
        return found if plain else found & ~Share.COUNT | Share.UNSURE

    def _call(self, node: cst.Call) -> Share:
        name = node.func.value if isinstance(node.func, cst.Name) else None
        given = self._all(node.args)
        if name == "len":
            return Share.COUNT if given & Share.ROWS else _as_fact(given)
        if name in ("isinstance", "hasattr", "callable", "type"):
            return _as_fact(given)
        own = self_attribute(node.func)
        if isinstance(node.func, cst.Attribute) and own is None:
            if node.func.attr.value == "size" and node.args:
                rows = self.share(node.func.value) & Share.ROWS
                return (Share.COUNT if _integer(node.args[0].value) == 0 else Share.FACT) if rows else NOTHING
            if node.func.attr.value == "item":
                return _as_fact(self.share(node.func.value))
            if node.func.attr.value not in _NEW:
                given |= self.share(node.func.value)
        found = _in_rows(given)
        if found & Share.ROWS and (_is_doubled(node) or own in self.doubling or _repeats(node)):
            found |= Share.BRANCHES
        return found


def _is_list(node: cst.BaseExpression) -> bool:
    called = isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "list"
    return called or isinstance(node, (cst.List, cst.ListComp))


def _repeats(node: cst.Call) -> bool:
    """`x.repeat(2, ...)` or `x.repeat((2,) + ...)`."""
    if not isinstance(node.func, cst.Attribute) or node.func.attr.value != "repeat" or not node.args:
        return False
    first = node.args[0].value
    while isinstance(first, (cst.BinaryOperation, cst.Tuple)):
        if isinstance(first, cst.Tuple) and not first.elements:
            return False
        first = first.left if isinstance(first, cst.BinaryOperation) else first.elements[0].value
    return (_integer(first) or 0) > 1


def _in_rows(share: Share) -> Share:
    """What a value holds that was made from others: as many rows as a count says."""
    if share & (Share.COUNT | Share.UNSURE):
        return share & ~(Share.COUNT | Share.UNSURE) | Share.ROWS
    return share


def _as_fact(share: Share) -> Share:
    return Share.FACT if share else NOTHING


def _root(node: cst.BaseExpression) -> str | None:
    """The variable that an assignment to `node` changes: `x`, `x[...]`, `x.y`, or `self.x`."""
    while isinstance(node, (cst.Subscript, cst.Attribute)):
        own = self_attribute(node)
        if own is not None:
            return f"self.{own}"
        node = node.value
    return dotted(node)
