"""Fact sites for the lowering rules: linears with their roles, merged projections, attention, norms, built layers."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.facts.follow import optional_projection
from porter.facts.module_tree import ClassModules, ModuleSite, module_tree
from porter.facts.projections import linear_arguments
from porter.facts.tensor_parallel import tensor_parallel
from porter.model import Unit, Unknown
from porter.source import tree
from porter.source.names import absolute

ENGINE_LAYERS = ("vllm.", "vllm_omni.")


@fact("linear", fields=["role", "path", "prefix", "fan_in", "fan_out", "bias", "sizes", "parts", "widths"])
def linears(unit: Unit) -> Iterator[FactSite]:
    """Every `torch.nn.Linear` built: column, row, packed_row, chunked_column, merged, gathered or whole.

    A chunked column computes outputs of `sizes` side by side; a packed row reads tensors of `widths` side by side.
    """
    facts = tensor_parallel(unit)
    for name, modules in facts.modules.items():
        merged = {a for g in facts.groups[name] for a in g.attributes}
        for path, sites in modules.sites.items():
            for site in sites:
                if site.is_linear:
                    yield _linear(name, path, site, facts, merged)


def _linear(name: str, path: str, site: ModuleSite, facts, merged: set[str]) -> FactSite:  # noqa: ANN001
    key = (name, path)
    fan_in, fan_out, bias = linear_arguments(site.call)
    fields: dict[str, object] = {
        "path": path,
        "prefix": f'f"{{prefix}}.{path}"',
        "fan_in": fan_in,
        "fan_out": fan_out,
        "bias": bias,
        "role": "whole",
    }
    if path in merged:
        fields["role"] = "merged"
    elif key in facts.roles.column:
        sizes = facts.roles.blocks.get(key) or _sizes(fan_out, facts.roles.chunks.get(key, frozenset()), site)
        fields["role"] = "chunked_column" if sizes else "column"
        if sizes:
            fields["sizes"] = sizes
    elif key in facts.roles.row:
        parts = facts.roles.packed.get(key)
        fields["role"] = "packed_row" if parts else "row"
        if parts:
            fields |= {"parts": len(parts), "widths": f"[{', '.join(_terms(fan_in, len(parts)))}]"}
    elif key in facts.gathered:
        fields["role"] = "gathered"
    return FactSite(site.call, name, fields)


@fact("optional_projection", fields=["attribute", "variable"])
def optional_projections(unit: Unit) -> Iterator[FactSite]:
    """Statements that project sharded attention only where the projection exists."""
    for owner, stmt in tensor_parallel(unit).roles.optional:
        found = optional_projection(stmt)
        assert found is not None
        yield FactSite(stmt, owner, {"attribute": found[0], "variable": found[1]})


@fact("wide_table", fields=["width"])
def wide_tables(unit: Unit) -> Iterator[FactSite]:
    """Rotary tables as wide as all heads, where they meet a projection of which a rank has a share."""
    for owner, table in tensor_parallel(unit).roles.tables:
        if tree.call_name(table) != absolute("porter_template.rotary_of_this_rank"):
            yield FactSite(table, owner, {"width": "all heads"})


@fact("projection_group", fields=["attributes", "name"])
def groups(unit: Unit) -> Iterator[FactSite]:
    """Projections of one tensor that become one; the site is the first one's constructor call."""
    facts = tensor_parallel(unit)
    for name, found in facts.groups.items():
        for group in found:
            yield FactSite(
                group.sites[0].call, name, {"attributes": ", ".join(group.attributes), "name": group.merge.name}
            )


@fact("attention_owner", fields=["role", "sites"])
def owners(unit: Unit) -> Iterator[FactSite]:
    """Classes whose forward computes attention; `role` is self, cross or joint as the specialiser found it."""
    facts = tensor_parallel(unit)
    roles = unit.facts.get("attention_roles", {})
    assert isinstance(roles, dict)
    for name, modules in facts.modules.items():
        sites = facts.attention(name)
        if sites:
            yield FactSite(modules.definition.node, name, {"role": roles.get(name, "self"), "sites": len(sites)})


@fact("norm_across_heads", fields=["cls", "path", "dim", "eps"])
def norms(unit: Unit) -> Iterator[FactSite]:
    """Norms whose input is sharded along the normalised dimension."""
    facts = tensor_parallel(unit)
    for name, path in sorted(facts.roles.across):
        for site in facts.modules[name].at(path):
            if site.cls.startswith("porter_template."):
                continue
            bound = tree.arguments(site.call, ["dim", "eps"]) or {}
            dim = bound.get("dim", bound.get("normalized_shape"))
            eps = bound.get("eps")
            yield FactSite(site.call, name, {
                "cls": site.cls, "path": path, "dim": tree.code(dim) if dim is not None else None,
                "eps": tree.code(eps) if eps is not None else None,
            })  # fmt: skip


