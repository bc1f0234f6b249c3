"""Shared helpers: a rule out of a few lines, and what it makes of a text."""

from textwrap import dedent, indent

import pytest

from porter.engine.absolute_text import unit_of
from porter.engine.examples import readable_code
from porter.engine.load import load_rules
from porter.engine.run import run_rules

HEAD = "rule: {name}\ndoc: A test.\nphase: normalize\n{extra}on: {on}\n"
SYMBOLS = "symbols: {{old: pkg.old, new: pkg.new, Old: pkg.Old, nn: torch.nn}}\n"


class Bench:
    """Writes rules, runs them together on one text, and shows the result."""

    def __init__(self, folder):
        self.folder = folder

    def rule(self, on, cases, *, name="a-rule", otherwise="PORT203", extra="", match=None):
        text = HEAD.format(name=name, on=on, extra=SYMBOLS.format() + extra)
        if match:
            text += f"match: {match}\n"
        text += f"cases:\n{indent(dedent(cases).strip(), '  ')}\notherwise: {otherwise}\n"
        (self.folder / f"{name}.yaml").write_text(text)
        return self

    def run(self, text, facts=None):
        self.rules = load_rules(self.folder)
        self.unit = unit_of("from pkg import old, new, Old\nimport torch.nn as nn\n" + dedent(text), facts=facts)
        self.outcome = run_rules(self.unit, self.rules)
        return self

    @property
    def text(self):
        return "\n".join(readable_code(d.node) for d in self.outcome.unit.definitions).strip() + "\n"

    @property
    def codes(self):
        return sorted(d.code for d in self.outcome.diagnostics)

    @property
    def statuses(self):
        return [s.status for s in self.outcome.statuses]

    def again(self):
        return run_rules(self.outcome.unit, self.rules)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)
