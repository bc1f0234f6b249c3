"""Walking LibCST trees. LibCST's own visitors look at whitespace, commas and parentheses too; most analyses want only the
code, so these functions skip the layout and are many times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import libcst as cst

from porter.source import lean

lean.install()

Node = TypeVar("Node", bound=cst.CSTNode)

_SKIPPED_FIELDS = frozenset({"lpar", "rpar", "comma", "lbracket", "rbracket", "leading_lines", "header", "footer",
                             "trailing_whitespace", "lines_after_decorators", "semicolon", "equal", "dot"})  # fmt: skip
LAYOUT = (
    cst.BaseParenthesizableWhitespace,
    cst.Comma,
    cst.TrailingWhitespace,
    cst.EmptyLine,
    cst.Newline,
    cst.Comment,
)
_STATEMENTS = (
    cst.BaseStatement,
    cst.BaseSmallStatement,
    cst.BaseSuite,
    cst.AssignTarget,
    cst.Else,
    cst.ExceptHandler,
    cst.Finally,
)
_EXPRESSIONS = (cst.BaseExpression, cst.Parameters, cst.Annotation, cst.Decorator, cst.Arg)
"""What no statement lies below."""

_SIMPLE = (cst.SimpleStatementLine, cst.SimpleStatementSuite, cst.BaseSmallStatement)
"""Statements that no block lies below."""

Key = TypeVar("Key")
Found = TypeVar("Found")


class Table(dict[Key, Found]):
    """Answers that depend on a class only, each found once. LibCST's classes have ABCMeta: asking them is dear."""

    def __init__(self, answer: Callable[[Key], Found]) -> None:
        self.answer = answer

    def __missing__(self, key: Key) -> Found:
        self[key] = found = self.answer(key)
        return found


def _below(kind: type, bases: Iterable[type]) -> bool:
    """`issubclass` for classes that nobody registers with: an ABCMeta asks all subclasses of the base."""
    return not set(kind.__mro__).isdisjoint(bases)


def _find_code_fields(kind: Any) -> tuple[str, ...]:
    """Names of the fields of a node class that hold code rather than layout."""
    return tuple(
        name
        for name in kind.__dataclass_fields__
        if name not in _SKIPPED_FIELDS and not name.startswith("whitespace") and not name.startswith("__")
    )


code_fields: Callable[[Any], tuple[str, ...]] = Table(_find_code_fields).__getitem__


def _find_is_code(kind: Any) -> bool:
    """Whether values of a class are code nodes."""
    return _below(kind, (cst.CSTNode,)) and not _below(kind, LAYOUT)


is_code: Table[type, bool] = Table(_find_is_code)
may_hold_statements: Table[type, bool] = Table(lambda kind: is_code[kind] and not _below(kind, _EXPRESSIONS))


def _find_reader(kind: Any) -> Callable[[Any], tuple[object, ...]] | None:
    """A function from a node to the values of its fields that may hold nodes; None if it has no such field."""
    names = [n for n in code_fields(kind) if kind.__dataclass_fields__[n].type is not str]
    if not names:
        return None
    read = attrgetter(*names)
    return read if len(names) > 1 else lambda node: (read(node),)


_reader: Table[type, Callable[[Any], tuple[object, ...]] | None] = Table(_find_reader)


def children(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Direct children that are code."""
    found: list[cst.CSTNode] = []
    read = _reader[type(node)]
    for value in read(node) if read is not None else ():
        kind = type(value)
        if kind is tuple or kind is list:
            found += [item for item in value if is_code[type(item)]]  # type: ignore[attr-defined]
        elif is_code[kind]:
            found.append(value)  # type: ignore[arg-type]
    return found


def walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """`node` and everything below it that is code, in source order (preorder)."""
    return iter(_flat(node)) if type(node) in _ASKED_OFTEN else _descend(node, is_code)


_ASKED_OFTEN = frozenset({cst.ClassDef, cst.FunctionDef, cst.IndentedBlock})


@lru_cache(maxsize=2048)
def _flat(node: cst.CSTNode) -> list[cst.CSTNode]:
    """`walk` as a list: most analyses ask the same functions, and an edit of a class leaves most of its methods as they are."""
    found: list[Any] = []
    stack: list[Any] = [node]
    pop, push, note = stack.pop, stack.append, found.append
    while stack:
        top = pop()
        kind = type(top)
        if kind in _ASKED_OFTEN and top is not node:
            found += _flat(top)
            continue
        note(top)
        if kind is cst.Name:
            continue  # every second node
        read = _reader[kind]
        if read is None:
            continue
        for value in read(top)[::-1]:
            kind = type(value)
            if kind is tuple or kind is list:
                for item in value[::-1]:  # type: ignore[index]
                    if is_code[type(item)]:
                        push(item)
            elif is_code[kind]:
                push(value)
    return found


def _descend(node: cst.CSTNode, enters: Mapping[type, bool]) -> Iterator[Any]:
    """`node` and what lies below it, as far as `enters` says yes to the classes on the way."""
    stack: list[Any] = [node]
    pop, push = stack.pop, stack.append
    while stack:
        top = pop()
        yield top
        kind = type(top)
        if kind is cst.Name:
            continue  # every second node
        read = _reader[kind]
        if read is None:
            continue
        for value in read(top)[::-1]:
            kind = type(value)
            if kind is tuple or kind is list:
                for item in value[::-1]:  # type: ignore[index]
                    if enters[type(item)]:
                        push(item)
            elif enters[kind]:
                push(value)


def _find_matches(kinds: tuple[type, ...]) -> tuple[Table[type, bool], Table[type, bool]]:
    """For wanted classes: which classes are among them, and which may hold some below."""
    enters = may_hold_statements if all(_below(k, _STATEMENTS) for k in kinds) else is_code
    return Table(lambda kind: _below(kind, kinds)), enters


_matches: Table[tuple[type, ...], tuple[Table[type, bool], Table[type, bool]]] = Table(_find_matches)


def find(node: cst.CSTNode, *kinds: type[Node], where: Callable[[Node], bool] | None = None) -> Iterator[Node]:
    """Nodes of the given classes below `node`, in source order."""
    wanted, enters = _matches[kinds]
    for each in walk(node) if enters is is_code else _descend(node, enters):
        if wanted[type(each)] and (where is None or where(each)):
            yield each


_holds_suites: Table[type, bool] = Table(lambda kind: may_hold_statements[kind] and not _below(kind, _SIMPLE))


def suites(function: cst.FunctionDef) -> Iterator[list[cst.BaseStatement]]:
    """Statement lists of a function, those of functions inside it left out."""
    pending: list[cst.CSTNode] = [function.body]
    while pending:
        node = pending.pop()
        if isinstance(node, cst.FunctionDef):
            continue
        if isinstance(node, cst.IndentedBlock):
            yield list(node.body)
        pending += [child for child in children(node) if _holds_suites[type(child)]]
