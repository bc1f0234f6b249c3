"""The program that prepares media: its statements handed over, without messages and without what nothing needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import cast

import libcst as cst

from porter.facts.pipeline.liveness import live_before, names_of, uses, writes
from porter.source.names import BUILTINS, DOT
from porter.source.tree import atomic, body, call_name, find, replace_nodes, statement, substitute, with_body

PREPARED = "prepared"
"""The dictionary that the program fills."""

GROWING = frozenset({"append", "extend", "insert"})
"""Methods that add to a list."""


_CHANGING = GROWING | {"pop", "popitem", "remove", "clear", "update", "setdefault", "sort", "reverse"}


def changed_by(call: cst.Call) -> cst.BaseExpression | None:
    """The list, dictionary or tensor that a call of its method changes in place: `x.pop()`, `x.clamp_()`."""
    if not isinstance(call.func, cst.Attribute):
        return None
    name = call.func.attr.value
    in_place = name in _CHANGING or (name.endswith("_") and not name.endswith("__"))
    return call.func.value if in_place else None


def hand_over(keys: Sequence[str], values: Sequence[cst.BaseExpression]) -> list[cst.BaseStatement]:
    """`prepared["x"] = x` for each value."""
    pairs = zip(keys, values, strict=True)
    return [statement(f'{PREPARED}["{key}"] = value', value=value) for key, value in pairs]


def needed(program: Sequence[cst.BaseStatement], whole: Collection[int], live: set[str]) -> list[cst.BaseStatement]:
    """Without statements that no unit needs. `live` is what is read behind them, and before them afterwards.

    `whole` are ids of statements that stay as they are: units, in which a check that raises matters, too.
    """
    out: list[cst.BaseStatement] = []
    for node in reversed(program):
        out += reversed(_needed(node, whole, live))
    return merged(list(reversed(out)))


def _needed(node: cst.BaseStatement, whole: Collection[int], live: set[str]) -> list[cst.BaseStatement]:
    if id(node) in whole or _hands_over(node):
        _pass(node, live)
        return [node]
    if isinstance(node, cst.If):
        other = set(live)
        then = needed(body(node), whole, live)
        rest = needed(suite_of(node.orelse), whole, other)
        live |= other
        if not then and not rest:
            return []
        live |= uses(node.test)
        return [branch(node, node.test, then, rest)]
    if not (writes([node]) | grown(node)) & live:
        return []
    _pass(node, live)
    return [node]


def grown(node: cst.CSTNode) -> set[str]:
    """Names of lists that the node adds to."""
    calls = (c.func for c in find(node, cst.Call) if isinstance(c.func, cst.Attribute))
    return {n for func in calls if func.attr.value in GROWING for n in uses(func.value)}


def _pass(node: cst.BaseStatement, live: set[str]) -> None:
    before = live_before([node], live)
    live.clear()
    live |= before


def merged(statements: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """`x = value` and `prepared["x"] = x` behind it as one statement where nothing else reads `x`."""
    out: list[cst.BaseStatement] = []
    for index, node in enumerate(statements):
        last = out[-1] if out else None
        if last is not None and _hands_over(node) and isinstance(last, cst.SimpleStatementLine):
            assign, given = last.body[0], cast(cst.Assign, node.body[0]).value  # type: ignore[attr-defined]
            if (
                isinstance(assign, cst.Assign)
                and isinstance(given, cst.Name)
                and len(assign.targets) == 1
                and names_of(assign.targets[0].target) == {given.value}
                and isinstance(assign.targets[0].target, cst.Name)
                and given.value not in live_before(statements[index + 1 :])
            ):
                key = cast(cst.Assign, node.body[0]).targets  # type: ignore[attr-defined]
                out[-1] = last.with_changes(body=[assign.with_changes(targets=key)])
                continue
        out.append(node)
    return out


def _hands_over(node: cst.BaseStatement) -> bool:
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Assign):
        return False
    target = node.body[0].targets[0].target
    return isinstance(target, cst.Subscript) and isinstance(target.value, cst.Name) and target.value.value == PREPARED


def branch(
    node: cst.If, test: cst.BaseExpression, then: Sequence[cst.BaseStatement], rest: Sequence[cst.BaseStatement]
) -> cst.If:
    """The branch with other suites; a first one that is empty is turned into the second."""
    orelse: cst.If | cst.Else | None = None
    if rest and not then:
        return with_body(node.with_changes(test=opposite(test), orelse=None), rest)
    if len(rest) == 1 and isinstance(rest[0], cst.If):
        orelse = rest[0]
    elif rest:
        orelse = cst.Else(cst.IndentedBlock(list(rest)))
    return with_body(node.with_changes(test=test, orelse=orelse), then)


def opposite(test: cst.BaseExpression) -> cst.BaseExpression:
    """`not test`, said plainly."""
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return test.expression
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        (only,) = test.comparisons
        turned = {cst.Is: cst.IsNot, cst.IsNot: cst.Is, cst.In: cst.NotIn, cst.NotIn: cst.In}.get(type(only.operator))
        if turned is not None:
            return test.with_changes(comparisons=[only.with_changes(operator=turned())])
    return cst.UnaryOperation(cst.Not(), atomic(test))


def without_copies(program: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """Without `x = y` where `x` gets no other value, and `y` none behind it, so that `y` itself can be read."""
    lines = [line for s in program for line in find(s, cst.SimpleStatementLine)]
    places = {id(line): index for index, line in enumerate(lines)}
    bound: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        for name in writes([line]):
            bound.setdefault(name, []).append(index)
    for loop in (loop for s in program for loop in find(s, cst.For)):
        for name in writes([loop]):
            bound.setdefault(name, []).append(len(lines))
    copies: dict[str, cst.BaseExpression] = {}
    gone: list[tuple[cst.CSTNode, object]] = []
    for suite, top in _branch_suites(program, True):
        found = [(s, copy) for s in suite if (copy := _copy(s)) is not None]
        for node, (target, value) in found if top or len(found) < len(suite) else ():
            index = places[id(node)]
            if bound[target] == [index] and all(n < index for n in bound.get(value, ())):
                copies[target] = copies.get(value, cst.Name(value))
                gone.append((node, cst.RemoveFromParent()))
    if not copies:
        return list(program)
    whole = replace_nodes(cst.Module(list(program)), gone)
    return [cast(cst.BaseStatement, substitute(s, copies)) for s in whole.body]


def _branch_suites(
    statements: Sequence[cst.BaseStatement], top: bool
) -> Iterator[tuple[list[cst.BaseStatement], bool]]:
    yield list(statements), top
    for node in statements:
        if isinstance(node, cst.If):
            yield from _branch_suites(body(node), False)
            yield from _branch_suites(suite_of(node.orelse), isinstance(node.orelse, cst.If))


def _copy(node: cst.BaseStatement) -> tuple[str, str] | None:
    """(x, y) of a statement `x = y`."""
    only = node.body[0] if isinstance(node, cst.SimpleStatementLine) else None
    if not isinstance(only, cst.Assign) or len(only.targets) != 1:
        return None
    target, value = only.targets[0].target, only.value
    if not isinstance(target, cst.Name) or not isinstance(value, cst.Name):
        return None
    return None if value.value in BUILTINS or DOT in value.value else (target.value, value.value)


def only_suite(node: cst.BaseStatement) -> list[cst.BaseStatement] | None:
    """The suite of a branch that does nothing otherwise: `if a: ...`, `if a: pass else: ...`; None for other statements."""
    if not isinstance(node, cst.If) or isinstance(node.orelse, cst.If):
        return None
    if node.orelse is None:
        return body(node)
    idle = all(isinstance(s, cst.SimpleStatementLine) and isinstance(s.body[0], cst.Pass) for s in body(node))
    return body(node.orelse) if idle else None


def suite_of(orelse: cst.If | cst.Else | None) -> list[cst.BaseStatement]:
    if orelse is None:
        return []
    return [orelse] if isinstance(orelse, cst.If) else body(orelse)  # type: ignore[list-item]


def quiet(node: cst.BaseStatement) -> cst.BaseStatement:
    """Without messages: the worker gives them."""
    suite = getattr(node, "body", None)
    if isinstance(node, cst.If):
        kept = [quiet(s) for s in body(node) if not _logs(s)]
        orelse = node.orelse
        if isinstance(orelse, cst.If):
            orelse = cast(cst.If, quiet(orelse))
        elif orelse is not None:
            rest = [quiet(s) for s in body(orelse) if not _logs(s)]
            orelse = with_body(orelse, rest) if rest else None
        return with_body(node.with_changes(orelse=orelse), kept)
    if isinstance(node, cst.For) and isinstance(suite, cst.IndentedBlock):
        return with_body(node, [quiet(s) for s in body(node) if not _logs(s)])
    return node


def _logs(node: cst.BaseStatement) -> bool:
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Expr):
        return False
    return isinstance(node.body[0].value, cst.Call) and is_message(node.body[0].value)


def is_message(call: cst.Call) -> bool:
    name = call_name(call) or ""
    return f"{DOT}logger." in name or name.rpartition(DOT)[2] in ("deprecate", "print")
