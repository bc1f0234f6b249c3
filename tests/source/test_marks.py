"""Marks are read back, replaced, inherited, and leave no trace."""

import libcst as cst

from porter.source.marks import Mark, inherit, mark_of, read, strip, with_mark
from porter.source.tree import code, statement


def test_a_mark_is_read_back_from_its_text():
    mark = Mark("models/a.py", 12, ("one", "two"))
    assert read(f"x = 1  {mark.text()}") == mark


def test_a_mark_without_rules_has_no_empty_rule():
    assert read(Mark("a.py", 1).text()).rules == ()


def test_an_ordinary_comment_is_no_mark():
    assert read("x = 1  # a.py:12; see there") is None
    assert mark_of(statement("x = 1  # a.py:12;\n")) is None


def test_stripping_leaves_the_authors_comment():
    assert strip("x = 1  # mine  #§a.py:3;rule§\n") == "x = 1  # mine\n"


def test_stripping_leaves_text_without_marks_alone():
    text = "x = 1  # § 3 of the law: see a.py:3;\n"
    assert strip(text) == text


def test_a_new_mark_takes_the_place_of_the_old_one():
    node = with_mark(with_mark(statement("x = 1  # mine\n"), Mark("a.py", 1)), Mark("b.py", 2))
    assert mark_of(node) == Mark("b.py", 2)
    assert code(node).count("§") == 2 and "# mine" in code(node)


def test_a_block_is_marked_at_its_header_and_not_at_its_body():
    node = with_mark(statement("if x:\n    y = 1\n"), Mark("a.py", 7))
    assert mark_of(node) == Mark("a.py", 7)
    assert mark_of(node.body.body[0]) is None


def test_new_code_inherits_the_place_and_adds_its_rule():
    origin = with_mark(statement("x = 1\n"), Mark("a.py", 7, ("first",)))
    assert mark_of(inherit(statement("y = 2\n"), origin, "second")) == Mark("a.py", 7, ("first", "second"))


def test_a_rule_that_changes_a_line_twice_is_named_once():
    mark = Mark("a.py", 7, ("first",))
    assert mark_of(inherit(statement("y = 2\n"), mark, "first")).rules == ("first",)


def test_code_of_no_origin_is_not_marked():
    assert mark_of(inherit(statement("y = 2\n"), None, "rule")) is None
    assert mark_of(inherit(statement("y = 2\n"), statement("x = 1\n"), "rule")) is None


def test_a_suite_in_one_line_is_left_without_a_mark_and_still_parses():
    node = with_mark(statement("if x: y = 1\n"), Mark("a.py", 7))
    assert cst.parse_module(code(node)).code == "if x: y = 1\n"
