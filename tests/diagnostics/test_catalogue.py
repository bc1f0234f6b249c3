"""Every code has an entry a person can act on, and every code used anywhere is in the catalogue."""

import re
from pathlib import Path

import pytest

from porter.diagnostics.catalogue import EFFORTS, FAMILIES, catalogue, codes, effort_of, entry
from porter.diagnostics.pages import pages

ROOT = Path(__file__).parents[2]


def used():
    """(code, file) of every code in the program and the rules."""
    files = [*ROOT.glob("porter/**/*.py"), *ROOT.glob("rules/**/*.yaml"), *ROOT.glob("templates/**/*.jinja")]
    for path in files:
        for code in re.findall(r"\bPORT\d{3}\b", path.read_text(encoding="utf-8")):
            yield code, path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("found", sorted(catalogue().values(), key=lambda e: e.code), ids=lambda e: e.code)
def test_an_entry_says_what_it_means_and_what_to_do(found):
    assert found.effort in EFFORTS and found.code[4] in FAMILIES
    assert found.meaning.endswith(".") and len(found.meaning) > 20
    assert len(found.advice) > 15 and len(found.name) < 60


def test_every_code_that_is_used_has_an_entry():
    assert {(c, f) for c, f in used() if c not in codes()} == set()


def test_the_quick_list_of_codes_is_the_catalogue():
    assert codes() == set(catalogue())


def test_entries_stand_in_order():
    assert list(catalogue()) == sorted(catalogue())


def test_an_unknown_code_is_an_error_and_never_taken_lightly():
    with pytest.raises(KeyError, match=r"catalogue\.yaml"):
        entry("PORT999")
    assert effort_of("PORT999") == "high"


def test_the_pages_in_docs_are_those_of_the_catalogue():
    folder = ROOT / "docs" / "diagnostics"
    assert {p.name: p.read_text() for p in folder.glob("*.md")} == pages(), "run porter rules docs"
