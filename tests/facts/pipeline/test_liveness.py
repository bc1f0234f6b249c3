"""Liveness over structured statements."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline.liveness import always_writes, changed, live_before, uses, writes


def body(text: str) -> list[cst.BaseStatement]:
    return list(cst.parse_module(text).body)


def test_what_is_written_first_is_not_live() -> None:
    assert live_before(body("x = a\ny = x + b\n"), {"y"}) == {"a", "b"}


def test_a_name_written_on_one_path_stays_live() -> None:
    assert "x" in live_before(body("if c:\n    x = 1\ny = x\n"))


def test_a_loop_reads_what_its_last_round_wrote() -> None:
    assert live_before(body("for t in ts:\n    y = step(x, t)\n    x = y\n"), {"x"}) == {"ts", "x", "step"}


def test_comprehension_variables_are_not_locals() -> None:
    assert uses(cst.parse_expression("[f(k, v) for k in ks if k]")) == {"f", "v", "ks"}


def test_globals_keywords_and_attributes_are_not_locals() -> None:
    assert uses(cst.parse_expression("torch·cat(a.b, dim=c, out=self.d)")) == {"a", "c"}


def test_a_branch_that_raises_does_not_spoil_certainty() -> None:
    assert "x" in always_writes(body("if c:\n    raise ValueError(c)\nelif d:\n    x = 1\nelse:\n    x = 2\n"))
    assert "x" not in always_writes(body("if c:\n    x = 1\n"))


def test_a_nested_target_is_written() -> None:
    assert writes(body("(a, [b, c]), d.e = f()\n")) == {"a", "b", "c"}


def test_a_handler_may_run_before_anything_was_bound() -> None:
    text = "try:\n    x = f()\nexcept Bad as e:\n    warn(e, y)\n"
    assert live_before(body(text), {"x"}) == {"x", "y", "f", "Bad", "warn"}


def test_a_handler_that_raises_leaves_nothing_unbound() -> None:
    assert "x" not in live_before(body("try:\n    x = f()\nexcept Bad:\n    raise\n"), {"x"})


def test_setting_an_element_changes_a_name_without_binding_it() -> None:
    text = body("x[:, 1:] = f(x)\ny = 1\nz.a = 2\n")
    assert changed(text) == {"x", "y"}
    assert writes(text) == {"y"}
