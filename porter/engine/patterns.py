"""Patterns: code with metavariables, matched against the tree by structure.

Layout, comments, quotes and outer parentheses don't count; keyword arguments match in any order. What a pattern leaves
out of a definition's header (annotations, decorators, bases) it doesn't ask about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias, cast

import libcst as cst
from msgspec import Struct, field

from porter.engine.text import FIELD, MANY, ONE, check, decode, encode, resolve, stored_names
from porter.source.names import DOT
from porter.source.tree import code_fields, same, walk
from porter.source.walking import is_code

Capture: TypeAlias = cst.CSTNode | tuple[cst.CSTNode, ...]
Captures: TypeAlias = dict[str, Capture]
_SUITES = (cst.IndentedBlock, cst.SimpleStatementSuite)
_UNASKED = frozenset({"annotation", "returns", "decorators", "type_parameters", "bases", "keywords"})


class Pattern(Struct, frozen=True, dict=True):
    """A code pattern; parsed when first used."""

    text: str
    symbols: Mapping[str, str] = field(default_factory=dict)
    wants_statements: bool = False

    @cached_property
    def nodes(self) -> tuple[cst.CSTNode, ...]:
        """One expression, or statements."""
        kind = check(self.text, self.symbols)[2]
        if kind == "expression" and not self.wants_statements:
            node: Any = cst.parse_expression(encode(self.text.strip()))
            return (resolve(node, self.symbols, stored_names(self.text.strip())),)
        return tuple(resolve(cst.parse_module(encode(self.text)), self.symbols, stored_names(self.text)).body)

    @property
    def is_statements(self) -> bool:
        return isinstance(self.nodes[0], cst.BaseStatement)

    @cached_property
    def root(self) -> type[cst.CSTNode]:
        """Class of the node at which a match starts; for a simple statement, of the statement itself."""
        first = self.nodes[0]
        return type(first.body[0]) if isinstance(first, cst.SimpleStatementLine) else type(first)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Absolute names and attributes without which no definition can match."""
        found: dict[str, None] = {}
        for top in self.nodes:
            for node in walk(top):
                if isinstance(node, cst.Name) and DOT in node.value:
                    found[node.value] = None
                elif isinstance(node, cst.Attribute) and decode(node.attr.value) is None:
                    found["." + node.attr.value] = None
        return tuple(found)

    def match(
        self, node: cst.CSTNode, bound: Mapping[str, Capture] | None = None, *, open_call: bool = False
    ) -> Captures | None:
        """Captures if `node` is an instance of this one-node pattern. `open_call`: it may have more keywords."""
        if len(self.nodes) != 1:
            return None
        return _node(self.nodes[0], node, dict(bound or {}), open_call)

    def match_run(
        self, block: Sequence[cst.CSTNode], start: int, bound: Mapping[str, Capture] | None = None
    ) -> tuple[Captures, int] | None:
        """Captures and number of statements if the pattern's statements stand in `block` from `start` on."""
        for found, taken in _prefix(self.nodes, block[start:], dict(bound or {})):
            return found, taken
        return None


def _variable(node: cst.CSTNode) -> tuple[str, str] | None:
    """The metavariable this pattern node is."""
    kind, pattern = type(node), cast(Any, node)  # LibCST's classes are slow to ask with `isinstance`
    if kind is cst.Name:
        return decode(pattern.value)
    if kind is cst.SimpleStatementLine and len(pattern.body) == 1 and type(pattern.body[0]) is cst.Expr:
        inner = pattern.body[0].value
    elif (kind is cst.Arg and not pattern.keyword and not pattern.star) or kind is cst.Element:
        inner = pattern.value
    elif kind is cst.Param:
        inner = pattern.name
    else:
        return None
    return decode(inner.value) if type(inner) is cst.Name else None


def _bind(name: str, value: Capture, bound: Captures) -> Captures | None:
    if name == "_":
        return bound
    if name not in bound:
        return {**bound, name: value}
    before = bound[name]
    if isinstance(before, tuple) or isinstance(value, tuple):
        left: tuple[Any, ...] = before if isinstance(before, tuple) else (before,)
        right: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        equal = len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))
    else:
        equal = same(before, value)
    return bound if equal else None


