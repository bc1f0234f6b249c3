"""Run rules over a unit: per phase and stratum, plan on a snapshot, then apply once."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from porter.engine.apply import apply
from porter.engine.edits import Planned
from porter.engine.index import IndexCache
from porter.engine.load import RuleSet
from porter.engine.plan import plan
from porter.engine.schema import PHASES, Phase, Scope
from porter.model import Diagnostic, PorterError, SiteStatus, Unit


class Outcome(Struct, frozen=True):
    """The unit after the rules, what they found, how every site ended, and what they edited."""

    unit: Unit
    diagnostics: tuple[Diagnostic, ...]
    statuses: tuple[SiteStatus, ...]
    edits: tuple[Planned, ...]
    conflicts: tuple[Diagnostic, ...] = ()
    """Edits that can't stand together, which were not made; they are among the diagnostics, too."""


class RuleConflict(PorterError):
    """Two rules want different things in one place: the rules are at fault, not the source."""


def refuse_conflicts(outcome: Outcome) -> None:
    """Raise RuleConflict if edits of rules can't stand together."""
    if outcome.conflicts:
        raise RuleConflict(*outcome.conflicts)


def run_rules(
    unit: Unit, rules: RuleSet, phase: Phase | None = None, scope: Scope = "any", cache: IndexCache | None = None
) -> Outcome:
    """Run the rules of one phase (or of all, in order) whose scope is `scope` or `any`.

    Hand the same `cache` to successive calls of one conversion: what did not change is not indexed again.
    """
    cache = cache or IndexCache()
    found: dict[Diagnostic, None] = {}
    statuses: list[SiteStatus] = []
    edits: list[Planned] = []
    conflicts: list[Diagnostic] = []
    for each in PHASES if phase is None else (phase,):
        for stratum in rules.strata(each, scope):
            unit = unshared(unit, cache)
            step = plan(unit, stratum, cache)
            unit = apply(unit, step.edits, cache) if step.edits else unit
            found.update(dict.fromkeys(step.diagnostics))
            statuses += step.statuses
            edits += step.edits
            conflicts += step.conflicts
    return Outcome(unit, tuple(found), tuple(statuses), tuple(edits), tuple(conflicts))


def unshared(unit: Unit, cache: IndexCache) -> Unit:
    """The unit with each node once; the very same one if it is so already, for what is known about it is kept by it."""
    definitions = tuple(cache.unshared(d) for d in unit.definitions)
    changed = any(new is not old for new, old in zip(definitions, unit.definitions, strict=True))
    return replace(unit, definitions=definitions) if changed else unit
