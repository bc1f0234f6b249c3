"""Statement clean-up: the rules of `rules/pipeline` (and those that hold for any code), run over a pipeline's classes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import cast

import libcst as cst
from msgspec import Struct

from porter.engine import RuleSet, load_rules, refuse_conflicts, run_rules
from porter.facts.pipeline import Members
from porter.model import Definition, Diagnostic, SiteStatus, Unit
from porter.source.tree import find, replace_nodes, same, self_attribute, transform

SCOPES = ("pipeline", "any")


class Cleaned(Struct, frozen=True):
    """Definitions after the rules, and how each site ended."""

    definitions: tuple[Definition, ...]
    statuses: tuple[SiteStatus, ...]
    diagnostics: tuple[Diagnostic, ...]


def clean(definitions: Iterable[Definition], ruleset: RuleSet | None) -> Cleaned:
    """Run the normalising rules. Definitions of the same name are kept apart by running one unit per class."""
    rules = ruleset if ruleset is not None else load_rules()
    chosen = rules.only(*(r.id for r in rules.rules if r.spec.scope in SCOPES))
    out: list[Definition] = []
    statuses: list[SiteStatus] = []
    diagnostics: list[Diagnostic] = []
    for definition in definitions:
        unit = Unit((definition,), definition.name)
        outcome = run_rules(unit, chosen, phase="normalize", scope="pipeline")
        refuse_conflicts(outcome)
        out += outcome.unit.definitions
        statuses += outcome.statuses
        diagnostics += outcome.diagnostics
    return Cleaned(tuple(out), tuple(statuses), tuple(diagnostics))


def bind_to_port(members: Members, denoisers: Collection[str], values: Collection[str]) -> Members:
    """What Diffusers keeps elsewhere and a port keeps on itself.

    `self.<denoiser>.dtype` is `self.dtype`: a ported denoiser may hold quantised weights, its dtype is the engine's.
    `self.config.<value>`, registered from the constructor, is `self.<value>`, read from model_index.json.
    """
    classes = []
    for definition in members.classes:
        edits: list[tuple[cst.CSTNode, object]] = []
        for node in find(definition.node, cst.Attribute):
            owner, name = self_attribute(node.value), node.attr.value
            if (name == "dtype" and owner in denoisers) or (owner == "config" and name in values):
                edits.append((node, cst.Attribute(cst.Name("self"), cst.Name(name))))
        for call in find(definition.node, cst.Call):
            if (name := _registered(call)) in values:
                edits.append((call, cst.Attribute(cst.Name("self"), cst.Name(name or ""))))
        classes.append(definition.with_node(cast(cst.CSTNode, replace_nodes(definition.node, edits))))
    return Members(tuple(classes))


def _registered(call: cst.Call) -> str | None:
    """`x` of `getattr(self.config, "x", default)`."""
    args = [a.value for a in call.args]
    if not isinstance(call.func, cst.Name) or call.func.value != "getattr" or len(args) < 2:
        return None
    if self_attribute(args[0]) != "config" or not isinstance(args[1], cst.SimpleString):
        return None
    return str(args[1].evaluated_value)


def without_unnamed(statements: Sequence[cst.BaseStatement], name: str | None) -> list[cst.BaseStatement]:
    """Statements of a call that takes no arguments but named ones: `kwargs` is empty."""
    if name is None:
        return list(statements)

    def get(original: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        func = original.func
        if isinstance(func, cst.Attribute) and same(func.value, cst.Name(name)) and func.attr.value in ("get", "pop"):
            return updated.args[1].value if len(updated.args) > 1 else cst.Name("None")
        return updated

    def contains(original: cst.Comparison, updated: cst.Comparison) -> cst.BaseExpression:
        only = original.comparisons[0]
        if isinstance(only.operator, cst.In) and same(only.comparator, cst.Name(name)):
            return cst.Name("False")
        return updated

    return [transform(s, {cst.Call: get, cst.Comparison: contains}) for s in statements]
