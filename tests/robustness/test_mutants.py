"""Changed sources end in a port or in a diagnostic. All 2,000: `python -m tests.robustness`.

Here a part of them, which changes with the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from porter.source.library import open_library
from tests.robustness.mutate import KINDS, Source, mutant_of, parses
from tests.robustness.record import RESULTS
from tests.robustness.trial import attempt, targets, trial
from tests.verify.rotation import turn

MUTANTS = 2000
PART = 2 * len(KINDS)
FIRST = turn() * PART % MUTANTS
ONCE_CRASHED = (892, 1636)
"""A layer of a list that is called without a tensor; an attention call without its value."""
NUMBERS = sorted({*ONCE_CRASHED, *(n % MUTANTS for n in range(FIRST, FIRST + PART))})
"""Each commit converts another part of all mutants, some of each kind."""
SAMPLE = (4, 22, 40)
"""Mutants of denoisers that the engine runs; each is another kind."""


@pytest.mark.parametrize("number", NUMBERS)
def test_a_changed_source_gives_a_port_or_a_diagnostic(number: int) -> None:
    found, _ = trial(number)
    assert found.verdict in ("converted", "diagnosed", "refused"), found.line()


def text_of(number: int) -> str:
    return (open_library().root / targets()[number % len(targets())].file).read_text(encoding="utf-8")


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_mutants_are_the_same_each_time_and_differ_from_the_source(number: int) -> None:
    text = text_of(number)
    one, two = mutant_of(text, number), mutant_of(text, number)
    assert one == two and one.text != text


def test_changes_without_meaning_still_parse() -> None:
    text = text_of(2)
    for kind in range(len(KINDS)):
        made = mutant_of(text, kind)
        assert not made.same or parses(made.text), made.kind


def test_a_change_without_meaning_gives_an_equal_tree_but_for_names() -> None:
    import ast

    text = "def f(self, a):\n    b = call(x=1, y=2)  # why\n    return b\n"
    layout = {"reprint", "add comments", "parenthesise"}
    for number in range(len(KINDS)):
        made = mutant_of(text, number)
        if made.kind in layout:
            assert ast.dump(ast.parse(made.text)) == ast.dump(ast.parse(text)), made.kind


def test_deleting_the_only_statement_of_a_block_leaves_a_pass() -> None:
    import random

    from tests.robustness.mutate import delete_statement

    made = delete_statement(Source("def f():\n    return 1\n"), random.Random(0))
    assert made is not None and made.text == "def f():\n    pass\n"


def test_a_crash_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would notice: an exception that is no diagnostic is reported as such."""
    from tests.robustness import trial as module

    def broken(*_: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(module, "converted", broken)
    target = targets()[0]
    verdict, detail, made = attempt(target, mutant_of(text_of(0), 0))
    assert verdict == "crashed" and "KeyError" in detail and made is None


@pytest.mark.parametrize("number", SAMPLE)
def test_a_port_of_a_changed_source_does_not_differ_in_silence(number: int, bench: Any) -> None:
    from tests.robustness.semantics import compare

    found, made = trial(number)
    assert made is not None
    with tempfile.TemporaryDirectory() as folder:
        outcome, detail = compare(bench, found, made, Path(folder))
    assert outcome != "differs" or found.verdict == "diagnosed", f"{found.line()}: {detail}"


def test_what_the_recorded_runs_found_is_tried_at_each_commit() -> None:
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {int(line.split()[0]) for line in runs["convert"]["found"]} <= set(ONCE_CRASHED)
    assert runs["convert"]["mutants"] == MUTANTS and not runs["engine"]["found"]
