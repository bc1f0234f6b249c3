"""What can be wrong in a rule file although its shape is right. Parses code with Python's parser only: it is fast."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from porter.diagnostics.catalogue import codes
from porter.engine import registry
from porter.engine.lower import unread
from porter.engine.rule import Rule
from porter.engine.schema import VERBS, CaseSpec, EditSpec, Keep, Predicate
from porter.engine.site import IMPLICIT
from porter.engine.text import CodeError, bound_in, check, variables
from porter.model import Diagnostic, PorterError, Span

_KINDS = ("call", "reference", "decorator", "class_", "method", "class_attribute", "pattern", "statement", "fact")
_WITH = frozenset({"replace", "insert_before", "insert_after"})


def lint(rule: Rule, ids: AbstractSet[str], *, examples: bool) -> Iterator[Diagnostic]:
    """Every finding about one rule; `ids` are all rules there are."""
    yield from _Lint(rule).run(ids)
    if examples:
        yield from _examples(rule)


class _Lint:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.spec = rule.spec
        self.bound: set[str] = set(IMPLICIT)
        self.spelled: set[str] = set()
        self.unreadable = False  # a pattern does not parse: what it would bind is not known

    def error(self, code: str, message: str, path: str, advice: str | None = None, offset: int = 0) -> Diagnostic:
        document = self.rule.document
        line = document.code_line(path, offset) if offset else document.line(path)
        return Diagnostic(code, message, Span(self.rule.file, line), self.rule.id, advice=advice)

    def run(self, ids: AbstractSet[str]) -> Iterator[Diagnostic]:
        yield from self._trigger()
        for position, name in enumerate(self.spec.after):
            if name not in ids:
                yield self.error("PORT219", f"`after` names {name}, which is no rule", f"$.after[{position}]")
        if self.spec.match is not None:
            yield from self._pattern(self.spec.match, "$.match")
        for name, option in self.spec.options.items():
            if option.bind:
                self.bound.add(option.bind)
            if option.bind is None and option.ignore is None and not _given(option.must_be):
                message = f"the option {name} says neither `bind`, `must_be` nor `ignore`"
                yield self.error("PORT212", message, f"$.options.{name}")
        if not self.spec.cases:
            yield self.error("PORT212", "there are no cases", "$.cases")
        for position, case in enumerate(self.spec.cases):
            yield from self._case(case, f"$.cases[{position}]")
        if not isinstance(self.spec.otherwise, Keep):
            yield from self._code(self.spec.otherwise, "$.otherwise")

    def _trigger(self) -> Iterator[Diagnostic]:
        on = self.spec.on
        given = [k for k in _KINDS if getattr(on, k) is not None]
        if len(given) != 1:
            kinds = ", ".join(k.rstrip("_") for k in _KINDS)
            said = " and ".join(k.rstrip("_") for k in given) or "none"
            yield self.error(
                "PORT220", f"`on` wants exactly one kind of site, here is {said}", "$.on", f"one of {kinds}"
            )
            return
        if on.bind:
            self.bound.add(on.bind)
        for key in ("pattern", "statement"):
            if getattr(on, key) is not None:
                yield from self._pattern(getattr(on, key), f"$.on.{key}")
        if on.class_ is not None and on.class_.name is None and on.class_.derives_from is None:
            yield self.error("PORT220", "`class` wants `derives_from` or `name`", "$.on.class")
        if on.fact is not None:
            yield from self._fact(on.fact)
        elif on.filter:
            yield self.error("PORT220", "`filter` is for facts", "$.on.filter")
        for value in (
            on.call,
            on.reference,
            on.decorator,
            on.method,
            on.class_attribute,
            on.class_ and on.class_.derives_from,
        ):
            yield from self._lists(value, "$.on")

    def _fact(self, name: str) -> Iterator[Diagnostic]:
        if name not in registry.FACTS:
            known = ", ".join(sorted(registry.FACTS)) or "none is registered"
            yield self.error("PORT217", f"there is no fact named {name}", "$.on.fact", f"known: {known}")
            return
        fields = registry.FACT_FIELDS.get(name, ())
        for key in self.spec.on.filter:
            if fields and key not in fields:
                yield self.error(
                    "PORT217", f"the fact {name} has no field {key}", "$.on.filter", f"it has {', '.join(fields)}"
                )

    def _lists(self, value: object, path: str) -> Iterator[Diagnostic]:
        for each in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            if isinstance(each, str) and each.startswith("@") and each != "@unit":
                try:
                    self.rule.names(each)
                except PorterError as error:
                    found = error.diagnostics[0]
                    missing = found.code == "PORT223"  # the rule is wrong; otherwise the file of the list is
                    yield self.error("PORT223", found.message, path) if missing else found

    def _pattern(self, text: str, path: str, into: set[str] | None = None) -> Iterator[Diagnostic]:
        try:
            found, _, _ = check(text, self.rule.symbols)
            self.spelled |= bound_in(text)
        except CodeError as error:
            yield self.error("PORT214", f"{error}", path, error.advice, error.line)
            self.unreadable = True
            return
        (self.bound if into is None else into).update(n for n in found if n != "_")

    def _case(self, case: CaseSpec, path: str) -> Iterator[Diagnostic]:
        bound = set(self.bound)
        if case.match is not None:
            yield from self._pattern(case.match, f"{path}.match", bound)
        for name, predicate in case.where.items():
            yield from self._bound({name.removeprefix("$")}, bound, f"{path}.where.{name}")
            if isinstance(predicate, Predicate):
                for word in ("bases_in", "derives_from", "name_matches", "in_", "not_in"):
                    yield from self._lists(getattr(predicate, word), f"{path}.where.{name}")
        done = [k for k in ("edit", "op", "keep") if getattr(case, k)]
        if not done and not case.report:
            yield self.error("PORT221", "the case says neither `edit`, `op`, `keep` nor `report`", path)
        if case.keep and len(done) > 1:
            yield self.error("PORT221", "a case that keeps a site can't edit it", f"{path}.keep")
        if case.op is not None and case.op not in registry.OPS:
            known = ", ".join(sorted(registry.OPS)) or "none is registered"
            yield self.error("PORT217", f"there is no op named {case.op}", f"{path}.op", f"known: {known}")
        if case.args and case.op is None:
            yield self.error("PORT221", "`args` are for an op", f"{path}.args")
        for name, value in case.args.items():
            if isinstance(value, str):
                yield from self._bound(variables(value), bound, f"{path}.args.{name}")
        for code, message in case.report.items():
            yield from self._code(code, f"{path}.report.{code}")
            yield from self._bound(variables(message), bound, f"{path}.report.{code}")
        # A parameter that the same case makes sure of may be used in its code.
        self.spelled |= {e.ensure_parameter.name for e in case.edit if e.ensure_parameter is not None}
        for position, edit in enumerate(case.edit):
            yield from self._edit(edit, bound, f"{path}.edit[{position}]")

    def _bound(self, names: AbstractSet[str], bound: AbstractSet[str], path: str) -> Iterator[Diagnostic]:
        fields = registry.FACT_FIELDS.get(self.spec.on.fact or "", ())
        for name in sorted(names):
            root, _, field = name.partition(".")
            if root not in bound and not self.unreadable:
                advice = "bound here: " + ", ".join(f"${n}" for n in sorted(bound))
                yield self.error("PORT215", f"${name} is not bound by any pattern", path, advice)
            elif root in bound and field and fields and root == (self.spec.on.bind or "site"):
                if field.split(".")[0] not in fields:
                    message = f"the fact {self.spec.on.fact} has no field {field}"
                    yield self.error("PORT217", message, path, f"it has {', '.join(fields)}")

    def _edit(self, edit: EditSpec, bound: AbstractSet[str], path: str) -> Iterator[Diagnostic]:
        given = [v for v in VERBS if getattr(edit, v) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            yield self.error(
                "PORT221", f"an edit has exactly one verb, here is {said}", path, f"verbs: {', '.join(VERBS)}"
            )
            return
        verb = given[0]
        if (verb in _WITH) != (edit.with_ is not None):
            message = f"{verb} wants `with`" if verb in _WITH else f"{verb} takes no `with`"
            yield self.error("PORT221", message, path)
            return
        yield from self._bound(unread(edit), bound, path)
        yield from self._lists(getattr(edit.remove_bases, "bases", None), path)
        for text, place, statements in _texts(edit, verb, path):
            try:
                _, free, _ = check(text, self.rule.symbols, None if statements else False)
            except CodeError as error:
                yield self.error("PORT214", f"{error}", place, error.advice, error.line)
                continue
            for name in sorted(free - self.spelled):
                offset = next((n for n, line in enumerate(text.splitlines(), 1) if name in line), 1)
                message = f"`{name}` is no symbol, no builtin and not in the pattern"
                advice = f"say where it comes from: `symbols: {{{name}: package.module.{name}}}`"
                yield self.error("PORT216", message, place, advice, offset)

    def _code(self, code: str, path: str) -> Iterator[Diagnostic]:
        if code not in codes():
            advice = "add it to porter/diagnostics/catalogue.yaml"
            yield self.error("PORT218", f"{code} is no diagnostic of the catalogue", path, advice)


def _given(value: object) -> bool:
    from msgspec import UNSET

    return value is not UNSET


def _texts(edit: EditSpec, verb: str, path: str) -> Iterator[tuple[str, str, bool]]:
    """Code texts of an edit: (text, path, may be statements)."""
    if edit.with_ is not None:
        yield edit.with_, f"{path}.with", True
    value = getattr(edit, verb)
    for name in ("value", "base", "type", "default"):
        if isinstance(text := getattr(value, name, None), str):
            yield text, f"{path}.{verb}.{name}", False
    if verb == "ensure_method":
        yield value.code, f"{path}.{verb}.code", True


def _examples(rule: Rule) -> Iterator[Diagnostic]:
    line, spec = rule.document.line("$.examples"), rule.spec
    positive = [e for e in spec.examples if e.before is not None and e.after is not None]
    negative = [e for e in spec.examples if e.unchanged is not None or e.reports]
    edits = any(c.edit or c.op for c in spec.cases)
    if (edits and not positive) or not negative:
        missing = "one with `before` and `after`" if edits and not positive else "one with `unchanged` or `reports`"
        advice = "an example is a test: show what the rule does, and what it must leave alone"
        yield Diagnostic("PORT222", f"the examples lack {missing}", Span(rule.file, line), rule.id, advice=advice)
    for position, each in enumerate(spec.examples):
        at = Span(rule.file, rule.document.line(f"$.examples[{position}]"))
        if (each.unchanged is None) == (each.before is None):
            yield Diagnostic("PORT222", f"`{each.name}`: say either `unchanged` or `before`", at, rule.id)
        elif each.before is not None and each.after is None and not each.reports:
            yield Diagnostic("PORT222", f"`{each.name}`: `before` wants `after` or `reports`", at, rule.id)
        for code in each.reports:
            if code not in codes():
                yield Diagnostic("PORT218", f"{code} is no diagnostic of the catalogue", at, rule.id)
        for key in ("before", "after", "unchanged", "context"):
            text = getattr(each, key)
            try:
                compile(text or "", rule.file, "exec", dont_inherit=True, flags=0x400)  # PyCF_ONLY_AST
            except SyntaxError as error:
                row = rule.document.code_line(f"$.examples[{position}].{key}", error.lineno or 1)
                message = f"`{each.name}`: the code does not parse: {error.msg}"
                yield Diagnostic("PORT214", message, Span(rule.file, row), rule.id)
