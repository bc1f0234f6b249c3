"""Edits: what rules and ops return. They name nodes of an immutable snapshot by identity; `apply` carries them out.

Rules and ops return only these; nothing else changes a tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import libcst as cst
from msgspec import Struct

from porter.engine.text import Template, rewrite
from porter.model import Definition

Rebuild = Callable[[cst.CSTNode], Any]


class Code(Struct, frozen=True):
    """New code: a template with its bindings, or nodes. Snapshot nodes inside come with the edits made to them."""

    template: Template | None = None
    lookup: Callable[[str], Any] | None = None
    as_statements: bool = False
    nodes: tuple[cst.CSTNode, ...] = ()

    @classmethod
    def of(cls, *nodes: cst.CSTNode) -> Code:
        """Code that an op built; it may hold nodes of the snapshot."""
        return cls(nodes=nodes, as_statements=bool(nodes) and isinstance(nodes[0], cst.BaseStatement))

    def build(self, rebuild: Rebuild, known: Callable[[cst.CSTNode], bool]) -> list[cst.CSTNode]:
        """The new nodes; each spliced snapshot node goes through `rebuild`."""
        if self.template is None or self.lookup is None:
            made: list[cst.CSTNode] = []
            for node in self.nodes:
                new = rewrite(node, lambda each, _: rebuild(each) if known(each) else NotImplemented)
                made.extend(new) if isinstance(new, list) else made.append(new)
            return made
        lookup = self.lookup

        def edited(path: str) -> Any:  # noqa: ANN401 - a binding
            value = lookup(path)
            if isinstance(value, cst.CSTNode) and known(value):
                return rebuild(value)
            if isinstance(value, (tuple, list)):
                new = [rebuild(v) if isinstance(v, cst.CSTNode) and known(v) else v for v in value]
                return tuple(n for each in new for n in (each if isinstance(each, list) else [each]))
            return value

        if self.as_statements:
            return list(self.template.statements(edited))
        return [self.template.expression(edited)]

    def captures(self, known: Callable[[cst.CSTNode], bool]) -> Counter[int]:
        """How often each snapshot node (topmost) is spliced."""
        found: Counter[int] = Counter()

        def note(node: cst.CSTNode) -> cst.CSTNode:
            found[id(node)] += 1
            return node

        self.build(note, known)
        return found


class Replace(Struct, frozen=True):
    """Neighbouring nodes give way to new code."""

    nodes: tuple[cst.CSTNode, ...]
    code: Code


class Remove(Struct, frozen=True):
    """Statements, arguments, elements, parameters or decorators go."""

    nodes: tuple[cst.CSTNode, ...]


class Insert(Struct, frozen=True):
    """Statements before or after a statement. `key` makes it idempotent: two inserts of one key must agree."""

    anchor: cst.BaseStatement
    code: Code
    after: bool = True
    key: tuple[str, ...] = ()


class Add(Struct, frozen=True):
    """One item more in a list of the tree: `field` of `parent` (args, bases, params, kwonly_params, decorators)."""

    parent: cst.CSTNode
    field: str
    code: Code
    position: int = -1
    key: tuple[str, ...] = ()


class AddDefinition(Struct, frozen=True):
    """A new top-level definition, before the named one or at the end."""

    definition: Definition
    before: str | None = None


class RemoveDefinition(Struct, frozen=True):
    """A top-level definition goes."""

    name: str


Edit = Replace | Remove | Insert | Add | AddDefinition | RemoveDefinition


class Planned(Struct, frozen=True):
    """An edit with its origin: the rule, a number of the site within the plan, and the definition it belongs to."""

    edit: Edit
    rule: str
    site: int
    definition: str
    origin: cst.BaseStatement | None = None


def replaced(node: cst.CSTNode | Sequence[cst.CSTNode], *new: cst.CSTNode) -> Replace:
    """For ops: `node` (or a run of statements) becomes `new`."""
    nodes = tuple(node) if isinstance(node, (list, tuple)) else (node,)
    return Replace(nodes, Code.of(*new))  # type: ignore[arg-type]


def removed(*nodes: cst.CSTNode) -> Remove:
    """For ops: these nodes go."""
    return Remove(nodes)


def inserted(anchor: cst.BaseStatement, new: Iterable[cst.BaseStatement], *, after: bool = True) -> Insert:
    """For ops: statements beside `anchor`."""
    return Insert(anchor, Code.of(*new), after)
