"""Rules against an immutable snapshot give a plan: edits, findings and one status per site.

All rules of a stratum see the same snapshot, so their order can't matter. Two edits of one place are an error that
names both rules (PORT201), except where they agree, or where one splices the place of the other exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import libcst as cst
from msgspec import Struct

from porter.engine.edits import Add, AddDefinition, Code, Edit, Insert, Planned, Remove, RemoveDefinition, Replace
from porter.engine.finding import sites
from porter.engine.index import Index, IndexCache
from porter.engine.registry import FACTS, FactSite
from porter.engine.rule import Rule
from porter.engine.settle import Settlement, settle
from porter.model import Definition, Diagnostic, SiteStatus, Span, Unit
from porter.source.tree import normal


class Plan(Struct, frozen=True):
    """What a stratum would do. `edits` are free of conflicts; those that are not are in `conflicts` (and `diagnostics`)."""

    edits: tuple[Planned, ...]
    diagnostics: tuple[Diagnostic, ...]
    statuses: tuple[SiteStatus, ...]
    conflicts: tuple[Diagnostic, ...]


def plan(unit: Unit, rules: Sequence[Rule], cache: IndexCache | None = None) -> Plan:
    """Plan all rules of one stratum against `unit`. Pure: nothing is changed.

    The unit's trees must hold each node once; `run_rules` sees to that.
    """
    cache = cache or IndexCache()
    indexes = [cache.index(d) for d in unit.definitions]
    known: dict[str, tuple[FactSite, ...]] = {}

    def facts(name: str) -> Iterable[FactSite]:
        if name not in known:
            known[name] = tuple(FACTS[name](unit))
        return known[name]

    settled = [settle(s, r, unit) for r in sorted(rules, key=lambda r: r.id) for s in sites(r, unit, indexes, facts)]
    return _Checker(indexes, settled).plan()


@dataclass(slots=True)
class _Claim:
    """A region that an edit replaces or removes, and what of it survives as a splice."""

    planned: Planned
    captured: dict[int, int]


class _Checker:
    """Merges equal edits and finds the sites whose edits can't stand together."""

    def __init__(self, indexes: list[Index], settled: list[Settlement]) -> None:
        self.indexes = {i.definition.name: i for i in indexes}
        self.settled = settled
        self.claims: dict[int, _Claim] = {}
        self.keys: dict[tuple[str, ...], Planned] = {}
        self.dropped: dict[int, str] = {}
        self.failed: set[int] = set()
        self.conflicts: list[Diagnostic] = []

    def plan(self) -> Plan:
        planned = [p for number, s in enumerate(self.settled) for e in s.edits if (p := self._planned(e, number, s))]
        unique = [p for p in planned if self._claim(p)]
        for each in unique:
            self._check(each)
        bad = self.failed | set(self.dropped)
        edits = tuple(p for p in unique if p.site not in bad)
        found = [d for n, s in enumerate(self.settled) if n not in bad for d in s.diagnostics]
        statuses = tuple(self._status(n, s) for n, s in enumerate(self.settled))
        return Plan(edits, tuple(dict.fromkeys([*found, *self.conflicts])), statuses, tuple(self.conflicts))

    def _status(self, number: int, settled: Settlement) -> SiteStatus:
        status = settled.status
        if number in self.failed:
            return SiteStatus(status.rule, status.span, "diagnosed", "its edits conflict with another rule's")
        if number in self.dropped:
            return SiteStatus(status.rule, status.span, "applied", self.dropped[number])
        return status

    def _planned(self, edit: Edit, number: int, settled: Settlement) -> Planned | None:
        if isinstance(edit, (Replace, Remove)) and not edit.nodes:
            return None
        index = settled.site.index
        if isinstance(edit, RemoveDefinition):
            if edit.name not in self.indexes:
                raise LookupError(f"{settled.site.rule} removes {edit.name}, which is no definition of the unit")
            return Planned(edit, settled.site.rule, number, edit.name)
        anchor = _anchor(edit)
        if anchor is not None and anchor not in index:
            index = next((i for i in self.indexes.values() if anchor in i), index)
        return Planned(edit, settled.site.rule, number, index.definition.name, settled.site.statement)

    def _index(self, planned: Planned) -> Index:
        return self.indexes[planned.definition]

    def _claim(self, planned: Planned) -> bool:
        """Note what an edit claims. False if an equal edit did so before."""
        edit = planned.edit
        if isinstance(edit, (Insert, Add)):
            if not edit.key:
                return True
            key = (planned.definition, *edit.key)
            before = self.keys.setdefault(key, planned)
            if before is planned:
                return True
            if _content(before.edit) != _content(edit):
                self._conflict(planned, before, "PORT202", f"want different values for {' '.join(edit.key)}")
            return False
        if not isinstance(edit, (Replace, Remove, RemoveDefinition)):
            return True
        index = self._index(planned)
        captured = dict(edit.code.captures(index.__contains__)) if isinstance(edit, Replace) else {}
        claim, fresh = _Claim(planned, captured), True
        for node in (index.root,) if isinstance(edit, RemoveDefinition) else edit.nodes:
            before_claim = self.claims.setdefault(id(node), claim)
            if before_claim is not claim and before_claim.planned is not planned:
                fresh = False
                if not _agree(before_claim.planned.edit, edit):
                    self._conflict(planned, before_claim.planned, "PORT201", "edit the same place")
        return fresh

    def _check(self, planned: Planned) -> None:
        """Look outwards from an edit for a region that another edit takes away."""
        anchor = _anchor(planned.edit)
        if anchor is None:
            return
        index = self._index(planned)
        passed = [id(anchor)]
        inside = [anchor, *index.ancestors(anchor)] if isinstance(planned.edit, Add) else list(index.ancestors(anchor))
        for above in inside:
            claim = self.claims.get(id(above))
            if claim is not None and claim.planned is not planned:
                spliced = sum(claim.captured.get(i, 0) for i in (*passed, id(above)))
                if spliced != 1:
                    if claim.planned.rule == planned.rule and spliced == 0:
                        self.dropped[planned.site] = "inside a region that another site of this rule replaces"
                    else:
                        self._conflict(planned, claim.planned, "PORT201", "edit overlapping places")
                    return
            passed.append(id(above))

    def _conflict(self, one: Planned, other: Planned, code: str, what: str) -> None:
        self.failed |= {one.site, other.site}
        spans = [self._span(one), self._span(other)]
        rules = sorted({one.rule, other.rule})
        who = f"{rules[0]} and {rules[1]}" if len(rules) == 2 else f"two sites of {rules[0]}"
        advice = f"let one run first: `after: [{rules[0]}]` in {rules[1]}" if len(rules) == 2 else None
        found = Diagnostic(code, f"{who} {what} ({spans[0]} and {spans[1]})", spans[0], one.rule, (spans[1],), advice)
        if found not in self.conflicts:
            self.conflicts.append(found)

    def _span(self, planned: Planned) -> Span:
        anchor = _anchor(planned.edit)
        found = self._index(planned).span(anchor) if anchor is not None else None
        return found or self.settled[planned.site].site.span


def _anchor(edit: Edit) -> cst.CSTNode | None:
    if isinstance(edit, (Replace, Remove)):
        return edit.nodes[0]
    if isinstance(edit, Insert):
        return edit.anchor
    return edit.parent if isinstance(edit, Add) else None


def _content(edit: Edit) -> list[str]:
    if isinstance(edit, (Replace, Insert, Add)):
        return _text(edit.code)
    return []


def _text(code: Code) -> list[str]:
    return [normal(n) for n in code.build(lambda n: n, lambda n: False)]


def _agree(one: Edit, other: Edit) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, RemoveDefinition):
        return True
    same_nodes = [id(n) for n in one.nodes] == [id(n) for n in other.nodes]  # type: ignore[union-attr]
    return isinstance(one, Remove) or (same_nodes and _content(one) == _content(other))


def definitions_added(edits: Iterable[Planned]) -> list[Definition]:
    """Definitions a plan adds, for reports."""
    return [p.edit.definition for p in edits if isinstance(p.edit, AddDefinition)]
