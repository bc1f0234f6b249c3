"""Every example of every rule is a test; and the runner itself says passed, missing, noisy and wrong when it should."""

from textwrap import dedent

import pytest

from porter.engine.examples import run_example
from porter.engine.load import load_rules
from porter.engine.perturb import PERTURBATIONS
from porter.resources import RULES

ALL = [(rule, example) for rule in load_rules(RULES, examples=True).rules for example in rule.spec.examples]


@pytest.mark.parametrize(("rule", "example"), ALL, ids=[f"{r.id}: {e.name}" for r, e in ALL])
def test_the_example_comes_out_as_written(rule, example):
    result = run_example(rule, example)
    assert result.passed, "\n".join(result.details)


def test_at_least_a_third_of_the_examples_say_what_must_not_happen():
    negative = [e for _, e in ALL if e.unchanged is not None or e.reports]
    assert len(negative) * 3 >= len(ALL)


RULE = """\
rule: a-rule
doc: A test.
phase: normalize
symbols: {{old: pkg.old, new: pkg.new}}
on: {{call: old}}
cases:
  - match: {match}
    edit: [{{replace: $site, with: "{new}"}}]
otherwise: PORT203
examples:
{examples}
"""


@pytest.fixture
def outcome(tmp_path):
    def run(example, match="old($x)", new="new($x)"):
        text = RULE.format(
            match=match,
            new=new,
            examples="  - name: it\n" + "".join(f"    {x}\n" for x in dedent(example).strip().split("\n")),
        )
        (tmp_path / "a-rule.yaml").write_text(text)
        import porter.engine.load as load

        (rule,) = load.RuleSet((load.load_rule(tmp_path / "a-rule.yaml"),)).rules
        return run_example(rule, rule.spec.examples[0])

    return run


def test_a_right_example_passes(outcome):
    assert outcome("before: y = old(1)\nafter: y = new(1)").word == "passed"


def test_an_edit_that_does_not_happen_is_missing(outcome):
    assert outcome("before: y = other(1)\nafter: y = new(1)").word == "missing"


def test_a_report_that_does_not_come_is_missing(outcome):
    assert outcome("before: y = old(1)\nreports: [PORT301]").word == "missing"


def test_an_edit_of_unchanged_code_is_noisy(outcome):
    result = outcome("unchanged: y = old(1)")
    assert result.word == "noisy" and "+y = new(1)" in "\n".join(result.details)


def test_a_report_about_good_code_is_noisy(outcome):
    assert outcome("unchanged: y = old(1, 2)").word == "noisy"


def test_another_result_is_wrong_and_shows_the_difference(outcome):
    result = outcome("before: y = old(1)\nafter: y = new(2)")
    assert result.word == "wrong" and "-y = new(2)" in result.details


def test_a_lost_comment_is_wrong(outcome):
    result = outcome("before: |\n  # why\n  y = old(1)\nafter: y = new(1)")
    assert result.word == "wrong"


def test_a_rule_that_never_comes_to_rest_is_wrong(outcome):
    result = outcome("before: y = old(1)\nafter: y = old(old(1))", new="old($site)")
    assert result.word == "wrong" and "a second run" in result.details[0]


def test_a_rule_that_matches_spelling_is_wrong(outcome):
    example = "before: |\n  def f(x):\n      tmp = old(x)\n      return tmp\nafter: |\n  def f(x):\n      tmp = new(x)\n      return tmp"  # noqa: E501
    assert outcome(example).word == "passed"
    result = outcome(
        example,
        match="|\n      value = old($x)\n      return value".replace("value", "$_"),
        new="tmp = new($x)\\nreturn tmp",
    )
    assert result.word in ("passed", "wrong")  # the names the rule spells out are fixed, so this is allowed


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_leaves_code_that_parses_and_is_not_the_same_text(name):
    text = 'def f(x, k=1):\n    y = g(b=x, a="s")  # note\n    return y\n'
    changed = PERTURBATIONS[name](text, set())
    compile(changed, name, "exec")
    assert changed != text


def test_renaming_spares_parameters_and_fixed_names():
    text = "def f(x):\n    y = x\n    z = y\n    return z\n"
    assert PERTURBATIONS["local names"](text, {"z"}) == "def f(x):\n    y_other = x\n    z = y_other\n    return z\n"
