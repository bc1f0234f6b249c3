"""Op: `quant_config` and the full module path reach every class that builds an engine layer."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Add, Code, Edit, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

MAYBE_PREFIX = absolute("vllm.model_executor.models.utils.maybe_prefix")


@op("thread_path")
def thread_path(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Pass `quant_config` and `prefix` to one constructor call; elements of a comprehension are numbered."""
    assert isinstance(site.node, cst.Call)
    if any(a.keyword is not None and a.keyword.value == "prefix" for a in site.node.args):
        return []
    edits: list[Edit] = []
    path = str(args["path"])
    if path.endswith(".*"):
        index, renames = _index(site)
        edits += renames
        path = f"{path[:-1]}{{{index}}}" if index else path[:-2]
    if site.definition.name == unit.root:
        text = f'{MAYBE_PREFIX}(prefix, {"f" if "{" in path else ""}"{path}")'
    else:
        text = f'f"{{prefix}}.{path}"'
    for name, value in (("quant_config", cst.Name("quant_config")), ("prefix", tree.expression(text))):
        edits.append(Add(site.node, "args", Code.of(tree.keyword_argument(name, value))))
    return edits


def _index(site: Site) -> tuple[str | None, list[Edit]]:
    """Name of the loop variable of the comprehension around the call; `_` is given a name."""
    comp = site.index.enclosing(site.node, cst.ListComp) or site.index.enclosing(site.node, cst.GeneratorExp)
    if comp is None:
        return None, []
    target = comp.for_in.target  # type: ignore[attr-defined]
    if not isinstance(target, cst.Name) or tree.call_name(comp.for_in.iter) != "range":  # type: ignore[attr-defined]
        return None, []
    if target.value == "_":
        return "i", [replaced(n, cst.Name("i")) for n in tree.find(comp, cst.Name) if n.value == "_"]
    return target.value, []
