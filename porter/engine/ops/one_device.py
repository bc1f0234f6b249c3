"""Op: a function chosen by the device is the one for the engine's devices."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.model import Diagnostic, Unit
from porter.source import tree


@op("one_device")
def one_device(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Each call names the function itself; the choice goes."""
    function, calls, given = (site.lookup(f"choice.{n}") for n in ("function", "calls", "arguments"))
    assert isinstance(function, cst.Name) and isinstance(calls, tuple) and isinstance(given, tuple)
    added = [tree.keyword_argument(a.keyword.value, a.value) for a in given]
    edits: list[Edit] = [removed(site.node)]
    for call in calls:
        separated = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in call.args]
        edits.append(replaced(call, call.with_changes(func=function, args=[*separated, *added])))
    return edits
