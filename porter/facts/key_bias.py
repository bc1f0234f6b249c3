"""Biases of attention scores that only say which keys are padding, from where they are made to where they are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.facts.masks import metadata_names, variables
from porter.facts.module_calls import Calls, module_calls
from porter.facts.module_tree import module_tree
from porter.model import Unit
from porter.source import tree

Variable = tuple[str, str]
"""A class and a name in its forward."""


@fact("key_bias", fields=["mask", "made"])
def key_biases(unit: Unit) -> Iterator[FactSite]:
    """Statements that make a bias of a mask (`made`), and those that spread it over heads, where one only serves the other.

    The root turns a mask [B, keys] into `(1 - mask) * -10000` [B, 1, keys] and does nothing with it but hand it on; every layer
    that gets it gets nothing else (or None) there, and gives it to attention once it has an axis for heads.
    """
    forwards: dict[str, cst.FunctionDef] = {}
    for definition in unit.definitions:
        forward = tree.method(definition.node, "forward") if isinstance(definition.node, cst.ClassDef) else None
        if forward is not None:
            forwards[definition.name] = forward
    root = forwards.get(unit.root)
    if root is None:
        return
    made = {name: stmt for stmt in tree.find(root.body, cst.If) if (name := _made(stmt)) is not None}
    if not made:
        return
    spread = {
        (cls, name): stmt
        for cls, forward in forwards.items()
        for stmt in tree.body(forward)
        if isinstance(stmt, cst.If) and (name := _spread(stmt)) is not None
    }
    calls = module_calls(forwards, module_tree(unit))
    proven = _proven(unit.root, made, spread, forwards, calls)
    for name, stmt in made.items():
        if (unit.root, name) in proven and calls.given(unit.root, name):
            yield FactSite(stmt, unit.root, {"mask": _variable(stmt), "made": True})
    for (cls, name), stmt in spread.items():
        if (cls, name) in proven:
            yield FactSite(stmt, cls, {"mask": _variable(stmt), "made": False})


def _variable(stmt: cst.If) -> cst.BaseExpression:
    """The mask in `mask is not None` or `mask is not None and ...`."""
    test = stmt.test.left if isinstance(stmt.test, cst.BooleanOperation) else stmt.test
    assert isinstance(test, cst.Comparison)
    return test.left


def _proven(
    root: str,
    made: Mapping[str, cst.If],
    spread: Mapping[Variable, cst.If],
    forwards: Mapping[str, cst.FunctionDef],
    calls: Calls,
) -> set[Variable]:
    """Variables that hold nothing but such a bias and are used for nothing but attention: the largest set that is closed."""
    found: set[Variable] = {(root, name) for name in made}
    found |= {(c, p.name.value) for c, f in forwards.items() if c != root for p in tree.own_parameters(f)}
    while True:
        refuted = {
            (cls, name)
            for cls, name in found
            if not (cls == root or _comes_from(calls.sources(cls, name), found))
            or not _goes_to(forwards[cls], cls, name, made.get(name) if cls == root else None, spread, found, calls)
        }
        if not refuted:
            return found
        found -= refuted


def _comes_from(sources: list[tuple[str, cst.BaseExpression]] | None, found: set[Variable]) -> bool:
    return sources is not None and all(
        isinstance(value, cst.Name) and (value.value == "None" or (cls, value.value) in found) for cls, value in sources
    )


def _goes_to(
    forward: cst.FunctionDef,
    cls: str,
    name: str,
    made: cst.If | None,
    spread: Mapping[Variable, cst.If],
    found: set[Variable],
    calls: Calls,
) -> bool:
    """Whether the variable is only handed on, or spread over heads and handed to attention."""
    handed = calls.given(cls, name)
    if any(target not in found for _, target in handed):
        return False
    allowed = {id(value) for value, _ in handed}
    inside = spread.get((cls, name))
    if inside is not None:
        if handed or not _stays_inside(inside, forward, name):
            return False
        allowed |= metadata_names(forward).get(name, set())
    for stmt in (made, inside):
        if stmt is not None:
            allowed |= {id(n) for n in tree.find(stmt, cst.Name)}
    return all(
        id(n) in allowed for n in variables(forward.body) if n.value == name
    )  # a test for None would see another answer where nothing is padding


def _made(stmt: cst.If) -> str | None:
    """The mask of which a statement makes `(1 - mask.to(dtype)) * -10000.0` with an axis for queries, if it is [B, keys]."""
    body = _assignments(stmt)
    if stmt.orelse is not None or body is None or len(body) != 2 or body[0][0] != body[1][0]:
        return None
    name, value = body[0]
    if (
        tree.code(stmt.test) != f"{name} is not None and {name}.ndim == 2"
        or tree.code(body[1][1]) != f"{name}.unsqueeze(1)"
    ):
        return None
    text = tree.code(value)
    return name if text.startswith(f"(1 - {name}.to(") and text.endswith(")) * -10000.0") else None


def _assignments(stmt: cst.If) -> list[tuple[str, cst.BaseExpression]] | None:
    found: list[tuple[str, cst.BaseExpression]] = []
    for line in tree.body(stmt):
        small = line.body[0] if isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1 else None
        target = small.targets[0].target if isinstance(small, cst.Assign) and len(small.targets) == 1 else None
        if not isinstance(small, cst.Assign) or not isinstance(target, cst.Name):
            return None
        found.append((target.value, small.value))
    return found


def _spread(stmt: cst.If) -> str | None:
    """The bias of `if bias is not None:` where [B, 1, keys] is repeated for every head: [B, heads, 1, keys].

    Where the keys are more than the bias has, it is lengthened by their number; attention then refuses it.
    """
    lines = tree.body(stmt)
    if stmt.orelse is not None or not isinstance(stmt.test, cst.Comparison) or not isinstance(stmt.test.left, cst.Name):
        return None
    name = stmt.test.left.value
    if tree.code(stmt.test) != f"{name} is not None" or len(lines) != 5:
        return None
    heads, length, padded, repeated, viewed = lines
    if not isinstance(padded, cst.If) or not isinstance(repeated, cst.If) or repeated.orelse is not None:
        return None
    kept, counted = _stored(heads), _stored(length)
    if kept is None or counted is None or kept[1] != "self.heads" or counted[1] != f"{name}.shape[-1]":
        return None
    last = _stored(viewed)
    batch = tree.code(repeated.test).removeprefix(f"{name}.shape[0] < ").removesuffix(f" * {kept[0]}")
    if last != (name, f"{name}.view({batch}, self.heads, -1, {name}.shape[-1])"):
        return None
    again = _assignments(repeated)
    grown = tree.normal(again[0][1]) if again is not None and len(again) == 1 and again[0][0] == name else ""
    simple = f"{name}.repeat_interleave({kept[0]}, dim=0)"
    sized = f"{name}.repeat_interleave({kept[0]}, dim=0, output_size={name}.shape[0] * {kept[0]})"
    if grown not in (tree.normal(tree.expression(simple)), tree.normal(tree.expression(sized))):
        return None
    return name if tree.code(padded.test).startswith(f"{counted[0]} != ") else None


def _stored(stmt: cst.BaseStatement) -> tuple[str, str] | None:
    small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 else None
    if isinstance(small, cst.AnnAssign) and small.value is not None:
        return tree.code(small.target), tree.code(small.value)
    if isinstance(small, cst.Assign) and len(small.targets) == 1:
        return tree.code(small.targets[0].target), tree.code(small.value)
    return None


def _stays_inside(stmt: cst.If, forward: cst.FunctionDef, name: str) -> bool:
    """Whether what the statement stores, but for the bias, is read nowhere else."""
    inside = list(tree.find(stmt, cst.Name))
    stored = {t.target.value for t in tree.find(stmt, cst.AssignTarget) if isinstance(t.target, cst.Name)} - {name}
    stored |= {a.target.value for a in tree.find(stmt, cst.AnnAssign) if isinstance(a.target, cst.Name)}
    known = {id(n) for n in inside}
    return not any(n.value in stored and id(n) not in known for n in variables(forward.body))
