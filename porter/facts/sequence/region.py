"""The part of the root's forward that may run on divided tokens: its loops over blocks, and variables around them."""

from __future__ import annotations

import libcst as cst

from porter.source import tree


def block_loops(step: cst.BaseStatement, lists: set[str]) -> list[cst.For]:
    """Loops over lists of modules in a statement of the forward: one itself, or some in its branches."""
    return [
        loop
        for loop in tree.find(step, cst.For)
        if any(tree.self_attribute(a) in lists for a in tree.find(loop.iter, cst.Attribute))
    ]


def handed_on(region: list[cst.BaseStatement], forward: cst.FunctionDef) -> tuple[str, ...]:
    """Variables that calls of blocks read and write, and that exist before the first of the loops."""
    found: dict[str, None] = {}
    before = _defined_before(forward, region[0])
    for loop in (each for step in region for each in tree.find(step, cst.For)):
        for assign in tree.find(loop.body, cst.Assign):
            if not isinstance(assign.value, cst.Call):
                continue
            read = {a.value.value for a in assign.value.args if isinstance(a.value, cst.Name)}
            written = [n for t in assign.targets for n in _names(t.target)]
            found.update(dict.fromkeys(n for n in written if n in read and n in before))
    return tuple(found)


def _names(target: cst.BaseExpression) -> list[str]:
    if isinstance(target, (cst.Tuple, cst.List)):
        return [n for e in target.elements for n in _names(e.value)]
    return [target.value] if isinstance(target, cst.Name) else []


def read_after(forward: cst.FunctionDef, loop: cst.BaseStatement) -> frozenset[str]:
    """Names that occur in the loop or after it."""
    nodes = list(tree.walk(forward.body))
    start = next(i for i, n in enumerate(nodes) if n is loop)
    return frozenset(n.value for n in nodes[start:] if isinstance(n, cst.Name))


def read_behind(forward: cst.FunctionDef, statement: cst.BaseStatement) -> frozenset[str]:
    """Names that occur behind a statement."""
    nodes = list(tree.walk(forward.body))
    start = next(i for i, n in enumerate(nodes) if n is statement) + sum(1 for _ in tree.walk(statement))
    return frozenset(n.value for n in nodes[start:] if isinstance(n, cst.Name))


def maybe_none(forward: cst.FunctionDef) -> set[str]:
    """Variables that may hold None: set so somewhere, or optional inputs that nothing else is assigned to."""
    absent: set[str] = set()
    given: set[str] = set()
    for assign in tree.find(forward.body, cst.Assign):
        names = [n for t in assign.targets for n in _names(t.target)]
        (absent if tree.is_none(assign.value) else given).update(names)
    defaults = {p.name.value for p in tree.parameters(forward) if tree.is_none(p.default)}
    return absent | (defaults - given)


def _defined_before(forward: cst.FunctionDef, loop: cst.BaseStatement) -> set[str]:
    names = {p.name.value for p in tree.parameters(forward)}
    for node in tree.walk(forward.body):
        if node is loop:
            break
        if isinstance(node, cst.AssignTarget):
            names |= set(_names(node.target))
    return names
