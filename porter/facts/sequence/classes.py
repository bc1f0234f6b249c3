"""Classes and functions the analysis looks into: those of the unit, and those the port imports from the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import libcst as cst

from porter.facts.module_tree import ClassModules, module_tree
from porter.facts.sequence.values import FIXED, OTHER, Instance, Modules, Partial, Value, merged
from porter.model import Definition, Unit
from porter.source import tree
from porter.source.library import Library
from porter.source.names import qualified


@dataclass
class Classes:
    """Lookup of classes by their name in the unit or qualified name, and of functions by qualified name."""

    unit: Mapping[str, ClassModules]
    library: Library | None
    _loaded: dict[str, ClassModules | None] = field(default_factory=dict)
    _own: dict[str, str] = field(default_factory=dict)
    _parameters: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = {f"{m.definition.module}.{n}": n for n, m in self.unit.items()}

    def canonical(self, name: str) -> str:
        """Name of a class of the unit by either of its names, else the name itself."""
        return self._own.get(name, name)

    def find(self, name: str) -> ClassModules | None:
        name = self.canonical(name)
        if name in self.unit:
            return self.unit[name]
        if name not in self._loaded:
            found = self._definition(name)
            modules = module_tree(Unit((found,), found.name)) if found and isinstance(found.node, cst.ClassDef) else {}
            self._loaded[name] = next(iter(modules.values()), None)
        return self._loaded[name]

    def function(self, name: str) -> cst.FunctionDef | None:
        found = self._definition(name)
        return found.node if found is not None and isinstance(found.node, cst.FunctionDef) else None

    def table(self, name: str) -> cst.Dict | None:
        """The dictionary a global of the library is bound to."""
        found = self._definition(name)
        small = found.node.body[0] if found is not None and isinstance(found.node, cst.SimpleStatementLine) else None
        value = getattr(small, "value", None)
        return value if isinstance(value, cst.Dict) else None

    def _definition(self, name: str) -> Definition | None:
        if self.library is None or not name.startswith("diffusers."):
            return None
        found = self.library.definition(name)
        return found if isinstance(found, Definition) else None

    def method(self, cls: str, name: str) -> cst.FunctionDef | None:
        """A method of the class or of the first base that has it."""
        modules = self.find(cls)
        if modules is None or not isinstance(modules.definition.node, cst.ClassDef):
            return None
        node = modules.definition.node
        found = tree.method(node, name)
        if found is not None:
            return found
        for base in node.bases:
            inherited = qualified(base.value.value) if isinstance(base.value, cst.Name) else None
            if inherited and (found := self.method(inherited, name)) is not None:
                return found
        return None

    def attribute(self, instance: Instance, name: str) -> Value:
        """Value of `instance.name`."""
        value: Value | None = None
        for cls in instance.classes:
            found = self._attribute(cls, name)
            value = found if value is None else merged(value, found)
        return value if value is not None else OTHER

    def _attribute(self, cls: str, name: str) -> Value:
        modules = self.find(cls)
        if modules is None:
            return FIXED if name in ("weight", "bias") else OTHER
        if sites := modules.at(name):
            return Instance(tuple(dict.fromkeys(self.canonical(s.cls) for s in sites)))
        chain = [Instance(tuple(dict.fromkeys(self.canonical(s.cls) for s in modules.at(p))))
                 for p in modules.elements(name)]  # fmt: skip
        if chain:
            element = Instance(tuple(dict.fromkeys(c for each in chain for c in each.classes)))
            return Modules(element, () if f"{name}.*" in modules.sites else tuple(chain))
        if self.method(cls, name) is not None:
            return Partial(name, cls)
        return FIXED if name in self._tensors(cls, modules) else OTHER

    def _tensors(self, cls: str, modules: ClassModules) -> frozenset[str]:
        """Attributes that hold parameters and buffers: they have no token axis."""
        if cls not in self._parameters:
            init = tree.method(modules.definition.node, "__init__")  # type: ignore[arg-type]
            found: set[str] = set()
            for line in tree.find(init, cst.Assign) if init is not None else ():
                attribute = tree.self_attribute(line.targets[0].target)
                if attribute and any(
                    (tree.call_name(c) or "").endswith("Parameter") for c in tree.find(line, cst.Call)
                ):
                    found.add(attribute)
            for call in tree.find(init, cst.Call) if init is not None else ():
                name = call.args[0].value if tree.call_name(call) == "self.register_buffer" and call.args else None
                if isinstance(name, cst.SimpleString):
                    found.add(str(tree.literal_value(name.value)))
            self._parameters[cls] = frozenset(found)
        return self._parameters[cls]
