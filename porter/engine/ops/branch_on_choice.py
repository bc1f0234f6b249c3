"""Op: statements that use a class chosen by a flag move into the branches of that flag."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.model import Diagnostic, Unit
from porter.source import tree


@op("branch_on_choice")
def branch_on_choice(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Bindings: `flag` (the test), `choice` (the local name), `first` and `second` (the classes). Every later use of the
    name must be a call in a plain statement; the flag must not be assigned in between."""
    flag, choice = site.lookup("flag"), site.lookup("choice")
    classes = (site.lookup("first"), site.lookup("second"))
    function = site.function
    if not isinstance(flag, cst.Name) or not isinstance(choice, cst.Name) or function is None:
        return Diagnostic("PORT310", "a processor class is chosen by something other than a flag", site.span)
    inside = {id(n) for n in tree.walk(site.node)}
    uses = [n for n in tree.find(function.body, cst.Name) if n.value == choice.value and id(n) not in inside]
    lines = [line for line in tree.find(function.body, cst.SimpleStatementLine) if _mentions(line, uses)]
    calls = {id(c.func) for line in lines for c in tree.find(line, cst.Call)}
    stored = {tree.code(t.target) for t in tree.find(function.body, cst.AssignTarget)}
    if not uses or any(id(u) not in calls for u in uses) or flag.value in stored:
        return Diagnostic("PORT310", f"`{choice.value}` is used otherwise than to build processors", site.span)
    edits: list[Edit] = [removed(site.node)]
    for line in lines:
        branches = [tree.replace_nodes(line, [(u, cls) for u in uses]) for cls in classes]
        edits.append(replaced(line, _either(flag, *branches)))
    return edits


def _mentions(line: cst.SimpleStatementLine, names: list[cst.Name]) -> bool:
    wanted = {id(n) for n in names}
    return any(id(n) in wanted for n in tree.find(line, cst.Name))


def _either(flag: cst.Name, first: cst.SimpleStatementLine, second: cst.SimpleStatementLine) -> cst.If:
    """`if flag: first else: second`, under the comments of the statement."""
    body, other = (cst.IndentedBlock([tree.clone(s.with_changes(leading_lines=()))]) for s in (first, second))
    return cst.If(tree.clone(flag), body, cst.Else(other), leading_lines=first.leading_lines)
