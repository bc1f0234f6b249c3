"""Fact sites for the rules of phase `shard`."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.facts.module_tree import module_tree
from porter.facts.sequence.follow import ATTENTION
from porter.facts.sequence.plan import SequencePlan, sequence_plan
from porter.model import Unit, Unknown
from porter.source import tree
from porter.source.names import absolute

ALL_TOKENS = absolute("porter_template.all_tokens")


def planned(unit: Unit) -> bool:
    """Whether the root has a plan already: what it does is not analysed twice."""
    root = unit.get(unit.root)
    return root is not None and any(
        isinstance(n, cst.AssignTarget) and tree.code(n.target) == "_sp_plan"
        for n in tree.find(root.node, cst.AssignTarget)
    )


@fact("sequence_region", fields=["plan"])
def regions(unit: Unit) -> Iterator[FactSite]:
    """The first loop of the part of the root's forward that can run on divided tokens; else the forward, and why not."""
    root = unit.get(unit.root)
    forward = tree.method(root.node, "forward") if root is not None and isinstance(root.node, cst.ClassDef) else None
    if forward is None or planned(unit):
        return
    plan = sequence_plan(unit)
    if isinstance(plan, SequencePlan):
        yield FactSite(plan.start, unit.root, {"plan": True})
    else:
        yield FactSite(forward, unit.root, {"plan": plan})


@fact("sequence_attention", fields=["skip"])
def attention(unit: Unit) -> Iterator[FactSite]:
    """Constructor calls of attention layers; `skip` says that the layer's keys are never divided between ranks ("argument"
    where the constructor is told)."""
    if planned(unit):
        return
    plan = sequence_plan(unit)
    divided = set() if isinstance(plan, Unknown) else {u.owner for u in plan.attention if u.key is not None}
    switched = frozenset() if isinstance(plan, Unknown) else plan.switched()
    for name, modules in module_tree(unit).items():
        for sites in modules.sites.values():
            for site in sites:
                if site.cls == ATTENTION:
                    yield FactSite(site.call, name, {"skip": "argument" if name in switched else name not in divided})


@fact("sequence_length", fields=["total"])
def lengths(unit: Unit) -> Iterator[FactSite]:
    """Numbers of this rank's tokens that must be those of all ranks; `total` is the expression that counts them."""
    plan = None if planned(unit) else sequence_plan(unit)
    for each in plan.counted if isinstance(plan, SequencePlan) else ():
        streams = ", ".join(f'"{p}"' for p in each.parts)
        yield FactSite(each.node, each.owner, {"total": f"{ALL_TOKENS}({tree.code(each.node)}, {streams})"})


@fact("sequence_path", fields=["outside"])
def paths(unit: Unit) -> Iterator[FactSite]:
    """Constructor calls through which a layer used inside and outside the divided part learns where it is; `outside`
    says that the root knows, elsewhere the constructor's own parameter does."""
    plan = None if planned(unit) else sequence_plan(unit)
    if not isinstance(plan, SequencePlan) or not plan.switched():
        return
    modules = module_tree(unit)
    told = set(plan.switched())
    while more := {n for n, m in modules.items() if n not in told and n != unit.root
                   and any(s.cls in told for sites in m.sites.values() for s in sites)}:  # fmt: skip
        told |= more
    for name, each in modules.items():
        for path, sites in each.sites.items():
            for site in sites:
                if site.cls not in told:
                    continue
                if name != unit.root:
                    yield FactSite(site.call, name, {"outside": False})
                elif path.split(".")[0] in plan.outside():
                    yield FactSite(site.call, name, {"outside": True})
