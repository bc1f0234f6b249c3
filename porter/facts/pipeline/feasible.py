"""What a loop carries from round to round, knowing that equal conditions have equal outcomes.

`if guided: a = f()` ... `if guided and scale > 0: use(a)` needs no `a` from before: no run takes the second branch
without the first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

import libcst as cst

from porter.facts.pipeline.liveness import live_before, uses, writes
from porter.source.tree import body, find, normal, with_body

MOST = 6
"""Conditions that are told apart; more would double the work each time and only cost precision."""


def carried_unbound(
    loop: Sequence[cst.BaseStatement], live_after: Iterable[str], unbound: Collection[str]
) -> frozenset[str]:
    """Those of the `unbound` names that a round of a loop may take from the round before it.

    Nothing binds them ahead of the loop. So a round that reads one without writing it has had a round before it that
    wrote it: with conditions that no round can change, that is a round that writes it too.
    """
    after = frozenset(live_after)
    atoms = _invariant(loop, unbound)
    found: set[str] = set()
    for outcome in product((True, False), repeat=len(atoms)):
        taken = _under(loop, dict(zip(atoms, outcome, strict=True)))
        found |= live_before(taken, after) & writes(taken) & set(unbound)
    return frozenset(found)


def _invariant(loop: Sequence[cst.BaseStatement], names: Collection[str]) -> list[str]:
    """Conditions around writes or reads of the names that nothing in the loop can change."""
    changed = writes(loop)
    found: dict[str, None] = {}
    for statement in loop:
        for node in find(statement, cst.If):
            if not (uses(node) | writes([node])) & set(names):
                continue
            for atom in _atoms(node.test):
                if not uses(atom) & changed and not any(True for _ in find(atom, cst.Call)):
                    found[normal(atom)] = None
    return list(found)[:MOST]


def _atoms(test: cst.BaseExpression) -> list[cst.BaseExpression]:
    if isinstance(test, cst.BooleanOperation):
        return [*_atoms(test.left), *_atoms(test.right)]
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return _atoms(test.expression)
    return [test]


def _outcome(test: cst.BaseExpression, known: Mapping[str, bool]) -> bool | None:
    if isinstance(test, cst.BooleanOperation):
        decides = not isinstance(test.operator, cst.And)
        sides = (_outcome(test.left, known), _outcome(test.right, known))
        return decides if decides in sides else (None if None in sides else not decides)
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        inner = _outcome(test.expression, known)
        return None if inner is None else not inner
    return known.get(normal(test))


def _under(statements: Sequence[cst.BaseStatement], known: Mapping[str, bool]) -> list[cst.BaseStatement]:
    """The statements that run if the conditions turn out so."""
    out: list[cst.BaseStatement] = []
    for statement in statements:
        if isinstance(statement, cst.If):
            out += _under_if(statement, known)
        elif isinstance(statement, (cst.For, cst.While, cst.With)):
            out.append(with_body(statement, _under(body(statement), known)))
        else:
            out.append(statement)
    return out


def _under_if(node: cst.If, known: Mapping[str, bool]) -> list[cst.BaseStatement]:
    other: list[cst.BaseStatement] = []
    if isinstance(node.orelse, cst.If):
        other = _under_if(node.orelse, known)
    elif node.orelse is not None:
        other = _under(body(node.orelse), known)
    taken = _outcome(node.test, known)
    if taken is not None:
        return _under(body(node), known) if taken else other
    orelse = cst.Else(cst.IndentedBlock(other)) if other else None
    return [with_body(node.with_changes(orelse=orelse), _under(body(node), known))]
