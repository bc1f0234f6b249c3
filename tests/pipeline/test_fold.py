"""Folding and pruning remove what cannot run, and nothing else."""

from __future__ import annotations

from porter.pipeline.fold import ABSENT, PRESENT, Knowledge, fold
from porter.pipeline.prune import settle
from tests.pipeline.conftest import statements, text_of


def folded(source: str, **known: object) -> str:
    return text_of(fold(statements(source), Knowledge(**known)))  # type: ignore[arg-type]


def settled(source: str, live: tuple[str, ...] = (), **known: object) -> str:
    return text_of(settle(statements(source), Knowledge(**known), (), live))  # type: ignore[arg-type]


def test_a_branch_on_a_parameter_nobody_can_set_goes() -> None:
    assert folded("if callback is not None:\n    x = 1\ny = 2\n", local={"callback": None}) == "y = 2\n"


def test_an_elif_takes_the_place_of_an_impossible_branch() -> None:
    out = folded("if a is not None:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n", local={"a": None})
    assert out == "if b:\n    x = 2\nelse:\n    x = 3\n"


def test_comments_move_to_what_is_left() -> None:
    assert folded("y = 1\n# why\nif a is None:\n    x = 1\n", local={"a": None}) == "y = 1\n# why\nx = 1\n"


def test_a_component_is_present_but_its_value_is_not_known() -> None:
    known = {"attributes": {"vae": PRESENT}}
    assert folded("x = self.vae.scale if self.vae is not None else 8\n", **known) == "x = self.vae.scale\n"
    assert folded("if self.vae == other:\n    x = 1\n", **known) == "if self.vae == other:\n    x = 1\n"


def test_an_unknown_condition_stays_as_written() -> None:
    source = "if a and (b or c):\n    x = 1 if d else 2\n"
    assert folded(source, local={"e": None}) == source


def test_or_with_an_unknown_left_side_is_kept() -> None:
    assert folded("x = a or True\n") == "x = a or True\n"


def test_isinstance_of_self_is_false_for_classes_the_port_does_not_have() -> None:
    assert folded("if isinstance(self, some·Mixin):\n    x = 1\n") == ""


def test_a_constant_reaches_the_conditions_behind_it() -> None:
    assert settled("image = None\nif image is not None:\n    x = f(image)\ny = 1\n", live=("y",)) == "y = 1\n"


def test_a_name_bound_twice_is_no_constant() -> None:
    source = "a = None\nif c:\n    a = f()\nif a is not None:\n    g(a)\n"
    assert settled(source) == source


def test_a_dead_value_that_was_called_for_stays() -> None:
    assert settled("x = effect()\n") == "x = effect()\n"
    assert settled("x = len(y)\n") == ""


def test_a_value_read_by_the_next_round_of_a_loop_is_not_dead() -> None:
    source = "for t in ts:\n    y = f(x)\n    x = y\n"
    assert settled("x = 1\n" + source) == "x = 1\n" + source


def test_a_parameter_argument_becomes_its_constant() -> None:
    assert folded("f(a, b=c)\n", local={"a": None, "c": True}) == "f(None, b=True)\n"


def test_a_component_is_no_list() -> None:
    known = {"attributes": {"net": PRESENT}}
    assert folded("if isinstance(self.net, (list, tuple)):\n    x = 1\n", **known) == ""
    source = "if isinstance(self.net, Other):\n    x = 1\n"
    assert folded(source, **known) == source


def test_halves_nobody_reads_are_not_made() -> None:
    assert settled("a, _ = a.chunk(2)\nb = 1\n", live=("b",)) == "b = 1\n"
    kept = "a, _ = self.chunk(2)\nb = 1\n"
    assert settled(kept, live=("b",)) == kept


def test_a_default_for_what_nothing_sets_is_its_value() -> None:
    known = {"attributes": {"head": ABSENT}}
    assert folded("if getattr(self, 'head', None) is not None:\n    x = 1\n", **known) == ""
    assert folded("if hasattr(self, 'head'):\n    x = 1\n", **known) == ""
    source = "x = self.head\n"
    assert folded(source, **known) == source
