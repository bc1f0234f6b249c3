"""Projections of one tensor that may be computed at once."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct

from porter.facts.geometry import Geometry
from porter.facts.module_tree import ClassModules, ModuleSite
from porter.facts.sharding import Roles
from porter.model import Unknown
from porter.source import tree

LINEAR_PARAMETERS = ["in_features", "out_features", "bias", "device", "dtype"]


class Merge(Struct, frozen=True):
    """Projections replaced by one: `name` in the port, `sources` in Diffusers, with the shard id of each."""

    owner: str
    name: str
    sources: tuple[tuple[str, str | int], ...]


class ProjectionGroup(Struct, frozen=True):
    """Query, key and value (or key and value) projections of one tensor, computed side by side."""

    merge: Merge
    sites: tuple[ModuleSite, ...]
    fan_in: str
    widths: tuple[str, ...]
    bias: str

    @property
    def attributes(self) -> list[str]:
        return [name for name, _ in self.merge.sources]


def linear_arguments(call: cst.Call) -> tuple[str, str, str]:
    """(in, out, bias) of a `torch.nn.Linear` call, as text."""
    bound = tree.arguments(call, LINEAR_PARAMETERS) or {}
    text = {k: tree.code(v) for k, v in bound.items()}
    return text["in_features"], text["out_features"], text.get("bias", "True")


def projection_groups(modules: ClassModules, roles: Roles, geometry: Geometry | Unknown) -> tuple[ProjectionGroup, ...]:
    """Groups of one class. All projections of a group read the same expression in consecutive statements."""
    name = modules.definition.name
    found: list[ProjectionGroup] = []
    for group in _candidates(modules, roles):
        order = [k for k in "qkv" if k in group]
        sites = tuple(modules.at(group[k])[0] for k in order)
        shapes = [linear_arguments(s.call) for s in sites]
        if len({(i, b) for i, _, b in shapes}) != 1 or any(s.statement is None for s in sites):
            continue
        if len(order) == 3 and isinstance(geometry, Unknown):
            continue
        ids: tuple[str | int, ...] = ("q", "k", "v") if len(order) == 3 else (0, 1)
        attributes = [group[k] for k in order]
        merge = Merge(name, merged_name(attributes), tuple(zip(attributes, ids, strict=True)))
        fan_in, _, bias = shapes[0]
        found.append(ProjectionGroup(merge, sites, fan_in, tuple(o for _, o, _ in shapes), bias))
    return tuple(found)


def _candidates(modules: ClassModules, roles: Roles) -> list[dict[str, str]]:
    """Sets of attributes that read one tensor, by their part ("q", "k", "v") in attention."""
    name = modules.definition.name
    kinds: dict[str, set[str]] = {}
    for site in roles.attention:
        if site.owner == name:
            for kind, flow in (("q", site.query), ("k", site.key), ("v", site.value)):
                for owner, path in flow.linears:
                    if owner == name:
                        kinds.setdefault(path, set()).add(kind)
    groups: list[dict[str, str]] = []
    for run in _runs(modules.definition.node, set(kinds)):
        group = {next(iter(kinds[p])): p for p in run if len(kinds[p]) == 1 and _single(modules, roles, name, p)}
        if len(group) == len(run) and set(group) in ({"q", "k", "v"}, {"k", "v"}):
            groups.append(group)
    return groups


def _single(modules: ClassModules, roles: Roles, name: str, path: str) -> bool:
    return (
        (name, path) in roles.column and len(modules.at(path)) == 1 and len(set(map(id, roles.reads[name, path]))) == 1
    )


def _runs(node: cst.ClassDef, paths: set[str]) -> list[list[str]]:
    """Maximal sequences of statements `x = self.p(arg)` with one argument, in one block of forward."""
    forward = tree.method(node, "forward")
    found: list[list[str]] = []
    if forward is None:
        return found
    blocks = [tree.body(forward), *(tree.body(b) for b in tree.find(forward.body, cst.If, cst.Else, cst.For, cst.With))]
    for stmts in blocks:
        run: list[str] = []
        argument = ""
        for stmt in [*stmts, None]:
            read = read_projection(stmt) if stmt is not None else None
            if read is not None and read[0] in paths and (not run or read[1] == argument):
                run.append(read[0])
                argument = read[1]
                continue
            if len(run) > 1:
                found.append(run)
            run, argument = ([read[0]], read[1]) if read is not None and read[0] in paths else ([], "")
    return found


def read_projection(stmt: cst.BaseStatement) -> tuple[str, str] | None:
    """(attribute, argument) of `x = self.attribute(argument)`."""
    small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 else None
    if not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call) or len(small.value.args) != 1:
        return None
    attribute = tree.self_attribute(small.value.func)
    return (attribute, tree.normal(small.value.args[0].value)) if attribute else None


def merged_name(attributes: list[str]) -> str:
    """`to_q, to_k, to_v` -> `to_qkv`; `add_k_proj, add_v_proj` -> `add_kv_proj`."""
    split = [a.split("_") for a in attributes]
    if len({len(s) for s in split}) == 1:
        parts = []
        for column in zip(*split, strict=True):
            parts.append(column[0] if len(set(column)) == 1 else "".join(column))
        return "_".join(parts)
    return "_".join(attributes)
