"""A site: one place a rule must account for, with everything its cases may ask about."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst
from msgspec import Struct, field
from msgspec.structs import replace

from porter.engine.index import Index
from porter.engine.text import CodeError
from porter.model import Definition, Span, Unit

IMPLICIT = frozenset({"site", "class", "function", "statement"})
"""Bindings every site has: the matched node and the class, function and statement around it."""


class Site(Struct, frozen=True):
    """One place found by `on`.

    `trigger` is the node `on` found; `nodes` is the region the case's `match` covers (the trigger, if there is none).
    `bindings` maps `name` and `name.field` to nodes, tuples of nodes or plain values.
    """

    rule: str
    unit: Unit
    index: Index
    trigger: cst.CSTNode
    nodes: tuple[cst.CSTNode, ...]
    bindings: Mapping[str, object] = field(default_factory=dict)

    @property
    def node(self) -> cst.CSTNode:
        return self.nodes[0]

    @property
    def definition(self) -> Definition:
        return self.index.definition

    @property
    def span(self) -> Span:
        return self.index.span(self.trigger) or Span(self.definition.file, 1)

    @property
    def owner(self) -> cst.ClassDef | None:
        """The class around the site, or the site itself."""
        return self.index.enclosing(self.node, cst.ClassDef)  # type: ignore[return-value]

    @property
    def function(self) -> cst.FunctionDef | None:
        return self.index.enclosing(self.node, cst.FunctionDef)  # type: ignore[return-value]

    @property
    def statement(self) -> cst.BaseStatement | None:
        return self.index.statement(self.node)

    def narrowed(self, nodes: tuple[cst.CSTNode, ...], captures: Mapping[str, object]) -> Site:
        """The same site, with the region and captures of a match."""
        return replace(self, nodes=nodes, bindings={**self.bindings, **captures})

    def lookup(self, path: str) -> object:
        """The value of `name` or `name.field`. Raises CodeError if there is none."""
        if path in self.bindings:
            return self.bindings[path]
        root, _, rest = path.partition(".")
        value = self.bindings[root] if root in self.bindings else self._implicit(root)
        for each in rest.split(".") if rest else ():
            value = _field(value, each)
        return value

    def _implicit(self, name: str) -> object:
        if name == "site":
            return self.node if len(self.nodes) == 1 else self.nodes
        if name in ("class", "function", "statement"):
            return self.owner if name == "class" else getattr(self, name)
        raise CodeError(f"${name} is not bound at this site")


def _field(value: object, name: str) -> object:
    if name == "name" and isinstance(value, (cst.ClassDef, cst.FunctionDef)):
        return value.name.value
    found = getattr(value, name, None) if isinstance(value, cst.CSTNode) else None
    if found is None:
        raise CodeError(f"there is no field `{name}` here")
    return found


def qualified_bases(owner: cst.ClassDef) -> list[str | None]:
    """Qualified name of each base; None for one that is not a plain global name."""
    from porter.source.names import DOT

    names: list[str | None] = []
    for arg in owner.bases:
        value = arg.value
        if isinstance(value, cst.Name):
            names.append(value.value.replace(DOT, ".") if DOT in value.value else value.value)
        else:
            names.append(None)
    return names


def derives(owner: cst.ClassDef, wanted: frozenset[str], unit: Unit) -> bool:
    """Whether a class derives from one of these, through classes of the unit."""
    by_name = {f"{d.module}.{d.name}": d.node for d in unit.definitions if isinstance(d.node, cst.ClassDef)}
    seen: set[str] = set()
    todo = [b for b in qualified_bases(owner) if b]
    while todo:
        name = todo.pop()
        if name in wanted:
            return True
        if name not in seen and name in by_name:
            seen.add(name)
            todo += [b for b in qualified_bases(by_name[name]) if b]
    return False
