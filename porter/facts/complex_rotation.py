"""Rotary embeddings computed as products of complex numbers."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

AS_REAL, AS_COMPLEX = absolute("torch.view_as_real"), absolute("torch.view_as_complex")


@fact("complex_rotation", fields=["complex", "pairs"])
def complex_rotations(unit: Unit) -> Iterator[FactSite]:
    """`view_as_real(x * table)` where `x` is `view_as_complex(pairs)`, bound once and used nowhere else.

    The site is the call of view_as_real; `complex` the call of view_as_complex, `pairs` its argument, of shape [..., D/2, 2].
    """
    for definition in unit.definitions:
        if not any(tree.call_name(c) == AS_REAL for c in tree.find(definition.node, cst.Call)):
            continue
        for function in tree.find(definition.node, cst.FunctionDef):
            for suite in tree.suites(function):
                yield from _in_suite(suite, function, definition.name)


def _in_suite(suite: list[cst.BaseStatement], function: cst.FunctionDef, definition: str) -> Iterator[FactSite]:
    lines = [s for s in suite if isinstance(s, cst.SimpleStatementLine)]
    for call in (c for line in lines for c in tree.find(line, cst.Call) if tree.call_name(c) == AS_REAL):
        product = call.args[0].value
        if not isinstance(product, cst.BinaryOperation) or not isinstance(product.operator, cst.Multiply):
            continue
        made = _complex_value(product.left, lines)
        # Bound and used here alone: nothing after the statements reads it, or they leave the function.
        where = suite if _leaves(suite) else [function]
        if made is None or sum(_uses(s, product.left) for s in where) != 2:
            continue
        yield FactSite(call, definition, {"complex": made, "pairs": made.args[0].value})


def _complex_value(name: cst.BaseExpression, lines: list[cst.SimpleStatementLine]) -> cst.Call | None:
    """The call of view_as_complex that a local of these statements holds."""
    for line in lines:
        small = line.body[0]
        if isinstance(small, cst.Assign) and isinstance(name, cst.Name) and isinstance(small.value, cst.Call):
            if tree.same(small.targets[0].target, name) and tree.call_name(small.value) == AS_COMPLEX:
                return small.value
    return None


def _leaves(suite: list[cst.BaseStatement]) -> bool:
    last = suite[-1]
    return isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[-1], cst.Return)


def _uses(node: cst.CSTNode, name: cst.BaseExpression) -> int:
    return sum(isinstance(name, cst.Name) and n.value == name.value for n in tree.find(node, cst.Name))
