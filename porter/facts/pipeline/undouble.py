"""The statements of a batched step as one branch runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.doubling import concatenated, halved
from porter.facts.pipeline.liveness import uses, writes
from porter.model import Unknown
from porter.source.tree import body, find, same, substitute, with_body


class OneBranch(Struct, frozen=True):
    """`statements` without the doubling. `parts`: variables whose other half is not the same, and that half.

    `halved`: variables that held both branches and now hold one.
    """

    statements: tuple[cst.BaseStatement, ...]
    parts: Mapping[str, cst.BaseExpression]
    halved: frozenset[str]


def undouble(statements: Sequence[cst.BaseStatement], conditions: Sequence[cst.BaseExpression]) -> OneBranch | Unknown:
    """Take `x if guided else y` and `if guided: ... else: ...` apart; Unknown where the guided form is no doubling."""
    parts: dict[str, cst.BaseExpression] = {}
    out = _block(statements, conditions, parts)
    if isinstance(out, Unknown):
        return out
    tests = [n.test for s in out for n in find(s, cst.If, cst.IfExp)]
    if any(same(test, c) for test in tests for c in conditions):
        return Unknown("the guided inputs are prepared in the midst of other statements")
    return OneBranch(tuple(out), parts, _halved(statements, conditions, out))


def _halved(
    statements: Sequence[cst.BaseStatement], conditions: Sequence[cst.BaseExpression], out: Sequence[cst.BaseStatement]
) -> frozenset[str]:
    """Names bound under one of the conditions, and whatever is computed from them."""
    found: set[str] = set()
    for each in statements:
        guided = [n for n in find(each, cst.If) if any(same(n.test, c) for c in conditions)]
        guided += [a for a in find(each, cst.Assign) if isinstance(a.value, cst.IfExp)
                   and any(same(a.value.test, c) for c in conditions)]  # fmt: skip
        found |= writes(guided)
    for each in out:
        if uses(each) & found:
            found |= writes([each])
    return frozenset(found)


def _block(
    statements: Sequence[cst.BaseStatement],
    conditions: Sequence[cst.BaseExpression],
    parts: dict[str, cst.BaseExpression],
) -> list[cst.BaseStatement] | Unknown:
    out: list[cst.BaseStatement] = []
    for each in statements:
        if not isinstance(each, cst.If):
            problem = _statement(each, conditions, out, parts)
        elif any(same(each.test, c) for c in conditions):
            problem = _if(each, out, parts)
        else:
            problem = _inside(each, conditions, out)
        if problem is not None:
            return problem
    return out


def _inside(node: cst.If, conditions: Sequence[cst.BaseExpression], out: list[cst.BaseStatement]) -> Unknown | None:
    """A statement under another condition, with its doubling taken apart; both branches must get the same from it."""
    parts: dict[str, cst.BaseExpression] = {}
    inner = _block(body(node), conditions, parts)
    if isinstance(inner, Unknown):
        return inner
    if parts:
        return Unknown(f"the halves of {', '.join(sorted(parts))} differ under a condition of their own")
    out.append(with_body(node, inner) if inner else node)
    return None


def _statement(
    node: cst.BaseStatement,
    conditions: Sequence[cst.BaseExpression],
    out: list[cst.BaseStatement],
    parts: dict[str, cst.BaseExpression],
) -> Unknown | None:
    if isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], cst.Assign):
        assign = node.body[0]
        value, target = assign.value, assign.targets[0].target
        if isinstance(value, cst.IfExp) and any(same(value.test, c) for c in conditions):
            if not isinstance(target, cst.Name):
                return Unknown("the guided inputs are unpacked")
            problem = _compare(target.value, value.body, value.orelse, parts)
            if problem is not None:
                return problem
            bare = value.orelse.with_changes(lpar=value.lpar, rpar=value.rpar) if value.lpar else value.orelse
            out.append(node.with_changes(body=[assign.with_changes(value=bare)]))
            return None
    out.append(node)
    return None


def _if(node: cst.If, out: list[cst.BaseStatement], parts: dict[str, cst.BaseExpression]) -> Unknown | None:
    guided = _values(body(node))
    if node.orelse is not None and not isinstance(node.orelse, cst.Else):
        return Unknown("the guided inputs have more than two cases")
    orelse = body(node.orelse) if node.orelse is not None else []
    plain = _values(orelse)
    if guided is None or plain is None:
        return Unknown("the guided inputs are prepared by more than assignments")
    for name, value in guided.items():
        if name not in plain and node.orelse is not None:
            continue  # a value in between
        problem = _compare(name, value, plain.get(name, cst.Name(name)), parts)
        if problem is not None:
            return problem
    if orelse and node.leading_lines:
        orelse[0] = orelse[0].with_changes(leading_lines=[*node.leading_lines, *orelse[0].leading_lines])  # type: ignore[attr-defined]
    out += orelse
    return None


def _values(statements: Sequence[cst.BaseStatement]) -> dict[str, cst.BaseExpression] | None:
    """What each name is assigned, values in between spliced in; None if there is more than assignments of names."""
    found: dict[str, cst.BaseExpression] = {}
    for each in statements:
        if not isinstance(each, cst.SimpleStatementLine) or not isinstance(each.body[0], cst.Assign):
            return None
        target = each.body[0].targets[0].target
        if not isinstance(target, cst.Name):
            return None
        found[target.value] = substitute(each.body[0].value, found)  # type: ignore[assignment]
    return found


def _compare(
    name: str, guided: cst.BaseExpression, plain: cst.BaseExpression, parts: dict[str, cst.BaseExpression]
) -> Unknown | None:
    if same(halved(guided), plain) or same(guided, plain):
        return None
    pair: tuple[cst.BaseExpression, ...] | None = concatenated(guided)  # type: ignore[assignment]
    if pair is not None and pair[2] != 0:  # type: ignore[comparison-overlap]
        return Unknown(f"{name} is doubled along an inner axis")
    if isinstance(guided, cst.BinaryOperation) and isinstance(guided.operator, cst.Add):
        pair = (guided.left, guided.right)
    if pair is not None:
        for one, other in ((pair[0], pair[1]), (pair[1], pair[0])):
            if same(one, plain):
                parts[name] = other
                return None
    return Unknown(f"how {name} holds both branches is not known")
