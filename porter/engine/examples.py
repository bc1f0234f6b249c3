"""Run the examples of rules: each is a test. What is checked for one example, in this order:

the expected code (or no edit at all, or exactly the codes it reports); that the result parses; that a second run plans
nothing; and that code written differently (see `perturb`) gives the same result.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import libcst as cst

from porter.engine.absolute_text import absolutise_text, needs_wrapping
from porter.engine.load import RuleSet
from porter.engine.perturb import PERTURBATIONS, all_locals
from porter.engine.rule import Rule
from porter.engine.run import Outcome, run_rules
from porter.engine.schema import Example
from porter.model import Definition, PorterError, Unit
from porter.source.marks import strip
from porter.source.names import DOT
from porter.source.tree import code, find, normal, walk

Word = Literal["passed", "missing", "noisy", "wrong"]


@dataclass(frozen=True, slots=True)
class Result:
    """How one example came out. missing: nothing happened; noisy: what must not did; wrong: another thing did."""

    rule: str
    example: str
    word: Word
    details: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return self.word == "passed"


def run_examples(rules: RuleSet, ids: tuple[str, ...] = ()) -> Iterator[Result]:
    """Every example of the rules (loaded with `examples=True`), of those named only if any are."""
    for rule in rules.rules:
        if not ids or rule.id in ids:
            for example in rule.spec.examples:
                yield run_example(rule, example)


def run_example(rule: Rule, example: Example) -> Result:
    """One example of one rule, alone."""
    before = example.unchanged if example.unchanged is not None else example.before or ""
    after = example.unchanged if example.unchanged is not None else example.after
    try:
        first = _run(rule, example, before)
    except PorterError as error:
        return Result(rule.id, example.name, "wrong", (str(error),))
    reported = sorted({d.code for d in first.diagnostics})
    if reported != sorted(set(example.reports)):
        return _reports(rule, example, first, reported)
    if after is None:
        if first.edits:
            return Result(
                rule.id,
                example.name,
                "noisy",
                ("it reports, but edits as well:", *_difference(rule, example, before, first)),
            )
        return Result(rule.id, example.name, "passed")
    if example.unchanged is not None and first.edits:
        return Result(rule.id, example.name, "noisy", _difference(rule, example, after, first))
    if example.unchanged is None and not first.edits:
        return Result(rule.id, example.name, "missing", ("the rule planned no edit",))
    expected = _definitions(rule, example, after)
    if not _equal(first.unit, expected) or _comments(first.unit.definitions) != _comments(expected):
        return Result(rule.id, example.name, "wrong", _difference(rule, example, after, first))
    return _further(rule, example, first, before, after)


def _further(rule: Rule, example: Example, first: Outcome, before: str, after: str) -> Result:
    """What an example must stand beyond its text."""
    for definition in first.unit.definitions:
        try:
            cst.parse_module(code(definition.node))
        except cst.ParserSyntaxError as error:
            return Result(
                rule.id, example.name, "wrong", (f"the result does not parse: {error}", code(definition.node))
            )
    second = run_rules(first.unit, RuleSet((rule,)))
    if second.edits:
        what = (f"a second run plans {len(second.edits)} more", *_difference(rule, example, after, second))
        return Result(rule.id, example.name, "wrong", what)
    fixed = _spelled(rule) | (all_locals(after) - all_locals(before))  # a name the rule made up can't be renamed
    for name, change in PERTURBATIONS.items():
        outcome = _run(rule, example, change(before, fixed))
        if not _equal(outcome.unit, _definitions(rule, example, change(after, fixed)), loosely=True):
            what = (
                f"written with another {name} the result differs",
                *_difference(rule, example, change(after, fixed), outcome),
            )
            return Result(rule.id, example.name, "wrong", what)
    return Result(rule.id, example.name, "passed")


def _reports(rule: Rule, example: Example, outcome: Outcome, reported: list[str]) -> Result:
    wanted = ", ".join(sorted(set(example.reports))) or "nothing"
    lines = tuple(f"  {d.code} {d.message} ({d.span})" for d in outcome.diagnostics)
    word: Word = "missing" if not reported else "noisy" if not example.reports else "wrong"
    return Result(rule.id, example.name, word, (f"reports {', '.join(reported) or 'nothing'}, wanted {wanted}", *lines))


def _run(rule: Rule, example: Example, text: str) -> Outcome:
    definitions = _definitions(rule, example, text)
    context = absolutise_text(example.context, _imported(rule)) if example.context else ()
    unit = Unit((*context, *definitions), definitions[-1].name, example.facts)
    outcome = run_rules(unit, RuleSet((rule,)))
    names = {d.name for d in context} - {d.name for d in definitions}
    mine = tuple(d for d in outcome.unit.definitions if d.name not in names)
    return Outcome(Unit(mine, unit.root, unit.facts), outcome.diagnostics, outcome.statuses, outcome.edits)


def _definitions(rule: Rule, example: Example, text: str) -> tuple[Definition, ...]:
    symbols = dict(_imported(rule))
    if example.context:
        symbols |= {d.name: f"{d.module}.{d.name}" for d in absolutise_text(example.context, symbols)}
    shown = [t for t in (example.before, example.after, example.unchanged) if t]
    return absolutise_text(text, symbols, wrap=any(needs_wrapping(t) for t in shown))


def _imported(rule: Rule) -> dict[str, str]:
    """Symbols an example may use without an import."""
    return dict(rule.symbols)


def _spelled(rule: Rule) -> set[str]:
    """Words of the rule's own code: names it spells out can't be renamed under it."""
    spec = rule.spec
    texts = [spec.match, spec.on.pattern, spec.on.statement, *(c.match for c in spec.cases)]
    texts += [str(e) for c in spec.cases for e in c.edit] + [str(c.where) + str(c.args) for c in spec.cases]
    return set(re.findall(r"\w+", " ".join(t for t in texts if t)))


def _equal(unit: Unit, expected: tuple[Definition, ...], loosely: bool = False) -> bool:
    have = {d.name: _canonical(d.node, loosely) for d in unit.definitions}
    want = {d.name: _canonical(d.node, loosely) for d in expected}
    return have == want


def _canonical(node: cst.CSTNode, loosely: bool) -> str:
    if loosely:  # keyword arguments in any order
        from porter.source.tree import replace_nodes

        def ordered(call: cst.Call) -> cst.Call:
            return call.with_changes(args=sorted(call.args, key=lambda a: a.keyword.value if a.keyword else ""))

        node = replace_nodes(node, [(c, ordered) for c in find(node, cst.Call)])
        node = cst.parse_module(strip(code(node)))
    return normal(node)


def _comments(definitions: tuple[Definition, ...]) -> list[str]:
    """The author's comments in source order."""
    found = []
    for definition in definitions:
        for line in strip(code(definition.node)).splitlines():
            if "#" in line:
                found.append(line[line.index("#") :].strip())
    return found


def _difference(rule: Rule, example: Example, expected: str, outcome: Outcome) -> tuple[str, ...]:
    have = "\n".join(readable_code(d.node) for d in outcome.unit.definitions)
    want = "\n".join(readable_code(d.node) for d in _definitions(rule, example, expected))
    return tuple(difflib.unified_diff(want.splitlines(), have.splitlines(), "expected", "result", lineterm="", n=2))


def readable_code(node: cst.CSTNode) -> str:
    """Code without marks, absolute names shortened to their last part."""
    text = strip(code(node)).strip("\n")
    for name in sorted(
        {n.value for n in walk(node) if isinstance(n, cst.Name) and DOT in n.value}, key=len, reverse=True
    ):
        text = text.replace(name, name.rstrip(DOT).rpartition(DOT)[2])
    return text
