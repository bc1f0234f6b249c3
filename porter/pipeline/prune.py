"""Take out assignments nobody reads and give names that hold one constant their value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import libcst as cst

from porter.facts.pipeline.liveness import live_before, names_of, uses, writes
from porter.pipeline.fold import UNKNOWN, Knowledge, fold, unchanged, value_of, with_comments
from porter.source.names import DOT
from porter.source.tree import body, find, self_attribute, with_body

_HARMLESS = frozenset(
    {"len", "max", "min", "int", "float", "bool", "abs", "round", "isinstance", "hasattr", "list", "tuple"}
)
_HARMLESS_METHODS = frozenset({"chunk", "split", "unbind"})
"""Methods of tensors that only give other views of them."""


def settle(
    statements: Sequence[cst.BaseStatement], known: Knowledge, parameters: Iterable[str] = (), live: Iterable[str] = ()
) -> list[cst.BaseStatement]:
    """Fold, propagate constants and drop dead assignments until nothing changes.

    `parameters` are names bound from outside; `live` names that are read after the statements.
    """
    current = list(statements)
    for _ in range(8):
        local = {**known.local, **constants(current, known, frozenset(parameters))}
        following = drop_dead(fold(current, known.with_local(local)), live)
        if unchanged(current, following):
            return following
        current = following
    return current


def constants(
    statements: Sequence[cst.BaseStatement], known: Knowledge, parameters: frozenset[str]
) -> dict[str, object]:
    """Names that are bound once, at the top level, to None, True or False, before any read."""
    found: dict[str, object] = {}
    counts: dict[str, int] = {}
    for name in (n for s in statements for n in _all_writes(s)):
        counts[name] = counts.get(name, 0) + 1
    for statement in statements:
        if not isinstance(statement, cst.SimpleStatementLine) or not isinstance(statement.body[0], cst.Assign):
            continue
        assign = statement.body[0]
        for target in assign.targets:
            if isinstance(target.target, cst.Name) and counts.get(target.target.value) == 1:
                name = target.target.value
                value = value_of(assign.value, known)
                if name not in parameters and value is not UNKNOWN and (value is None or isinstance(value, bool)):
                    found[name] = value
    return found


@lru_cache(maxsize=16384)
def _all_writes(statement: cst.BaseStatement) -> tuple[str, ...]:
    """Names a statement binds, once for each place that does."""
    found: list[str] = []
    for node in find(statement, cst.Assign, cst.AugAssign, cst.AnnAssign, cst.For, cst.NamedExpr, cst.AsName):
        if isinstance(node, cst.Assign):
            for target in node.targets:
                found += names_of(target.target)
        elif isinstance(node, cst.AsName):
            found += names_of(node.name)
        else:
            found += names_of(node.target)
    return tuple(found)


def drop_dead(statements: Sequence[cst.BaseStatement], live: Iterable[str] = ()) -> list[cst.BaseStatement]:
    """Without assignments of side-effect-free values that no later statement reads. Comments move to the next one."""
    after = set(live)
    out: list[cst.BaseStatement] = []
    for statement in reversed(statements):
        new = _live_statement(statement, after)
        if new is None:
            lines = [line for line in getattr(statement, "leading_lines", ()) if line.comment]
            if lines and out and isinstance(statement, cst.SimpleStatementLine):
                out[-1] = with_comments([out[-1]], lines)[0]
            continue
        after = set(live_before([new], after))
        out.append(new)
    return list(reversed(out))


def _live_statement(statement: cst.BaseStatement, live: set[str]) -> cst.BaseStatement | None:
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        node = statement.body[0]
        if isinstance(node, cst.Assign) and all(_plain_target(t.target) for t in node.targets):
            bound = {n for t in node.targets for n in names_of(t.target)}
            if not bound & live and _pure(node.value):
                return None
        if isinstance(node, cst.Pass):
            return None
        return statement
    if isinstance(statement, cst.If):
        return _live_if(statement, live)
    if isinstance(statement, cst.For):
        inside = live | set(live_before([statement], live))
        return _with_suite(statement, drop_dead(body(statement), inside))
    if isinstance(statement, cst.With):
        return _with_suite(statement, drop_dead(body(statement), live))
    return statement


def _plain_target(target: cst.BaseExpression) -> bool:
    """A name, or a tuple of names."""
    if isinstance(target, cst.Tuple):
        return all(isinstance(e.value, cst.Name) for e in target.elements)
    return isinstance(target, cst.Name)


def _with_suite(statement: cst.For | cst.With | cst.Else, inner: list[cst.BaseStatement]):  # noqa: ANN202 - same class
    if unchanged(body(statement), inner):
        return statement
    return with_body(statement, inner) if inner else None


def _live_if(node: cst.If, live: set[str]) -> cst.If | None:
    then = drop_dead(body(node), live)
    orelse: cst.If | cst.Else | None = None
    if isinstance(node.orelse, cst.If):
        orelse = _live_if(node.orelse, live)
    elif node.orelse is not None:
        orelse = _with_suite(node.orelse, drop_dead(body(node.orelse), live))
    if not then and orelse is None and _pure(node.test):
        return None
    if orelse is node.orelse and unchanged(body(node), then):
        return node
    return with_body(node.with_changes(orelse=orelse), then)


def _pure(node: cst.BaseExpression) -> bool:
    for call in find(node, cst.Call):
        if isinstance(call.func, cst.Attribute) and call.func.attr.value in _HARMLESS_METHODS:
            if self_attribute(call.func) is None:
                continue
        if not isinstance(call.func, cst.Name) or call.func.value not in _HARMLESS:
            return False
    return not any(True for _ in find(node, cst.NamedExpr, cst.Await, cst.Yield))


def reads_only_locals(node: cst.BaseExpression, names: Iterable[str]) -> bool:
    """Whether an expression reads nothing but the given names and globals."""
    return uses(node) <= frozenset(names) and not any(
        isinstance(n, cst.Name) and n.value == "self" and DOT not in n.value for n in find(node, cst.Name)
    )


__all__ = ["constants", "drop_dead", "reads_only_locals", "settle", "writes"]