def _node(pattern: cst.CSTNode, node: cst.CSTNode, bound: Captures, open_call: bool = False) -> Captures | None:
    kind: Any = type(pattern)
    if kind is cst.Name:
        variable = decode(pattern.value)  # type: ignore[attr-defined]
        if variable is not None and variable[0] in (ONE, FIELD):
            return _bind(variable[1], node, bound) if isinstance(node, cst.BaseExpression) else None
        return bound if type(node) is cst.Name and node.value == pattern.value else None  # type: ignore[attr-defined]
    if kind is cst.SimpleStatementLine and isinstance(node, cst.BaseStatement):
        variable = _variable(pattern)
        if variable is not None and variable[0] == ONE and not _is_expression_line(node):
            return _bind(variable[1], node, bound)
    if kind in _SUITES and type(node) in _SUITES:
        return _sequence(_suite(pattern), _suite(node), bound)  # type: ignore[arg-type]
    if kind is not type(node) or (kind is cst.Arg and pattern.star != node.star):  # type: ignore[attr-defined]
        return None
    if isinstance(pattern, cst.SimpleString):
        return bound if pattern.evaluated_value == node.evaluated_value else None  # type: ignore[attr-defined]
    if kind is cst.Call:
        inner = _node(pattern.func, node.func, bound)  # type: ignore[attr-defined]
        return None if inner is None else _arguments(pattern.args, node.args, inner, open_call)  # type: ignore[attr-defined]
    for name in code_fields(kind):
        want, have = getattr(pattern, name), getattr(node, name)
        found = _field(name, want, have, bound)
        if found is None:
            return None
        bound = found
    return bound


def _field(name: str, want: Any, have: Any, bound: Captures) -> Captures | None:  # noqa: ANN401
    if is_code[type(want)]:
        return _node(want, have, bound) if is_code[type(have)] else None
    if isinstance(want, cst.CSTNode):
        return bound  # layout
    if isinstance(want, (list, tuple)):
        if not want and name in _UNASKED:
            return bound
        return _sequence(want, have, bound) if isinstance(have, (list, tuple)) else None
    if want is None:
        return bound if have is None or name in _UNASKED else None
    if isinstance(want, str) and name not in ("indent", "default_indent"):
        return bound if isinstance(have, str) and want.strip() == have.strip() else None
    return bound


def _is_expression_line(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1 and isinstance(node.body[0], cst.Expr)


def _suite(suite: cst.BaseSuite) -> Sequence[cst.CSTNode]:
    if isinstance(suite, cst.SimpleStatementSuite):
        return [cst.SimpleStatementLine([s]) for s in suite.body]
    return suite.body  # type: ignore[return-value]


def _sequence(patterns: Sequence[Any], nodes: Sequence[Any], bound: Captures) -> Captures | None:
    """All of `nodes`, in order."""
    if not any((v := _variable(p)) and v[0] == MANY for p in patterns):  # the common case needs no backtracking
        if len(patterns) != len(nodes):
            return None
        for want, have in zip(patterns, nodes):
            found = _node(want, have, bound)
            if found is None:
                return None
            bound = found
        return bound
    for found, taken in _prefix(patterns, nodes, bound):
        if taken == len(nodes):
            return found
    return None


def _prefix(patterns: Sequence[Any], nodes: Sequence[Any], bound: Captures) -> Iterator[tuple[Captures, int]]:
    """Every way in which the patterns match a prefix of the nodes, shortest first; a final `$$xs` takes all."""
    if not patterns:
        yield bound, 0
        return
    first, rest = patterns[0], patterns[1:]
    variable = _variable(first)
    if variable is not None and variable[0] == MANY:
        for taken in range(len(nodes) + 1) if rest else (len(nodes),):
            found = _bind(variable[1], tuple(nodes[:taken]), bound)
            if found is not None:
                for after, more in _prefix(rest, nodes[taken:], found):
                    yield after, taken + more
        return
    if nodes:
        found = _node(first, nodes[0], bound)
        if found is not None:
            for after, more in _prefix(rest, nodes[1:], found):
                yield after, 1 + more


def _arguments(
    patterns: Sequence[cst.Arg], args: Sequence[cst.Arg], bound: Captures, open_call: bool
) -> Captures | None:
    keywords = {a.keyword.value: a for a in args if a.keyword is not None}
    positional = [a for a in args if a.keyword is None and a.star != "**"]
    left = [a for a in args if a.star == "**"]
    wanted: list[cst.Arg] = []
    for want in patterns:
        if want.keyword is None:
            wanted.append(want)
            continue
        have = keywords.pop(want.keyword.value, None)
        found = _node(want.value, have.value, bound) if have is not None else None
        if found is None:
            return None
        bound = found
    left = [*[a for a in args if a.keyword is not None and a.keyword.value in keywords], *left]
    many = [v[1] for p in wanted if (v := _variable(p)) and v[0] == MANY]
    if left and not many and not open_call:
        return None
    found = _sequence(wanted, positional, bound)
    if found is not None and many and left:
        mine = found.get(many[-1], ())
        found = {**found, many[-1]: (*(mine if isinstance(mine, tuple) else (mine,)), *left)}
    return found
