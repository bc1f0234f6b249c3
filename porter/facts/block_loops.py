"""Which lists of blocks a forward runs through in a plain loop, so that the loop may be taken for one call.

Caches replace a list by one module that runs all its blocks. That is the same only if the loop does nothing else between
the blocks and gives each of them the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

REFUSED = absolute("porter_template.refuse_cache_dit")


def plain_loops(forward: cst.FunctionDef) -> set[str]:
    """Attributes of which every loop in `forward` only calls one block after the other. What is added after a block only if an
    optional parameter is given (residuals of a ControlNet) does not count."""
    optional = _optional(forward)
    seen: dict[str, bool] = {}
    for loop in tree.find(forward.body, cst.For):
        for attribute in {a for n in tree.find(loop.iter, cst.Attribute) if (a := tree.self_attribute(n)) is not None}:
            block = _block_name(loop, attribute)
            fine = block is not None and _only_calls(loop, block, optional)
            seen[attribute] = fine and attribute not in seen
    return {attribute for attribute, fine in seen.items() if fine}


@fact("between_blocks", fields=["given"])
def between_blocks(unit: Unit) -> Iterator[FactSite]:
    """Plain loops of the root between whose calls something happens if an optional parameter, `given`, is given."""
    root = unit.get(unit.root)
    forward = tree.method(root.node, "forward") if root is not None else None
    if forward is None:
        return
    plain = plain_loops(forward)
    done = {tree.code(c.args[1].value) for c in tree.find(forward.body, cst.Call) if tree.call_name(c) == REFUSED}
    optional = _optional(forward) - done
    for loop in tree.find(forward.body, cst.For):
        if any(tree.self_attribute(n) in plain for n in tree.find(loop.iter, cst.Attribute)):
            tests = [t for s in tree.body(loop) for t in _tests(s)]
            names = dict.fromkeys(n for n in sorted(optional) for t in tests if _given(t, {n}))
            for name in names:
                yield FactSite(loop, unit.root, {"given": cst.Name(name)})


def _optional(forward: cst.FunctionDef) -> set[str]:
    return {p.name.value for p in tree.parameters(forward) if tree.is_none(p.default)}


def _tests(stmt: cst.BaseStatement) -> list[cst.BaseExpression]:
    """The condition of a statement of a loop, or of the flag that it sets."""
    if isinstance(stmt, cst.If):
        return [stmt.test]
    small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) else None
    return [small.value.test] if isinstance(small, cst.Assign) and isinstance(small.value, cst.IfExp) else []


def _block_name(loop: cst.For, attribute: str) -> str | None:
    """The loop variable of `for x in self.a` or `for i, x in enumerate(self.a)`."""
    if tree.self_attribute(loop.iter) == attribute and isinstance(loop.target, cst.Name):
        return loop.target.value
    if tree.code(loop.iter) == f"enumerate(self.{attribute})" and isinstance(loop.target, cst.Tuple):
        last = loop.target.elements[-1].value
        return last.value if isinstance(last, cst.Name) else None
    return None


def _only_calls(loop: cst.For, block: str, optional: set[str]) -> bool:
    steps = [s for s in _unless_skipped(tree.body(loop), optional) if not _if_given(s, optional)]
    small = steps[0].body[0] if len(steps) == 1 and isinstance(steps[0], cst.SimpleStatementLine) else None
    if not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call):
        return False
    if not isinstance(small.value.func, cst.Name) or small.value.func.value != block:
        return False
    index = {n.value for n in tree.find(loop.target, cst.Name)}
    return not any(n.value in index for a in small.value.args for n in tree.find(a.value, cst.Name))


def _unless_skipped(stmts: list[cst.BaseStatement], optional: set[str]) -> list[cst.BaseStatement]:
    """`skip = True if parameter is not None and ... else False` and `if not skip: ...`: the parameter's default skips none."""
    found: list[cst.BaseStatement] = []
    flags: set[str] = set()
    for stmt in stmts:
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) else None
        if isinstance(small, cst.Assign) and isinstance(small.value, cst.IfExp) and _given(small.value.test, optional):
            if [tree.code(small.value.body), tree.code(small.value.orelse)] == ["True", "False"]:
                flags.add(tree.code(small.targets[0].target))
                continue
        if isinstance(stmt, cst.If) and stmt.orelse is None and any(tree.code(stmt.test) == f"not {f}" for f in flags):
            found += tree.body(stmt)
            continue
        found.append(stmt)
    return found


def _given(test: cst.BaseExpression, optional: set[str]) -> bool:
    first = test.left if isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.And) else test
    return any(tree.code(first) == f"{name} is not None" for name in optional)


def _if_given(stmt: cst.BaseStatement, optional: set[str]) -> bool:
    """`if parameter is not None: ...`, for a parameter that is None by default."""
    return isinstance(stmt, cst.If) and stmt.orelse is None and _given(stmt.test, optional)
