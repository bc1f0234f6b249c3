"""A rule, checked and ready to run: its file's data, its patterns and templates, and the lists it may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from msgspec import Struct, field

from porter.engine.patterns import Pattern
from porter.engine.schema import Keep, RuleSpec
from porter.engine.text import Template, resolve_chain
from porter.engine.yamltext import Document
from porter.source.names import DOT, absolute

Lists = Callable[[str], tuple[str, ...]]


class Rule(Struct, frozen=True, dict=True):
    """One rule. `document` knows the lines of its file; `lists` reads `symbols/<name>.yaml` for `@name`."""

    spec: RuleSpec
    document: Document
    lists: Lists
    _templates: dict[str, Template] = field(default_factory=dict)
    _patterns: dict[tuple[str, bool], Pattern] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.spec.rule

    @property
    def symbols(self) -> Mapping[str, str]:
        return self.spec.symbols

    @property
    def file(self) -> str:
        return self.document.file

    @property
    def summary(self) -> str:
        """First sentence of the documentation."""
        text = " ".join(self.spec.doc.split())
        return text.split(". ")[0].rstrip(".") + "."

    @property
    def otherwise(self) -> str | Keep:
        return self.spec.otherwise

    def names(self, value: str | list[str]) -> tuple[str, ...]:
        """Qualified names of a `Names` value: symbols are resolved, `@list` is expanded."""
        result: list[str] = []
        for each in [value] if isinstance(value, str) else value:
            if each.startswith("@"):
                result += self.lists(each[1:])
            else:
                found = resolve_chain(each, self.symbols)
                result.append(each if found is None else found.replace(DOT, "."))
        return tuple(result)

    def absolute_names(self, value: str | list[str]) -> tuple[str, ...]:
        """As `names`, in the spelling of absolute trees."""
        return tuple(absolute(n) for n in self.names(value))

    def template(self, text: str) -> Template:
        if text not in self._templates:
            self._templates[text] = Template(text, self.symbols)
        return self._templates[text]

    def pattern(self, text: str, statements: bool = False) -> Pattern:
        key = (text, statements)
        if key not in self._patterns:
            self._patterns[key] = Pattern(text, self.symbols, statements)
        return self._patterns[key]

    @cached_property
    def trigger(self) -> Pattern | None:
        """The pattern of `on`, if it has one."""
        on = self.spec.on
        if on.pattern is not None:
            return self.pattern(on.pattern)
        return self.pattern(on.statement, True) if on.statement is not None else None
