"""Buffers that are part of a checkpoint: Diffusers' loader gives them the model's dtype, however they were computed."""

from __future__ import annotations

import libcst as cst

from porter.facts.module_tree import module_tree
from porter.facts.sequence.classes import Classes
from porter.model import Unit
from porter.source import tree
from porter.source.library import Library


def persistent_buffers(unit: Unit, library: Library | None) -> tuple[str, ...]:
    """`Class.buffer` for each buffer that may be in the state dict, of classes of the unit and of those it imports from the
    library. Where a constructor's argument decides and is given, it may be."""
    modules = module_tree(unit)
    classes = Classes(modules, library)
    pending: list[tuple[str, cst.Call | None]] = [(name, None) for name in modules]
    seen: set[tuple[str, frozenset[str] | None]] = set()
    found: dict[str, None] = {}
    while pending:
        name, call = pending.pop(0)
        held = classes.find(name)
        init = tree.method(held.definition.node, "__init__") if held is not None else None  # type: ignore[arg-type]
        if held is None or init is None:
            continue
        given = _given(init, call) if call is not None else None
        if (name, given) in seen:
            continue
        seen.add((name, given))
        for buffer, persistent in _registered(init):
            if persistent is None or _may_hold(persistent, init, given):
                found[f"{held.definition.name}.{buffer}"] = None
        sites = [s for path in held.sites.values() for s in path]
        pending += [(s.cls, s.call) for s in sites if s.cls not in modules]
    return tuple(found)


def _registered(init: cst.FunctionDef) -> list[tuple[str, cst.BaseExpression | None]]:
    """(name, `persistent` where it is given) of every buffer a constructor registers."""
    found = []
    for call in tree.find(init.body, cst.Call):
        if tree.call_name(call) == "self.register_buffer":
            given = tree.arguments(call, ("name", "tensor", "persistent")) or {}
            name = given.get("name")
            label = str(tree.literal_value(name.value)) if isinstance(name, cst.SimpleString) else "*"
            found.append((label, given.get("persistent")))
    return found


def _given(init: cst.FunctionDef, call: cst.Call) -> frozenset[str] | None:
    """Parameters a call gives; None where that is not known."""
    given = tree.arguments(call, [p.name.value for p in tree.parameters(init)[1:]])
    return frozenset(given) if given is not None else None


def _may_hold(test: cst.BaseExpression, init: cst.FunctionDef, given: frozenset[str] | None) -> bool:
    """False where a value is false whenever the constructor is called with the parameters `given`."""
    if isinstance(test, cst.IfExp) and tree.code(test.body) == "True" and tree.code(test.orelse) == "False":
        return _may_hold(test.test, init, given)
    if not isinstance(test, cst.Name):
        return not (isinstance(test, cst.Integer) and int(test.value) == 0)
    if test.value in ("True", "False", "None"):
        return test.value == "True"
    parameter = next((p for p in tree.parameters(init) if p.name.value == test.value), None)
    if parameter is not None:
        omitted = given is not None and test.value not in given
        return not omitted or parameter.default is None or _may_hold(parameter.default, init, given)
    values = [a.value for a in tree.find(init.body, cst.Assign) if tree.code(a.targets[0].target) == test.value]
    return any(_may_hold(v, init, given) for v in values) or not values
