"""Modulation linears of blocks: they turn one vector of a request into shifts, scales and gates.

Their result meets whole tensors, so no pair of linears hangs on it; but it is one short vector, and the weight is
several times as wide as the model. Each rank can compute a share of it and gather the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.facts.flow import Linear
from porter.facts.module_tree import ClassModules, ModuleSite
from porter.facts.projections import linear_arguments
from porter.facts.sharding import Roles
from porter.source import tree
from porter.source.names import qualified

_ACTIVATIONS = frozenset({"torch.nn.SiLU", "torch.nn.GELU", "torch.nn.functional.silu", "torch.nn.functional.gelu"})


def modulations(classes: Mapping[str, ClassModules], root: str, roles: Roles) -> frozenset[Linear]:
    """Linears of repeated blocks whose output is several vectors side by side and that act on a vector, not a sequence:
    they read an activation's result, or what they return is given a sequence axis afterwards."""
    found: set[Linear] = set()
    for name in repeated(classes, root):
        modules = classes[name]
        for path, sites in modules.sites.items():
            linears = [s for s in sites if s.is_linear]
            if not linears or (name, path) in roles.column | roles.row:
                continue
            wide = all(map(_is_wide, linears))
            reads = roles.reads.get((name, path), ())
            if _heads_a_sequence(modules, path) or (wide and (_activated(modules, reads) or _broadcast(modules, path))):
                found.add((name, path))
    return frozenset(found)


def repeated(classes: Mapping[str, ClassModules], root: str) -> tuple[str, ...]:
    """Classes that stand in a list of the root, directly or through others, in order of definition."""
    own = {f"{m.definition.module}.{m.definition.name}": name for name, m in classes.items()}
    listed = [s for path, sites in classes[root].sites.items() if path.endswith(".*") for s in sites]
    called = [
        qualified(n.value) or n.value for s in listed for n in tree.find(s.call, cst.Name)
    ]  # also what it is given
    pending = [own.get(name, name) for name in called]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in classes and name not in seen:
            seen.add(name)
            pending += [s.cls for sites in classes[name].sites.values() for s in sites]
    return tuple(n for n in classes if n in seen)


def _is_wide(site: ModuleSite) -> bool:
    """Whether the output's width is a multiple of something: `6 * dim`, `dim * parts`."""
    width = tree.expression(linear_arguments(site.call)[1])
    return isinstance(width, cst.BinaryOperation) and isinstance(width.operator, cst.Multiply)


def _heads_a_sequence(modules: ClassModules, path: str) -> bool:
    """Whether the linear is `Sequential(activation, linear)`, and not one that keeps the width."""
    attribute, _, index = path.partition(".")
    first = modules.at(f"{attribute}.0")
    shapes = [linear_arguments(s.call) for s in modules.at(path)]
    return index == "1" and any(s.cls in _ACTIVATIONS for s in first) and all(i != o for i, o, _ in shapes)


def _activated(modules: ClassModules, reads: tuple[cst.BaseExpression, ...]) -> bool:
    return bool(reads) and all(_is_activated(read, modules) for read in reads)


def _is_activated(node: cst.BaseExpression, modules: ClassModules) -> bool:
    """`self.silu(x)`, `F.silu(x)`, either with `.to(...)` behind it."""
    if not isinstance(node, cst.Call):
        return False
    if isinstance(node.func, cst.Attribute) and node.func.attr.value == "to":
        return _is_activated(node.func.value, modules)
    attribute = tree.self_attribute(node.func)
    if attribute is not None:
        return any(s.cls in _ACTIVATIONS for s in modules.at(attribute))
    return isinstance(node.func, cst.Name) and qualified(node.func.value) in _ACTIVATIONS


def _broadcast(modules: ClassModules, path: str) -> bool:
    """Whether what `self.attribute(...)` returns gets a sequence axis: `unsqueeze(1)`, on the call, on its variable or on
    the parts it is chunked into."""
    attribute = path.partition(".")[0]
    forward = tree.method(modules.definition.node, "forward")
    if forward is None:
        return False
    results: set[str] = set()
    for assign in tree.find(forward.body, cst.Assign):
        value, target = assign.value, assign.targets[0].target
        if isinstance(value, cst.Call) and isinstance(value.func, cst.Attribute):
            chunked = value.func.attr.value == "chunk" and tree.code(value.func.value) in results
            if chunked or tree.self_attribute(value.func) == attribute:
                results |= {n.value for n in tree.find(target, cst.Name)}
    for call in tree.find(forward.body, cst.Call):
        if not isinstance(call.func, cst.Attribute) or call.func.attr.value != "unsqueeze":
            continue
        owner = call.func.value
        direct = isinstance(owner, cst.Call) and tree.self_attribute(owner.func) == attribute
        if (direct or tree.code(owner) in results) and [tree.code(a.value) for a in call.args] == ["1"]:
            return True
    return False
