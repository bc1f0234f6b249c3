"""Which modules a class builds, under which attribute, at which constructor call."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst
from msgspec import Struct, field

from porter.model import Definition, Unit
from porter.source import tree
from porter.source.names import qualified

LINEAR = "torch.nn.Linear"


class ModuleSite(Struct, frozen=True, eq=False):
    """One constructor call whose result is held by an attribute.

    `path` is the attribute, with an index for an element of a list (`to_out.0`, `net.2`); `cls` is the qualified name of
    a global class or the name of a class of the unit. `call` is the call's node, `statement` the line it stands in; `choices`
    are the constructor's variables that are one of two whole numbers.
    """

    owner: str
    path: str
    cls: str
    call: cst.Call
    statement: cst.SimpleStatementLine | None
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_linear(self) -> bool:
        return self.cls == LINEAR

    @property
    def attribute(self) -> str:
        return self.path.split(".")[0]


class ClassModules(Struct, frozen=True):
    """Module sites of one class by path. A path may have several sites when the constructor chooses between them."""

    definition: Definition
    sites: Mapping[str, tuple[ModuleSite, ...]]

    def at(self, path: str) -> tuple[ModuleSite, ...]:
        return self.sites.get(path, ())

    def elements(self, attribute: str) -> list[str]:
        """Paths of a list attribute's elements, in order."""
        found = [p for p in self.sites if p.startswith(attribute + ".")]
        return sorted(found, key=lambda p: int(p.rpartition(".")[2]) if p.rpartition(".")[2].isdigit() else 1 << 30)


def module_tree(unit: Unit) -> dict[str, ClassModules]:
    """Module sites of every class of the unit."""
    found = {}
    own = {f"{d.module}.{d.name}": d.name for d in unit.definitions}
    for definition in unit.definitions:
        if isinstance(definition.node, cst.ClassDef):
            found[definition.name] = _modules(definition, own)
    return found


def _modules(definition: Definition, own: Mapping[str, str]) -> ClassModules:
    init = tree.method(definition.node, "__init__")
    sites: dict[str, list[ModuleSite]] = {}
    if init is None:
        return ClassModules(definition, {})
    values: dict[str, list[tuple[cst.Call, cst.SimpleStatementLine]]] = {}
    lengths: dict[str, int] = {}
    choices = _choices(init)

    def add(path: str, value: cst.BaseExpression, line: cst.SimpleStatementLine) -> None:
        for call, where in _calls(value, line, values):
            name = call.func.value if isinstance(call.func, cst.Name) else ""
            cls = qualified(name) or name
            cls = own.get(cls, cls)
            if cls in ("torch.nn.ModuleList", "torch.nn.Sequential"):
                elements = _elements(call)
                lengths[path] = len(elements) if elements is not None else 0
                for index, element in enumerate(elements or []):
                    add(f"{path}.{index}", element, where)
                if elements is None:
                    for comp in tree.find(call, cst.ListComp, cst.GeneratorExp):
                        add(f"{path}.*", comp.elt, where)
                continue
            if cls[:1]:
                sites.setdefault(path, []).append(ModuleSite(definition.name, path, cls, call, where, choices))

    for line in tree.find(init.body, cst.SimpleStatementLine):
        small = line.body[0]
        if isinstance(small, cst.Assign):
            for target in small.targets:
                attribute = tree.self_attribute(target.target)
                if attribute is not None:
                    add(attribute, small.value, line)
                elif isinstance(target.target, cst.Name) and isinstance(small.value, cst.Call):
                    values.setdefault(target.target.value, []).append((small.value, line))
        elif isinstance(small, cst.Expr) and isinstance(small.value, cst.Call):
            call = small.value
            if isinstance(call.func, cst.Attribute) and call.func.attr.value == "append" and call.args:
                attribute = tree.self_attribute(call.func.value)
                if attribute is not None:
                    index = lengths.get(attribute, 0)
                    lengths[attribute] = index + 1
                    add(f"{attribute}.{index}", call.args[0].value, line)
    return ClassModules(definition, {k: tuple(v) for k, v in sites.items()})


def _choices(init: cst.FunctionDef) -> dict[str, tuple[int, ...]]:
    """`n = 5 if flag else 3`, for every variable assigned once."""
    found: dict[str, tuple[int, ...]] = {}
    seen: set[str] = set()
    for assign in tree.find(init.body, cst.Assign):
        target, value = assign.targets[0].target, assign.value
        if not isinstance(target, cst.Name):
            continue
        found.pop(target.value, None)
        if isinstance(value, cst.IfExp) and target.value not in seen:
            both = [int(v.value) for v in (value.body, value.orelse) if isinstance(v, cst.Integer)]
            if len(both) == 2:
                found[target.value] = tuple(both)
        seen.add(target.value)
    return found


def _calls(
    value: cst.BaseExpression,
    line: cst.SimpleStatementLine,
    values: Mapping[str, list[tuple[cst.Call, cst.SimpleStatementLine]]],
) -> list[tuple[cst.Call, cst.SimpleStatementLine]]:
    """Constructor calls an expression may evaluate to."""
    if isinstance(value, cst.Call):
        return [(value, line)]
    if isinstance(value, cst.IfExp):
        return [*_calls(value.body, line, values), *_calls(value.orelse, line, values)]
    if isinstance(value, cst.Name):
        return values.get(value.value, [])
    return []


def _elements(call: cst.Call) -> list[cst.BaseExpression] | None:
    """Elements of a container built from a literal list or from arguments; None for a comprehension."""
    if not call.args:
        return []
    if len(call.args) == 1 and isinstance(call.args[0].value, (cst.List, cst.Tuple)):
        return [e.value for e in call.args[0].value.elements]
    if any(isinstance(a.value, (cst.ListComp, cst.GeneratorExp)) or a.star for a in call.args):
        return None
    return [a.value for a in call.args]
