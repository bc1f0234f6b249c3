"""Methods, properties and class attributes of a pipeline class, looked up through its Diffusers bases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache

import libcst as cst
from msgspec import Struct

from porter.model import Definition, Unknown
from porter.source.library import Library
from porter.source.names import referenced
from porter.source.tree import body, find

FRAMEWORK = frozenset(
    {"diffusers.pipelines.pipeline_utils.DiffusionPipeline", "diffusers.configuration_utils.ConfigMixin"}
)
"""Bases whose members belong to Diffusers' own runtime (loading, devices, progress bars): never part of a port."""


class Members(Struct, frozen=True, dict=True):
    """A pipeline class and its bases, nearest first."""

    classes: tuple[Definition, ...]

    @property
    def cls(self) -> Definition:
        return self.classes[0]

    def owner_of(self, name: str) -> Definition | None:
        """The nearest class that defines a method of that name."""
        return next((c for c in self.classes if name in self._methods[c.name]), None)

    def method(self, name: str) -> cst.FunctionDef | None:
        """The method or property of that name, from the nearest class."""
        owner = self.owner_of(name)
        return self._methods[owner.name][name] if owner is not None else None

    @cached_property
    def _methods(self) -> dict[str, dict[str, cst.FunctionDef]]:
        return {c.name: {m.name.value: m for m in body(c.node) if isinstance(m, cst.FunctionDef)} for c in self.classes}

    def class_value(self, name: str) -> cst.BaseExpression | None:
        """Value of a class attribute."""
        for cls in self.classes:
            for stmt in body(cls.node):
                if isinstance(stmt, cst.SimpleStatementLine) and isinstance(stmt.body[0], cst.Assign):
                    if any(isinstance(t.target, cst.Name) and t.target.value == name for t in stmt.body[0].targets):
                        return stmt.body[0].value
        return None

    def class_statement(self, name: str) -> cst.SimpleStatementLine | None:
        """The statement that sets a class attribute."""
        for cls in self.classes:
            for stmt in body(cls.node):
                if isinstance(stmt, cst.SimpleStatementLine) and isinstance(stmt.body[0], (cst.Assign, cst.AnnAssign)):
                    first = stmt.body[0]
                    targets = [t.target for t in first.targets] if isinstance(first, cst.Assign) else [first.target]
                    if any(isinstance(t, cst.Name) and t.value == name for t in targets):
                        return stmt
        return None

    def names(self) -> Iterator[str]:
        """Names of all methods and properties, nearest class first."""
        for cls in self.classes:
            yield from self._methods[cls.name]


def members(library: Library, name: str) -> Members | Unknown:
    """The class of that qualified name with every Diffusers base below the framework's own."""
    found: list[Definition] = []
    queue = [library.canonical(name)]
    while queue:
        current = queue.pop(0)
        if current in FRAMEWORK or any(f"{d.module}.{d.name}" == current for d in found):
            continue
        definition = library.definition(current)
        if isinstance(definition, Unknown):
            if not found:
                return definition
            continue
        if not isinstance(definition.node, cst.ClassDef):
            return Unknown(f"{current} is not a class")
        found.append(definition)
        bases = [referenced(arg.value) for arg in definition.node.bases]
        queue[:0] = [b for b in bases if b is not None and b.startswith("diffusers.pipelines.")]
    return Members(tuple(found))


def is_property(function: cst.FunctionDef) -> bool:
    """Whether a method is read as an attribute."""
    return any(isinstance(d.decorator, cst.Name) and d.decorator.value == "property" for d in function.decorators)


@lru_cache(maxsize=16384)
def self_reads(node: cst.CSTNode) -> frozenset[str]:
    """Names `x` of every `self.x` and `getattr(self, "x", ...)` below a node."""
    found: set[str] = set()
    for each in find(node, cst.Attribute, cst.Call):
        if isinstance(each, cst.Attribute) and isinstance(each.value, cst.Name) and each.value.value == "self":
            found.add(each.attr.value)
        elif (
            isinstance(each, cst.Call) and isinstance(each.func, cst.Name) and each.func.value in ("getattr", "hasattr")
        ):
            if len(each.args) > 1 and isinstance(each.args[0].value, cst.Name) and each.args[0].value.value == "self":
                if isinstance(each.args[1].value, cst.SimpleString):
                    found.add(str(each.args[1].value.evaluated_value))
    return frozenset(found)


__all__ = ["FRAMEWORK", "Members", "is_property", "members", "self_reads"]
