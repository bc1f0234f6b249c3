"""Op: dropout does nothing when serving."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.module_tree import module_tree
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

IDENTITY = absolute("torch.nn.Identity")


@op("drop_dropout")
def drop_dropout(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """A dropout at the end of a list that is called by index goes with its calls; elsewhere it becomes Identity, so that
    the elements after it keep their names."""
    node = site.definition.node
    identity: list[Edit] = [replaced(site.node, tree.expression(f"{IDENTITY}()"))]
    if not isinstance(node, cst.ClassDef):
        return identity
    modules = module_tree(unit)[site.definition.name]
    path = next((p for p, sites in modules.sites.items() if any(s.call is site.node for s in sites)), "")
    attribute, _, index = path.partition(".")
    calls = [c for c in tree.find(node, cst.Call) if isinstance(c.func, cst.Subscript)
             and tree.self_attribute(c.func.value) == attribute and tree.code(c.func.slice[0].slice) == index]  # fmt: skip
    iterated = any(tree.self_attribute(loop.iter) == attribute for loop in tree.find(node, cst.For))
    if not index or not calls or iterated or modules.elements(attribute)[-1] != path:
        return identity
    return [*_taken_out(node, site.node), *(replaced(c, c.args[0].value) for c in calls)]


def _taken_out(node: cst.CSTNode, call: cst.CSTNode) -> list[Edit]:
    for element in tree.find(node, cst.Element):
        if element.value is call:
            return [removed(element)]
    line = next(s for s in tree.find(node, cst.SimpleStatementLine) if any(n is call for n in tree.walk(s)))
    return [removed(line)]
