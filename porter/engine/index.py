"""An index of one definition: its nodes by class, by called or referenced name, by attribute, and everyone's parent.

Methods are indexed separately and kept by identity: applying edits copies only the path to what changed, so after a
stratum only the methods that were touched are read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import libcst as cst

from porter.model import Definition, Span
from porter.source.marks import mark_of
from porter.source.names import DOT
from porter.source.tree import children, clone


@dataclass(slots=True)
class _Fragment:
    root: cst.CSTNode
    parents: dict[int, cst.CSTNode] = field(default_factory=dict)
    kinds: dict[type, list[cst.CSTNode]] = field(default_factory=dict)
    references: dict[str, list[cst.CSTNode]] = field(default_factory=dict)
    calls: dict[str, list[cst.CSTNode]] = field(default_factory=dict)
    attributes: dict[str, list[cst.CSTNode]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    repeated: bool = False


def _scan(root: cst.CSTNode, stop: frozenset[int] = frozenset()) -> _Fragment:
    result = _Fragment(root)
    parents, kinds, references, order = result.parents, result.kinds, result.references, result.order
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        kind = type(node)
        order.append(id(node))
        if kind in kinds:
            kinds[kind].append(node)
        else:
            kinds[kind] = [node]
        if kind is cst.Name:
            if DOT in node.value:
                references.setdefault(node.value, []).append(node)
            continue
        if kind is cst.Call:
            func = node.func
            if type(func) is cst.Name:
                result.calls.setdefault(func.value, []).append(node)
        elif kind is cst.Attribute:
            result.attributes.setdefault(node.attr.value, []).append(node)
        if id(node) in stop:
            continue
        below = children(node)
        below.reverse()
        for child in below:
            if id(child) in parents:
                result.repeated = True
            parents[id(child)] = node
            stack.append(child)
    return result


class Index:
    """Lookup tables of one definition's tree."""

    def __init__(self, definition: Definition, fragments: list[_Fragment]) -> None:
        self.definition = definition
        self.root = definition.node
        self.parents: dict[int, cst.CSTNode] = {}
        self.repeated = any(f.repeated for f in fragments)
        total = 0
        for each in fragments:
            total += len(each.parents)
            self.parents.update(each.parents)
        self.repeated = self.repeated or total != len(self.parents)
        self._fragments = fragments

    @cached_property
    def position(self) -> dict[int, int]:
        """Identity of each node -> its place in source order."""
        return {node: n for n, node in enumerate(i for f in self._fragments for i in f.order)}

    def _table(self, name: str, key: object) -> list[cst.CSTNode]:
        return [n for f in self._fragments for n in getattr(f, name).get(key, ())]

    def of_kind(self, kind: type) -> list[cst.CSTNode]:
        """Nodes of exactly this class."""
        return self._table("kinds", kind)

    def references(self, absolute_name: str) -> list[cst.CSTNode]:
        return self._table("references", absolute_name)

    def referenced_names(self) -> set[str]:
        """Every absolute name that occurs."""
        return {name for f in self._fragments for name in f.references}

    def calls(self, name: str) -> list[cst.CSTNode]:
        """Calls whose function is written as this one name."""
        return self._table("calls", name)

    def attributes(self, name: str) -> list[cst.CSTNode]:
        return self._table("attributes", name)

    def has(self, required: str) -> bool:
        """Whether an absolute name, or an attribute written `.name`, occurs at all."""
        table, key = ("attributes", required[1:]) if required.startswith(".") else ("references", required)
        return any(key in getattr(f, table) for f in self._fragments)

    def __contains__(self, node: cst.CSTNode) -> bool:
        return node is self.root or id(node) in self.parents

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return self.parents.get(id(node))

    def ancestors(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """Parents of a node, nearest first."""
        found = self.parents.get(id(node))
        while found is not None:
            yield found
            found = self.parents.get(id(found))

    def enclosing(self, node: cst.CSTNode, *kinds: type) -> cst.CSTNode | None:
        """The node itself or its nearest ancestor of these classes."""
        if isinstance(node, kinds):
            return node
        return next((a for a in self.ancestors(node) if isinstance(a, kinds)), None)

    def statement(self, node: cst.CSTNode) -> cst.BaseStatement | None:
        """The statement a node is part of (itself, if it is one)."""
        return self.enclosing(node, cst.BaseStatement)  # type: ignore[return-value]

    def span(self, node: cst.CSTNode) -> Span | None:
        """The source line a node came from, by the marks of the statements around it."""
        for each in (node, *self.ancestors(node)):
            if isinstance(each, cst.BaseStatement) and (mark := mark_of(each)) is not None:
                return Span(mark.file, mark.line)
        return Span(self.definition.file, 1) if self.definition.file else None


class IndexCache:
    """Indexes by identity of the trees. One per run: it holds the trees, so no identity is used twice."""

    def __init__(self) -> None:
        self._fragments: dict[int, _Fragment] = {}
        self._indexes: dict[int, Index] = {}

    def index(self, definition: Definition) -> Index:
        """The index of a definition. Its tree must hold each node object once; see `unshared`."""
        found = self._indexes.get(id(definition.node))
        if found is None or found.root is not definition.node:
            found = Index(definition, self._scan(definition.node))
            self._indexes[id(definition.node)] = found
        return found

    def unshared(self, definition: Definition) -> Definition:
        """The definition, deep-copied if some node object occurs in it twice (then identity would be ambiguous)."""
        if not self.index(definition).repeated:
            return definition
        return definition.with_node(clone(definition.node))

    def _scan(self, root: cst.CSTNode) -> list[_Fragment]:
        if not (isinstance(root, cst.ClassDef) and isinstance(root.body, cst.IndentedBlock)):
            return [self._fragment(root)]
        members = root.body.body
        shell = _scan(root, frozenset(id(m) for m in members))
        for each in members:  # the shell stops at members, each has its own fragment
            _forget(shell, each)
        return [shell, *(self._fragment(m) for m in members)]

    def _fragment(self, node: cst.CSTNode) -> _Fragment:
        found = self._fragments.get(id(node))
        if found is None or found.root is not node:
            found = self._fragments[id(node)] = _scan(node)
        return found


def _forget(shell: _Fragment, member: cst.CSTNode) -> None:
    listed = shell.kinds.get(type(member), [])
    shell.kinds[type(member)] = [n for n in listed if n is not member]
