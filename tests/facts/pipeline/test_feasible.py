"""What a loop may take from its own last round."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline.feasible import carried_unbound


def carried(text: str) -> set[str]:
    return set(carried_unbound(list(cst.parse_module(text).body), (), {"a"}))


def test_a_read_under_the_condition_of_the_write_is_no_carry() -> None:
    assert carried("if guided:\n    a = f()\nif guided and scale > 0:\n    use(a)\n") == set()


def test_branches_that_no_round_leaves_are_no_carry() -> None:
    assert carried("if kind == 1:\n    a = f()\nelif kind == 2:\n    a = g()\nuse(a)\n") == set()


def test_a_condition_that_changes_between_rounds_is_a_carry() -> None:
    assert carried("if t > 3:\n    a = f()\nuse(a)\nt = t + 1\n") == {"a"}


def test_a_condition_with_a_call_may_change() -> None:
    assert carried("if clock():\n    a = f()\nuse(a)\n") == {"a"}
