"""Op: attention calls of a class become calls of the engine's Attention layer, built once in the constructor."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, inserted, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.tensor_parallel import tensor_parallel
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.transformer.lower.attention import as_bshd, heads_second, lower_attention

Pair = tuple[cst.CSTNode, object]


@op("engine_attention")
def engine_attention(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Sequence before heads throughout; head counts of this rank; the layer at the end of the constructor."""
    facts = tensor_parallel(unit)
    name = site.definition.name
    node = site.definition.node
    assert isinstance(node, cst.ClassDef)
    sites = list(facts.attention(name))
    pairs: list[Pair] = []
    turned = heads_second(node, sites)
    if turned is not None:
        pairs += turned
        sites = [as_bshd(s) for s in sites]
    result = lower_attention(node, sites, facts.geometry[name], str(args.get("role", "self")), facts.shards(name))
    if result.diagnostics:
        return result.diagnostics[0]
    init = tree.method(node, "__init__")
    assert init is not None
    statements = [tree.statement(s) for s in result.constructor]
    return [*as_edits([*pairs, *result.edits]), inserted(tree.body(init)[-1], statements, after=True)]


def as_edits(pairs: list[Pair]) -> list[Edit]:
    """Node and replacement (a node, a function of the node, or removal) as edits; nested ones are merged outside in."""
    inner = {id(node): change for node, change in pairs}
    nested = {id(n) for node, _ in pairs for n in tree.walk(node) if n is not node}
    edits: list[Edit] = []
    for node, change in pairs:
        if id(node) in nested:
            continue  # carried out with the edit around it
        if isinstance(change, cst.RemovalSentinel):
            edits.append(removed(node))
            continue
        below = [(n, inner[id(n)]) for n in tree.walk(node) if id(n) in inner and n is not node]
        base = tree.replace_nodes(node, below) if below else node
        new = change(base) if callable(change) else change
        assert isinstance(new, cst.CSTNode)
        edits.append(replaced(node, new))
    return edits
