"""The model as a program: which classes it builds, with what arguments, and how they are called.

A `Spec` is one class of the model specialised to the constructor sites that agree in structure: `None` or not, booleans
and strings. An attention class built once for self attention and once for cross attention is two specs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import libcst as cst

from porter.model import Definition
from porter.specialise.values import TOP, Const, Instance, Opaque, Ref, Value, join

Key = tuple[object, ...]


@dataclass(eq=False)
class Spec:
    """One specialised class. `definition` is a clone of its own, so facts recorded on its nodes are about it alone."""

    key: Key
    qualified: str
    definition: Definition
    bases: tuple[Definition, ...] = ()
    processor: str | None = None
    attributes: dict[str, Value] = field(default_factory=dict)
    unset: set[str] = field(default_factory=set)
    init: dict[str, Value] = field(default_factory=dict)
    calls: dict[str, dict[str, Value]] = field(default_factory=dict)
    slots: set[tuple[str, str]] = field(default_factory=set)
    name: str = ""
    variadic: bool = False

    def __repr__(self) -> str:
        return f"<{self.qualified} {id(self):x}>"

    def method(self, name: str) -> cst.FunctionDef | None:
        """A method of the class or of a base that is part of the source."""
        for each in (self.definition, *self.bases):
            if isinstance(each.node, cst.ClassDef):
                for item in each.node.body.body:
                    if isinstance(item, cst.FunctionDef) and item.name.value == name:
                        return item
        return None

    def class_attribute(self, name: str) -> cst.BaseExpression | None:
        """The expression assigned to a class attribute."""
        for each in (self.definition, *self.bases):
            for item in each.node.body.body:
                if isinstance(item, cst.SimpleStatementLine):
                    for small in item.body:
                        if isinstance(small, cst.Assign) and isinstance(small.targets[0].target, cst.Name):
                            if small.targets[0].target.value == name:
                                return small.value
                        if isinstance(small, cst.AnnAssign) and isinstance(small.target, cst.Name) and small.value:
                            if small.target.value == name:
                                return small.value
        return None


@dataclass
class Record:
    """What the last run of the interpreter saw, by identity of the node it is about."""

    truth: dict[int, bool | None] = field(default_factory=dict)
    constructors: dict[int, Spec] = field(default_factory=dict)
    calls: dict[int, tuple[Spec, str]] = field(default_factory=dict)
    choices: dict[int, tuple[Spec, ...]] = field(default_factory=dict)
    empty_stars: dict[int, bool] = field(default_factory=dict)
    constants: dict[int, Value] = field(default_factory=dict)

    def see_truth(self, node: cst.CSTNode, outcome: bool | None) -> None:
        seen = self.truth.get(id(node), outcome)
        self.truth[id(node)] = outcome if seen == outcome else None

    def see_value(self, node: cst.CSTNode, value: Value) -> None:
        seen = self.constants.get(id(node))
        self.constants[id(node)] = value if seen is None else join(seen, value)


def structural(arguments: Mapping[str, Value]) -> Key:
    """The part of constructor arguments that decides structure."""

    def part(value: Value) -> object:
        if isinstance(value, Const):
            # Numbers shape nothing; a string or flag selects code.
            return ("const", value.value) if isinstance(value.value, (bool, str, type(None))) else "given"
        if isinstance(value, (Opaque, Ref)):
            return value
        if isinstance(value, Instance):
            return value.spec.key
        return "unknown" if value == TOP else "given"

    return tuple(sorted((name, part(value)) for name, value in arguments.items() if name != "dropout"))
