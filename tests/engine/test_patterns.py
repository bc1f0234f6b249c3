"""Patterns match by structure and bind by name."""

import libcst as cst
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.engine.patterns import Pattern
from porter.engine.text import CodeError, check, resolve_chain
from porter.source.tree import code, normal


def match(pattern, text, symbols=None, **options):
    node = cst.parse_expression(text)
    return Pattern(pattern, symbols or {}).match(node, **options)


def test_a_metavariable_stands_for_one_node():
    captures = match("f($x, 1)", "f(a + b, 1)")
    assert code(captures["x"]) == "a + b"


def test_a_literal_that_differs_is_no_match():
    assert match("f($x, 1)", "f(a, 2)") is None


def test_the_same_name_twice_wants_equal_code():
    assert match("$x + $x", "a.b + a . b") is not None
    assert match("$x + $x", "a + b") is None


def test_keywords_match_in_any_order():
    captures = match("f(a=$x, b=$y)", "f(b=2, a=1)")
    assert (code(captures["x"]), code(captures["y"])) == ("1", "2")


def test_a_keyword_the_pattern_does_not_spell_is_no_match():
    assert match("f(a=$x)", "f(a=1, b=2)") is None


def test_an_open_call_leaves_other_keywords_to_the_options():
    assert match("f(a=$x)", "f(a=1, b=2)", open_call=True) is not None


def test_many_takes_positionals_and_leftover_keywords():
    captures = match("f($first, $$rest)", "f(1, 2, *more, k=3, **kw)")
    assert [code(a).strip(", ") for a in captures["rest"]] == ["2", "*more", "k=3", "**kw"]


def test_many_may_be_empty():
    assert match("f($$rest)", "f()")["rest"] == ()


def test_many_between_fixed_arguments():
    captures = match("f(1, $$mid, 4)", "f(1, 2, 3, 4)")
    assert len(captures["mid"]) == 2


def test_a_starred_argument_is_not_one_node():
    assert match("f($x)", "f(*x)") is None


def test_quotes_and_parentheses_do_not_matter():
    assert match("f('a', (b))", 'f("a", b)') is not None


def test_names_resolve_through_symbols_and_not_by_spelling():
    assert match("nn.Linear($x)", "torch·nn·Linear(4)", {"nn": "torch.nn"}) is not None
    assert match("nn.Linear($x)", "nn.Linear(4)", {"nn": "torch.nn"}) is None


def test_an_attribute_name_can_be_captured():
    assert match("self.$slot(q)", "self.attn(q)")["slot"].value == "attn"


def test_the_anonymous_variable_binds_nothing_and_repeats():
    assert match("f($_, $_)", "f(1, 2)") == {}


def statement_match(pattern, text):
    return Pattern(pattern, {}).match(cst.parse_module(text).body[0])


def test_an_if_without_else_does_not_match_one_with_else():
    assert statement_match("if $c:\n    $$b\n", "if x:\n    y\nelse:\n    z\n") is None


def test_a_block_binds_all_its_statements():
    captures = statement_match("if $c:\n    $$b\n", "if x:\n    y = 1\n    z = 2\n")
    assert len(captures["b"]) == 2


def test_a_one_line_suite_matches_a_block():
    assert statement_match("if $c:\n    return 1\n", "if x: return 1\n") is not None


def test_a_definition_pattern_does_not_ask_for_what_it_leaves_out():
    pattern = "def forward(self, $$rest):\n    $$body\n"
    captures = statement_match(pattern, "@torch.no_grad()\ndef forward(self, x: int, y=2) -> int:\n    return x\n")
    assert [p.name.value for p in captures["rest"]] == ["x", "y"]


def test_a_run_of_statements_matches_from_its_start():
    block = cst.parse_module("a = 1\nf(a)\nb = 2\n").body
    found = Pattern("$x = 1\nf($x)\n", {}).match_run(block, 0)
    assert found is not None and found[1] == 2
    assert Pattern("$x = 1\nf($x)\n", {}).match_run(block, 1) is None


def test_a_module_is_followed_and_an_object_is_not():
    assert resolve_chain("torch.nn.Linear.weight", {"torch": "torch"}) == "torch·nn·Linear.weight"
    assert resolve_chain("x.y", {"torch": "torch"}) is None


def test_checking_tells_free_names_from_bound_ones():
    variables, free, kind = check("for i in $xs:\n    g(i, h, self, len)\n", {"h": "a.h"})
    assert (variables, free, kind) == ({"xs"}, {"g"}, "statements")


def test_code_that_does_not_parse_names_its_line():
    with pytest.raises(CodeError) as error:
        check("x = 1\ny = = 2\n", {})
    assert error.value.line == 2


names = st.sampled_from(["a", "b", "self.c", "1", "'s'"])
expressions = st.recursive(
    names,
    lambda inner: st.one_of(
        st.builds("f({}, k={})".format, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("({} + {})".format, inner, inner),
        st.builds("({}).m".format, inner),
    ),
    max_leaves=8,
)


@settings(deadline=None)  # a busy machine is no failure
@given(expressions)
def test_every_expression_matches_itself_and_a_lone_metavariable(text):
    assert match(text, text) is not None
    assert normal(match("$x", text)["x"]) == normal(cst.parse_expression(text))
