"""Carry out a set of edits, once, on the snapshot they were planned against.

Only the path from the root to what changes is copied, so untouched methods keep their identity and their index. Every
statement an edit touched gets the rule's id appended to its mark.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
from msgspec.structs import replace

from porter.engine.edits import Add, AddDefinition, Insert, Planned, Remove, RemoveDefinition, Replace
from porter.engine.index import Index, IndexCache
from porter.model import Definition, Unit
from porter.source.marks import Mark, inherit, mark_of, with_mark
from porter.source.tree import changed, code_fields

_LAYOUT = (
    cst.BaseParenthesizableWhitespace,
    cst.Comma,
    cst.TrailingWhitespace,
    cst.EmptyLine,
    cst.Newline,
    cst.Comment,
)


def apply(unit: Unit, edits: Iterable[Planned], cache: IndexCache | None = None) -> Unit:
    """The unit with all edits made. They must come from one `plan` of this very unit, which has checked them."""
    cache = cache or IndexCache()
    by_definition: dict[str, list[Planned]] = defaultdict(list)
    for each in edits:
        by_definition[each.definition].append(each)
    definitions: list[Definition] = []
    for definition in unit.definitions:
        mine = by_definition.get(definition.name, [])
        if any(isinstance(p.edit, RemoveDefinition) for p in mine):
            continue
        tree = [p for p in mine if not isinstance(p.edit, AddDefinition)]
        new = _Application(cache.index(definition), tree).run() if tree else definition.node
        if new is not None:
            definitions.append(definition if new is definition.node else definition.with_node(new))
    for planned in (p for mine in by_definition.values() for p in mine if isinstance(p.edit, AddDefinition)):
        definitions = _with_definition(definitions, planned)
    return replace(unit, definitions=tuple(definitions))


def _with_definition(definitions: list[Definition], planned: Planned) -> list[Definition]:
    edit = planned.edit
    assert isinstance(edit, AddDefinition)
    position = next((i for i, d in enumerate(definitions) if d.name == edit.before), len(definitions))
    marked = edit.definition.with_node(mark_all(edit.definition.node, planned.origin, planned.rule))
    return [*definitions[:position], marked, *definitions[position:]]


def mark_all(node: Any, origin: cst.BaseStatement | Mark | None, rule: str) -> Any:  # noqa: ANN401 - any statement class
    """A new statement and everything in it marked: what has a mark keeps it, the rest stands for `origin`."""
    own = mark_of(node) if isinstance(node, cst.BaseStatement) else None
    here = own or (origin if isinstance(origin, Mark) or origin is None else mark_of(origin))
    if isinstance(node, cst.SimpleStatementLine):
        return inherit(node, here, rule)
    changes: dict[str, object] = {}
    for name in ("body", "orelse", "finalbody", "handlers"):
        value = getattr(node, name, None)
        if isinstance(value, cst.IndentedBlock):
            filled = [mark_all(s, here, rule) if mark_of(s) is None else s for s in value.body]
            changes[name] = value.with_changes(body=filled)
        elif isinstance(value, (cst.Else, cst.Finally, cst.If)):
            changes[name] = mark_all(value, here, rule)
        elif name == "handlers" and value:
            changes[name] = [mark_all(h, here, rule) for h in value]
    node = node.with_changes(**changes) if changes else node
    return inherit(node, here, rule) if isinstance(node, cst.BaseStatement) else node


@dataclass
class _Application:
    """The edits of one definition while they are carried out."""

    index: Index
    edits: list[Planned]
    replaced: dict[int, Planned] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    before: dict[int, list[Planned]] = field(default_factory=lambda: defaultdict(list))
    after: dict[int, list[Planned]] = field(default_factory=lambda: defaultdict(list))
    added: dict[int, list[Planned]] = field(default_factory=lambda: defaultdict(list))
    dirty: set[int] = field(default_factory=set)
    touched: dict[int, dict[str, None]] = field(default_factory=lambda: defaultdict(dict))
    active: set[int] = field(default_factory=set)

    def run(self) -> Any:  # noqa: ANN401 - any definition node, or None
        for planned in self.edits:
            self._register(planned)
        result = self.rebuild(self.index.root)
        if isinstance(result, list):
            return result[0] if result else None
        return result

    def _register(self, planned: Planned) -> None:
        edit = planned.edit
        if isinstance(edit, Replace):
            self.replaced[id(edit.nodes[0])] = planned
            self.gone.update(id(n) for n in edit.nodes[1:])
            self._dirty(edit.nodes, planned.rule)
        elif isinstance(edit, Remove):
            self.gone.update(id(n) for n in edit.nodes)
            self._dirty(edit.nodes, planned.rule)
        elif isinstance(edit, Insert):
            (self.after if edit.after else self.before)[id(edit.anchor)].append(planned)
            self._dirty((edit.anchor,), None)
        elif isinstance(edit, Add):
            self.added[id(edit.parent)].append(planned)
            self._dirty((edit.parent,), planned.rule)

    def _dirty(self, nodes: tuple[cst.CSTNode, ...], rule: str | None) -> None:
        for node in nodes:
            self.dirty.add(id(node))
            for above in self.index.ancestors(node):
                self.dirty.add(id(above))
            if rule is not None:
                statement = self.index.statement(node)
                if statement is not None and not (statement is node and id(node) in self.gone):
                    self.touched[id(statement)][rule] = None

    def rebuild(self, node: cst.CSTNode) -> Any:  # noqa: ANN401 - a node, or a list to splice
        """The node after the edits; a list if it became more or fewer than one."""
        if id(node) not in self.dirty:
            return node
        if id(node) in self.active:  # new code that splices the very node it replaces or stands beside
            return self._inside(node)
        self.active.add(id(node))
        try:
            return self._rebuilt(node)
        finally:
            self.active.discard(id(node))

    def _rebuilt(self, node: cst.CSTNode) -> Any:  # noqa: ANN401
        if id(node) in self.gone:
            new: list[Any] = []
        elif id(node) in self.replaced:
            new = self._replacement(node)
        else:
            new = [self._inside(node)]
        before = [s for p in self.before.get(id(node), ()) for s in self._new(p, node)]
        after = [s for p in self.after.get(id(node), ()) for s in self._new(p, node)]
        result = [*before, *new, *after]
        return result[0] if len(result) == 1 else result

    def _new(self, planned: Planned, anchor: cst.CSTNode) -> list[Any]:
        code = planned.edit.code.build(self.rebuild, self.index.__contains__)  # type: ignore[union-attr]
        origin: Any = planned.origin or anchor
        return [mark_all(s, origin, planned.rule) if isinstance(s, cst.BaseStatement) else s for s in code]

    def _replacement(self, node: cst.CSTNode) -> list[Any]:
        planned = self.replaced[id(node)]
        new = self._new(planned, node)
        if (
            new
            and isinstance(node, cst.BaseStatement)
            and hasattr(node, "leading_lines")
            and hasattr(new[0], "leading_lines")
        ):
            above = [line for line in node.leading_lines if line not in new[0].leading_lines]
            new[0] = new[0].with_changes(leading_lines=[*above, *new[0].leading_lines])
        return new

    def _inside(self, node: cst.CSTNode) -> Any:  # noqa: ANN401
        changes: dict[str, object] = {}
        kind: Any = type(node)
        for name in code_fields(kind):
            value = getattr(node, name)
            if isinstance(value, cst.CSTNode):
                if id(value) in self.dirty and not isinstance(value, _LAYOUT):
                    changes[name] = self._single(self.rebuild(value), name)
            elif isinstance(value, (list, tuple)) and any(id(v) in self.dirty for v in value):
                items: list[Any] = []
                for item in value:
                    new = self.rebuild(item) if id(item) in self.dirty else item
                    items.extend(new) if isinstance(new, list) else items.append(new)
                changes[name] = items
        for planned in self.added.get(id(node), ()):
            edit = planned.edit
            assert isinstance(edit, Add)
            items = list(changes.get(edit.field, getattr(node, edit.field)))  # type: ignore[call-overload]
            new = edit.code.build(self.rebuild, self.index.__contains__)
            position = len(items) if edit.position < 0 else min(edit.position, len(items))
            changes[edit.field] = [*items[:position], *new, *items[position:]]
        return self._finished(node, changes)

    def _finished(self, node: Any, changes: dict[str, Any]) -> Any:  # noqa: ANN401
        if isinstance(node, cst.IndentedBlock) and not changes.get("body", True):
            changes["body"] = [cst.SimpleStatementLine([cst.Pass()])]
        if isinstance(node, cst.SimpleStatementLine) and not changes.get("body", True):
            return []
        if isinstance(node, cst.Parameters) and changes.get("kwonly_params") and not _has_star(node):
            changes["star_arg"] = cst.ParamStar()
        if "params" in changes and isinstance(node, cst.Parameters):
            changes["params"] = [p.with_changes(comma=cst.MaybeSentinel.DEFAULT) for p in changes["params"]]
        if isinstance(node, cst.ClassDef) and "bases" in changes and changes["bases"] and not node.bases:
            changes["lpar"], changes["rpar"] = cst.LeftParen(), cst.RightParen()
        if changes:
            node_ = changed(node, changes)
            rules = self.touched.get(id(node))
            mark = mark_of(node) if rules and isinstance(node, cst.BaseStatement) else None
            if mark is not None and rules:
                names = (*mark.rules, *(r for r in rules if r not in mark.rules))
                node_ = with_mark(node_, Mark(mark.file, mark.line, names))
            return node_
        return node

    def _single(self, new: Any, name: str) -> Any:  # noqa: ANN401
        """What a field that holds one node becomes: an `elif` replaced by statements is an `else` with them."""
        if name == "orelse" and not isinstance(new, (cst.If, cst.Else)):
            items = new if isinstance(new, list) else [new]
            return cst.Else(cst.IndentedBlock(items)) if items else None
        if isinstance(new, list):
            raise ValueError(f"one node is wanted in the field {name}, {len(new)} were given")
        return new


def _has_star(node: cst.Parameters) -> bool:
    return isinstance(node.star_arg, (cst.Param, cst.ParamStar))