@fact("layer_path", fields=["path", "cls"])
def layer_paths(unit: Unit) -> Iterator[FactSite]:
    """Constructor calls of classes of the unit that hold engine layers, directly or through others."""
    modules = module_tree(unit)
    holding = {n for n, m in modules.items() if any(_is_engine(s) for sites in m.sites.values() for s in sites)}
    while more := {n for n, m in modules.items() if n not in holding and _builds(m, holding)}:
        holding |= more
    for name, tree_ in modules.items():
        for path, sites in tree_.sites.items():
            for site in sites:
                if site.cls in holding:
                    yield FactSite(site.call, name, {"path": path, "cls": site.cls})


def _is_engine(site: ModuleSite) -> bool:
    return site.cls.startswith(ENGINE_LAYERS) or site.cls.startswith("porter_template.PackedRow")


def _builds(modules: ClassModules, classes: set[str]) -> bool:
    return any(s.cls in classes for sites in modules.sites.values() for s in sites)


def _sizes(width: str, counts: frozenset[int], site: ModuleSite) -> str | Unknown | None:
    """Widths of the outputs that a linear computes side by side, as text; None for one output.

    Where the forward has a choice of counts, the width must be a product with the local variable that makes the same one.
    """
    if not counts:
        return None
    if len(counts) == 1 and (count := next(iter(counts))) and _names_count(width, site) is None:
        return f"[{_divided(width, count)}] * {count}"
    named = _names_count(width, site)
    if named is None or not counts <= named[2]:
        return Unknown(f"{width} is cut into {sorted(counts)} parts, and which is not known")
    return f"[{named[0]}] * {named[1]}"


def _names_count(width: str, site: ModuleSite) -> tuple[str, str, set[int]] | None:
    """(other factor, variable, its values) of a width `dim * n` with `n = 5 if flag else 3` before it."""
    node = tree.expression(width)
    if not isinstance(node, cst.BinaryOperation) or not isinstance(node.operator, cst.Multiply):
        return None
    for variable, other in ((node.right, node.left), (node.left, node.right)):
        values = site.choices.get(variable.value) if isinstance(variable, cst.Name) else None
        if values:
            return tree.code(other), tree.code(variable), set(values)
    return None


def _divided(width: str, chunks: int) -> str:
    """`dim * 2` split in two is `dim`."""
    node = tree.expression(width)
    if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply):
        for factor, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(factor, cst.Integer) and int(factor.value) == chunks:
                return tree.code(other)
    return f"({width}) // {chunks}"


def _terms(width: str, parts: int) -> list[str]:
    """`a + b` -> [a, b]: the widths of the tensors read side by side."""
    terms: list[str] = []
    node = tree.expression(width)
    while isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Add) and len(terms) < parts - 1:
        terms.append(tree.code(node.right))
        node = node.left
    return [tree.code(node), *reversed(terms)]


_TABLE_CALLS = ("torch.arange", "torch.linspace", "torch.outer", "torch.polar", "torch.meshgrid", "torch.pow")


@fact("table_module", fields=["target", "cls", "buffers"])
def tables(unit: Unit) -> Iterator[FactSite]:
    """`self.x = Table(...)` where the class has no parameters and its constructor computes tensors."""
    modules = module_tree(unit)
    computing = {n: _registers_buffers(m) for n, m in modules.items() if not _builds_modules(m) and _computes_tables(m)}
    for name, tree_ in modules.items():
        for path, sites in tree_.sites.items():
            for site in sites:
                small = site.statement.body[0] if site.statement is not None else None
                direct = isinstance(small, cst.Assign) and small.value is site.call
                if site.cls in computing and direct and site.statement is not None:
                    yield FactSite(site.statement, name, {
                        "target": f"self.{path}", "cls": site.cls, "buffers": computing[site.cls],
                    })  # fmt: skip


def _builds_modules(modules: ClassModules) -> bool:
    """Whether an attribute holds an instance of a class; results of functions are tensors."""
    return any(s.cls.rpartition(".")[2][:1].isupper() for sites in modules.sites.values() for s in sites)


def _computes_tables(modules: ClassModules) -> bool:
    node = modules.definition.node
    init = tree.method(node, "__init__")
    if init is None or any((tree.call_name(c) or "").endswith("Parameter") for c in tree.find(init, cst.Call)):
        return False
    names = [(tree.call_name(c) or "").replace("\u00b7", ".") for c in tree.find(init, cst.Call)]
    return any(n in _TABLE_CALLS or n.endswith("rotary_pos_embed") or "sincos" in n for n in names)


def _registers_buffers(modules: ClassModules) -> bool:
    init = tree.method(modules.definition.node, "__init__")
    return init is not None and any(tree.call_name(c) == "self.register_buffer" for c in tree.find(init, cst.Call))
