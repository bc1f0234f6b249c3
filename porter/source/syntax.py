"""Walking Python's own syntax trees, by tables of node classes: `ast.walk` asks every field of every node."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from porter.source.walking import Table

_WITHOUT_NODES = frozenset({"ctx", "id", "attr", "arg", "name", "asname", "rest", "module", "level", "kind", "op", "ops",
                            "conversion", "simple", "is_async", "type_comment", "tag", "kwd_attrs"})  # fmt: skip
_LEAVES = (ast.Constant, ast.MatchSingleton, ast.Global, ast.Nonlocal)


def _find_fields(kind: Any) -> tuple[str, ...]:
    """Names of the fields of a node class that may hold nodes."""
    return () if issubclass(kind, _LEAVES) else tuple(f for f in kind._fields if f not in _WITHOUT_NODES)


_fields: Table[type, tuple[str, ...]] = Table(_find_fields)


def children(node: ast.AST) -> list[Any]:
    """Direct children in the order of their fields; operators and contexts are left out."""
    found: list[Any] = []
    for name in _fields[type(node)]:
        value = getattr(node, name)
        if type(value) is list:
            found += [item for item in value if item is not None] if None in value else value
        elif value is not None:
            found.append(value)
    return found


def walk(node: ast.AST) -> Iterator[Any]:
    """`node` and everything below it, in no particular order."""
    stack = [node]
    pop = stack.pop
    while stack:
        top = pop()
        yield top
        stack += children(top)
