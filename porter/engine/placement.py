"""Where structural edits go, and what is there already. Pure functions over one class or function."""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.engine.index import Index
from porter.engine.text import CodeError
from porter.source.names import DOT
from porter.source.tree import body, find, normal, self_attribute, strip_docstring

_ITEMS = (cst.Arg, cst.Element, cst.DictElement, cst.Param, cst.Decorator, cst.BaseStatement, cst.AssignTarget)


class Clash(Exception):
    """An `ensure_*` found what it wants to ensure, with another value."""


def parent_item(node: cst.CSTNode, index: Index) -> cst.CSTNode:
    """The list item to take out if `node` is to go: itself, or the argument, element or decorator it fills."""
    if isinstance(node, _ITEMS):
        return node
    above = index.parent(node)
    if isinstance(above, (cst.Arg, cst.Element, cst.Decorator)) and not isinstance(node, cst.BaseSmallStatement):
        return above
    if isinstance(node, cst.BaseSmallStatement) and isinstance(
        above, (cst.SimpleStatementLine, cst.SimpleStatementSuite)
    ):
        return node
    if isinstance(above, cst.Expr):
        return index.statement(above) or above
    raise CodeError(f"a {type(node).__name__} can't be removed: it is not a statement or an item of a list")


def assigned(scope: cst.ClassDef | cst.FunctionDef, target: str) -> cst.BaseExpression | None:
    """The value last assigned to `name` or `self.name` directly in a body (nested blocks of a function count)."""
    wanted, found = normal(cst.parse_expression(target)), None
    nodes: Any = find(scope, cst.Assign, cst.AnnAssign) if isinstance(scope, cst.FunctionDef) else _direct(scope)
    for node in nodes:
        targets = targets_of(node)
        if any(normal(t) == wanted for t in targets):
            found = node.value
    return found


def targets_of(node: Any) -> list[cst.BaseExpression]:
    """What an assignment or a loop sets."""
    return [t.target for t in node.targets] if isinstance(node, cst.Assign) else [node.target]


def value_of(line: cst.SimpleStatementLine) -> cst.BaseExpression:
    """The value a one-assignment line assigns."""
    small: Any = line.body[0]
    return small.value


def _direct(owner: cst.ClassDef) -> list[cst.Assign | cst.AnnAssign]:
    return [
        small
        for line in body(owner)
        if isinstance(line, cst.SimpleStatementLine)
        for small in line.body
        if isinstance(small, (cst.Assign, cst.AnnAssign))
    ]


def leading_anchor(owner: cst.ClassDef) -> tuple[cst.BaseStatement, bool]:
    """Where a class attribute goes: after the last one, else after the docstring, else before the first member."""
    members = body(owner)
    last = None
    for each in members:
        if isinstance(each, cst.SimpleStatementLine) and isinstance(each.body[0], (cst.Assign, cst.AnnAssign)):
            last = each
        elif isinstance(each, cst.FunctionDef):
            break
    if last is not None:
        return last, True
    if len(strip_docstring(members)) < len(members):
        return members[0], True
    return members[0], False


def init_anchor(init: cst.FunctionDef, line: cst.SimpleStatementLine) -> tuple[cst.BaseStatement, bool]:
    """Where `self.x = value` goes: after the last statement that sets what the value reads.

    A value that reads nothing set here goes after `super().__init__()`; one that reads an attribute set nowhere in
    this `__init__` goes to the end, where everything is there.
    """
    statements = body(init)
    attributes, names = _reads(value_of(line))
    settled, missing = -1, set(attributes)
    for position, each in enumerate(statements):
        sets_attributes, sets_names = _sets(each)
        missing -= sets_attributes
        if attributes & sets_attributes or names & sets_names or _calls_super(each):
            settled = position
    if missing:
        return statements[-1], True
    if settled >= 0:
        return statements[settled], True
    if len(strip_docstring(statements)) < len(statements):
        return statements[0], True
    return statements[0], False


def _reads(value: cst.BaseExpression) -> tuple[set[str], set[str]]:
    attributes = {a for n in find(value, cst.Attribute) if (a := self_attribute(n))}
    return attributes, _names(value)


def _names(node: cst.CSTNode) -> set[str]:
    """Local names in an expression; attributes and keywords are no names."""
    labels = {id(n.attr) for n in find(node, cst.Attribute)}
    labels |= {id(n.keyword) for n in find(node, cst.Arg) if n.keyword is not None}
    return {n.value for n in find(node, cst.Name) if DOT not in n.value and n.value != "self" and id(n) not in labels}


def _sets(statement: cst.BaseStatement) -> tuple[set[str], set[str]]:
    attributes: set[str] = set()
    names: set[str] = set()
    for node in find(statement, cst.Assign, cst.AnnAssign, cst.AugAssign, cst.For):
        for target in targets_of(node):
            attributes |= {a for n in find(target, cst.Attribute) if (a := self_attribute(n))}
            names |= _names(target)
    return attributes, names


def _calls_super(statement: cst.BaseStatement) -> bool:
    return normal(cst.parse_expression("super().__init__")) in normal(statement)


def new_init(line: cst.SimpleStatementLine) -> cst.BaseStatement:
    """An `__init__` for a class that has none."""
    init = cst.parse_statement("def __init__(self, *args, **kwargs):\n    super().__init__(*args, **kwargs)\n")
    assert isinstance(init, cst.FunctionDef)
    return init.with_changes(body=init.body.with_changes(body=[*init.body.body, line]))
