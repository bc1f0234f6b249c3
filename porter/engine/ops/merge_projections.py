"""Op: the query, key and value projections of one tensor become one merged parallel linear."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.geometry import Geometry
from porter.facts.projections import ProjectionGroup, read_projection
from porter.facts.tensor_parallel import tensor_parallel
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

MERGED = absolute("vllm.model_executor.layers.linear.MergedColumnParallelLinear")
QKV = absolute("vllm.model_executor.layers.linear.QKVParallelLinear")


@op("merge_projections")
def merge_projections(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """One constructor, one call, and one name for what was several; `load_weights` packs the shards by the same group."""
    facts = tensor_parallel(unit)
    name = site.definition.name
    group = next(g for g in facts.groups[name] if g.sites[0].call is site.node)
    node = site.definition.node
    assert isinstance(node, cst.ClassDef)
    edits: list[Edit] = [replaced(site.node, tree.expression(_constructor(group, facts.geometry[name])))]
    edits += [removed(s.statement) for s in group.sites[1:] if s.statement is not None]
    return [*edits, *_reads(node, group), *_names(node, group)]


def _constructor(group: ProjectionGroup, geometry: object) -> str:
    name = group.merge.name
    common = f'bias={group.bias}, return_bias=False, quant_config=quant_config, prefix=f"{{prefix}}.{name}"'
    if len(group.sites) == 3:
        assert isinstance(geometry, Geometry)
        kv = f", {geometry.kv_heads}" if geometry.kv_heads else ""
        return f"{QKV}({group.fan_in}, {geometry.head_size}, {geometry.heads}{kv}, {common})"
    return f"{MERGED}({group.fan_in}, [{', '.join(group.widths)}], {common})"


def _reads(node: cst.ClassDef, group: ProjectionGroup) -> list[Edit]:
    """`q = self.to_q(x)`, `k = ...`, `v = ...` -> `q, k, v = self.to_qkv(x).chunk(3, dim=-1)`."""
    forward = tree.method(node, "forward")
    assert forward is not None
    lines = list(tree.find(forward.body, cst.SimpleStatementLine))
    found = {r[0]: line for line in lines if (r := read_projection(line)) is not None and r[0] in group.attributes}
    ordered = [line for line in lines if any(line is f for f in found.values())]
    targets = ", ".join(tree.code(found[a].body[0].targets[0].target) for a in group.attributes)  # type: ignore[attr-defined]
    argument = ordered[0].body[0].value.args[0].value  # type: ignore[attr-defined]
    call = f"{targets} = self.{group.merge.name}(argument).chunk({len(group.sites)}, dim=-1)"
    new = tree.statement(call, argument=argument)
    assert isinstance(new, cst.SimpleStatementLine)
    first = ordered[0].with_changes(body=new.body)
    return [replaced(ordered[0], first), *(removed(line) for line in ordered[1:])]


def _names(node: cst.ClassDef, group: ProjectionGroup) -> list[Edit]:
    """Tests and `None` assignments of the old attributes speak of the merged one; one assignment of None is enough."""
    edits: list[Edit] = []
    first = group.attributes[0]
    gone: set[int] = set()
    for line in tree.find(node, cst.SimpleStatementLine):
        small = line.body[0]
        if not isinstance(small, cst.Assign) or isinstance(small.value, cst.Call):
            continue
        hits = {tree.self_attribute(t.target) for t in small.targets} & set(group.attributes)
        if not hits:
            continue
        keep = [t for t in small.targets if tree.self_attribute(t.target) not in group.attributes]
        gone |= {id(n) for n in tree.walk(line)}
        if first in hits:
            merged = tree.expression(f"self.{group.merge.name}")
            keep.append(cst.AssignTarget(merged))
        edits.append(
            replaced(line, line.with_changes(body=[small.with_changes(targets=keep)])) if keep else removed(line)
        )
    calls = {id(c.func) for c in tree.find(node, cst.Call)}
    for attribute in tree.find(node, cst.Attribute):
        if tree.self_attribute(attribute) in group.attributes and id(attribute) not in calls | gone:
            if not _stored(node, attribute):
                edits.append(replaced(attribute, attribute.with_changes(attr=cst.Name(group.merge.name))))
    stored = [t.target for t in tree.find(node, cst.AssignTarget) if tree.self_attribute(t.target) == first]
    edits += [replaced(t, t.with_changes(attr=cst.Name(group.merge.name))) for t in stored if id(t) not in gone]
    return edits


def _stored(node: cst.ClassDef, attribute: cst.Attribute) -> bool:
    return any(t.target is attribute for t in tree.find(node, cst.AssignTarget))
