"""Op: a product of complex numbers is computed on their parts."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, inserted, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

VIEW_AS_REAL, STACK = absolute("torch.view_as_real"), absolute("torch.stack")


@op("real_rotation")
def real_rotation(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """The pairs stay pairs; their parts and the table's are bound ahead of the statement that multiplies them."""
    made, pairs, x, table = (site.lookup(n) for n in ("rotation.complex", "rotation.pairs", "x", "table"))
    assert isinstance(made, cst.Call) and isinstance(pairs, cst.BaseExpression) and site.statement is not None
    assert isinstance(x, cst.BaseExpression) and isinstance(table, cst.BaseExpression) and site.function is not None
    taken = {n.value for n in tree.find(site.function, cst.Name)}
    real, imag = ("real", "imag") if not taken & {"real", "imag"} else ("pairs_real", "pairs_imag")
    cos, sin = ("cos", "sin") if not taken & {"cos", "sin"} else ("table_cos", "table_sin")
    parts = f"{real}, {imag} = x.unbind(-1)\n{cos}, {sin} = {VIEW_AS_REAL}(table).unbind(-1)\n"
    product = f"{STACK}(({real} * {cos} - {imag} * {sin}, {real} * {sin} + {imag} * {cos}), dim=-1)"
    return [
        replaced(made, pairs),
        inserted(site.statement, tree.statements(parts, x=x, table=table), after=False),
        replaced(site.node, tree.expression(product)),
    ]
