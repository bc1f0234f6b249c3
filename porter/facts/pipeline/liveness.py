"""Which local variables a list of statements reads, writes and needs: backward liveness over structured statements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import libcst as cst

from porter.source.names import BUILTINS, DOT
from porter.source.tree import body, children, find

_SCOPES = frozenset({cst.Lambda, cst.ListComp, cst.SetComp, cst.GeneratorExp, cst.DictComp})
_BINDERS = frozenset({cst.AnnAssign, cst.AugAssign, cst.NamedExpr, cst.For})


@lru_cache(maxsize=16384)
def uses(node: cst.CSTNode) -> frozenset[str]:
    """Local names an expression reads (`self` and builtins are not locals)."""
    found: set[str] = set()
    _uses(node, found)
    return frozenset(found)


def _uses(node: Any, found: set[str]) -> None:
    kind = type(node)  # LibCST's classes are slow to ask with `isinstance`
    if kind is cst.Name:
        if DOT not in node.value and node.value not in BUILTINS and node.value != "self":
            found.add(node.value)
    elif kind is cst.Attribute or kind is cst.Arg:
        _uses(node.value, found)
    elif kind in _SCOPES:
        inner: set[str] = set()
        for child in children(node):
            if not isinstance(child, cst.Parameters):
                _uses(child, inner)
        found |= inner - _bound_inside(node)
    elif kind is cst.AnnAssign:
        for part in (node.value, None if isinstance(node.target, cst.Name) else node.target):
            if part is not None:
                _uses(part, found)
    elif kind is cst.Assign:
        _uses(node.value, found)
        for target in node.targets:
            _target_uses(target.target, found)
    elif kind is cst.NamedExpr:
        _uses(node.value, found)
    else:
        for child in children(node):
            _uses(child, found)


def _target_uses(target: cst.BaseExpression, found: set[str]) -> None:
    if isinstance(target, (cst.Tuple, cst.List)):
        for element in target.elements:
            _target_uses(element.value, found)
    elif not isinstance(target, cst.Name):
        _uses(target, found)


def _bound_inside(node: cst.CSTNode) -> set[str]:
    if isinstance(node, cst.Lambda):
        return {p.name.value for p in [*node.params.params, *node.params.kwonly_params]}
    bound: set[str] = set()
    part: cst.CompFor | None = node.for_in  # type: ignore[attr-defined]
    while part is not None:
        bound |= names_of(part.target)
        part = part.inner_for_in
    return bound


def names_of(target: cst.BaseExpression) -> set[str]:
    """Plain names an assignment target binds."""
    if isinstance(target, cst.Name):
        return {target.value}
    if isinstance(target, (cst.Tuple, cst.List)):
        return {name for e in target.elements for name in names_of(e.value)}
    return set()


def writes(statements: Iterable[cst.BaseStatement]) -> frozenset[str]:
    """Local names that any of the statements binds, on any path."""
    found: set[str] = set()
    for statement in statements:
        _writes(statement, found)
    return frozenset(found)


def changed(statements: Iterable[cst.BaseStatement]) -> frozenset[str]:
    """Local names that any of the statements binds, or an element of which it sets (`x[a] = y`)."""
    found = set(writes(statements := list(statements)))
    for assign in [a for s in statements for a in find(s, cst.Assign)]:
        for target in [t.target for t in assign.targets]:
            if isinstance(target, cst.Subscript) and isinstance(target.value, cst.Name):
                found.add(target.value.value)
    return frozenset(found)


def _writes(node: Any, found: set[str]) -> None:
    kind = type(node)
    if kind is cst.Assign:
        for target in node.targets:
            found |= names_of(target.target)
        _writes(node.value, found)
    elif kind in _BINDERS:
        found |= names_of(node.target)
        for child in children(node):
            _writes(child, found)
    elif kind is cst.FunctionDef or kind is cst.ClassDef:
        found.add(node.name.value)
    elif kind is cst.AsName:
        found |= names_of(node.name)
    elif kind not in _SCOPES:
        for child in children(node):
            _writes(child, found)


def always_writes(statements: Iterable[cst.BaseStatement]) -> frozenset[str]:
    """Local names bound on every path that leaves the statements normally."""
    found: set[str] = set()
    for statement in statements:
        if isinstance(statement, cst.SimpleStatementLine):
            for small in statement.body:
                _writes(small, found)
        elif isinstance(statement, cst.If):
            found |= _if_always(statement)
        elif isinstance(statement, cst.With):
            found |= always_writes(body(statement))
            found |= writes([cst.With(statement.items, cst.IndentedBlock([]))])
        elif isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
            found.add(statement.name.value)
    return frozenset(found)


def _if_always(node: cst.If) -> frozenset[str]:
    branches = [_branch(body(node))]
    if isinstance(node.orelse, cst.Else):
        branches.append(_branch(body(node.orelse)))
    elif isinstance(node.orelse, cst.If):
        branches.append(_if_always(node.orelse))
    else:
        return frozenset()
    reached = [b for b in branches if b is not None]
    return frozenset.intersection(*reached) if reached else frozenset()


def _branch(statements: Sequence[cst.BaseStatement]) -> frozenset[str] | None:
    return None if leaves(statements) else always_writes(statements)


def leaves(statements: Sequence[cst.BaseStatement]) -> bool:
    """Whether control never falls out of the end of the statements."""
    if not statements or not isinstance(statements[-1], cst.SimpleStatementLine):
        return False
    return isinstance(statements[-1].body[-1], (cst.Return, cst.Raise, cst.Continue, cst.Break))


def live_before(statements: Sequence[cst.BaseStatement], live_after: Iterable[str] = ()) -> frozenset[str]:
    """Names whose value before the statements matters."""
    live = set(live_after)
    for statement in reversed(statements):
        live = _before(statement, live)
    return frozenset(live)


def _before(node: cst.BaseStatement, live: set[str]) -> set[str]:
    if isinstance(node, cst.SimpleStatementLine):
        for small in reversed(node.body):
            live = _before_small(small, live)
        return live
    if isinstance(node, cst.If):
        other: set[str] = set(live)
        if isinstance(node.orelse, cst.If):
            other = _before(node.orelse, set(live))
        elif node.orelse is not None:
            other = set(live_before(body(node.orelse), live))
        return set(live_before(body(node), live)) | other | uses(node.test)
    if isinstance(node, cst.For):
        return _before_loop(node, live, names_of(node.target)) | uses(node.iter)
    if isinstance(node, cst.While):
        return _before_loop(node, live, set()) | uses(node.test)
    if isinstance(node, cst.With):
        inner = set(live_before(body(node), live)) - {
            n for i in node.items if i.asname for n in names_of(i.asname.name)
        }
        return inner.union(*(uses(i.item) for i in node.items))
    if isinstance(node, cst.Try):
        return _before_try(node, live)
    if isinstance(node, cst.FunctionDef):
        return (live - {node.name.value}) | (uses(node.body) - _parameter_names(node) - writes(body(node)))
    return live | uses(node)


def _before_try(node: cst.Try, live: set[str]) -> set[str]:
    """A handler may run before the guarded statements bound anything, so what it needs is needed at the start."""
    if node.finalbody is not None:
        live = set(live_before(body(node.finalbody), live))
    found = set(live_before(body(node), live_before(body(node.orelse), live) if node.orelse is not None else live))
    for handler in node.handlers:
        inner = set(live_before(body(handler), live))
        found |= inner - (names_of(handler.name.name) if handler.name is not None else set())
        found |= uses(handler.type) if handler.type is not None else set()
    return found


def _before_loop(node: cst.For | cst.While, live: set[str], bound: set[str]) -> set[str]:
    current = set(live)
    while True:
        again = (set(live_before(body(node), current)) - bound) | live
        if again <= current:
            return current
        current |= again


def _before_small(node: cst.BaseSmallStatement, live: set[str]) -> set[str]:
    if isinstance(node, cst.Return):
        return set(uses(node.value)) if node.value is not None else set()
    if isinstance(node, cst.Raise):
        return set(uses(node))
    bound: set[str] = set()
    if isinstance(node, cst.Assign):
        bound = {n for t in node.targets for n in names_of(t.target)}
    elif isinstance(node, cst.AnnAssign) and node.value is not None:
        bound = names_of(node.target)
    return (live - bound) | uses(node)


def _parameter_names(function: cst.FunctionDef) -> set[str]:
    p = function.params
    return {each.name.value for each in [*p.posonly_params, *p.params, *p.kwonly_params]}
