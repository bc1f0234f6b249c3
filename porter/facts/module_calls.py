"""Which modules a forward calls, and with which variables: how the forwards of a unit hang together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import libcst as cst
from msgspec import Struct

from porter.facts.module_tree import ClassModules, ModuleSite
from porter.source import tree


class Calls(Struct, frozen=True):
    """What parameters of forwards are given, by (class, parameter), and where variables are handed on.

    `hidden` holds classes of which a call has arguments behind `*`, or that may be called where this analysis sees no call.
    """

    values: Mapping[tuple[str, str], tuple[tuple[str, cst.BaseExpression], ...]]
    hidden: frozenset[str]

    def sources(self, cls: str, name: str) -> list[tuple[str, cst.BaseExpression]] | None:
        """Caller and expression of every value a parameter may have; None if not all are known."""
        return None if cls in self.hidden else list(self.values.get((cls, name), ()))

    def given(self, cls: str, name: str) -> list[tuple[cst.Name, tuple[str, str]]]:
        """Where the variable of a class's forward is an argument: the name, and the parameter that takes it."""
        return [
            (value, target)
            for target, values in self.values.items()
            for caller, value in values
            if caller == cls and isinstance(value, cst.Name) and value.value == name
        ]


def module_calls(forwards: Mapping[str, cst.FunctionDef], modules: Mapping[str, ClassModules]) -> Calls:
    """Calls of the classes' modules in their forwards. A default value counts as given by the class itself."""
    values: dict[tuple[str, str], list[tuple[str, cst.BaseExpression]]] = {}
    hidden: set[str] = set()
    for cls, forward in forwards.items():
        loops = {name: attribute for name, attribute, _ in _loop_variables(forward)}
        hidden |= {s.cls for a in _loose(modules[cls], forward) for s in _held(a, modules[cls])}
        for call in tree.find(forward.body, cst.Call):
            for target in _called(call, modules[cls], loops):
                if target not in forwards:
                    continue
                parameters = tree.own_parameters(forwards[target])
                bound = tree.arguments(call, [p.name.value for p in parameters])
                if bound is None:
                    hidden.add(target)
                    continue
                for parameter in parameters:
                    value = bound.get(parameter.name.value, parameter.default)
                    if value is not None:
                        values.setdefault((target, parameter.name.value), []).append((cls, value))
    return Calls({k: tuple(v) for k, v in values.items()}, frozenset(hidden))


def _called(call: cst.Call, modules: ClassModules, loops: Mapping[str, str]) -> set[str]:
    """Classes an attribute or a loop variable that is called may hold."""
    func = call.func
    if isinstance(func, cst.Name) and func.value in loops:
        attribute: str | None = loops[func.value]
    else:
        attribute = tree.self_attribute(func.value if isinstance(func, cst.Subscript) else func)
    if attribute is None:
        return set()
    return {s.cls for s in _held(attribute, modules)}


def _held(attribute: str, modules: ClassModules) -> list[ModuleSite]:
    return [s for p in [attribute, *modules.elements(attribute)] for s in modules.at(p)]


def _loose(modules: ClassModules, forward: cst.FunctionDef) -> set[str]:
    """Attributes that hold modules and are used for something else than a call, a loop over them or a question."""
    plain: set[int] = {id(node) for _, _, node in _loop_variables(forward)}
    for call in tree.find(forward.body, cst.Call):
        plain.add(id(call.func.value if isinstance(call.func, cst.Subscript) else call.func))
    for question in tree.find(forward.body, cst.Comparison):
        plain |= {id(n) for n in tree.walk(question)}
    methods = [m for m in modules.definition.node.body.body if isinstance(m, cst.FunctionDef)]  # type: ignore[attr-defined]
    uses = [n for m in methods if m.name.value != "__init__" for n in tree.find(m.body, cst.Attribute)]
    return {a for n in uses if id(n) not in plain and (a := tree.self_attribute(n)) is not None}


def _loop_variables(forward: cst.FunctionDef) -> Iterator[tuple[str, str, cst.CSTNode]]:
    """Variable, attribute and its node of `for x in self.xs`, also behind `enumerate` and `zip`."""
    for loop in tree.find(forward.body, cst.For):
        yield from _bound(loop.target, loop.iter)


def _bound(target: cst.BaseExpression, items: cst.BaseExpression) -> Iterator[tuple[str, str, cst.CSTNode]]:
    if isinstance(items, cst.Subscript):
        items = items.value
    attribute = tree.self_attribute(items)
    if attribute is not None and isinstance(target, cst.Name):
        yield target.value, attribute, items
    elif isinstance(items, cst.Call) and isinstance(target, cst.Tuple):
        name = tree.call_name(items)
        if name == "enumerate":
            yield from _bound(target.elements[-1].value, items.args[0].value)
        elif name == "zip":
            for element, arg in zip(target.elements, items.args, strict=False):
                yield from _bound(element.value, arg.value)
