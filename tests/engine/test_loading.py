"""Everything wrong with a rule file is found before anything runs, with file, line, and a way out."""

import json
from textwrap import dedent

import jsonschema
import pytest

from porter.engine.load import load_rules
from porter.engine.registry import FACT_FIELDS, FACTS, FactSite
from porter.engine.schema import json_schema
from porter.engine.yamltext import parse
from porter.model import PorterError
from porter.resources import RULES

GOOD = """\
rule: swap-it
doc: Swaps.
phase: normalize
symbols: {old: pkg.old, new: pkg.new}
on: {call: old}
cases:
  - match: old($x)
    edit:
      - replace: $site
        with: new($x)
otherwise: PORT203
examples:
  - name: swaps
    before: |
      y = old(1)
    after: |
      y = new(1)
  - name: leaves
    unchanged: |
      y = other(1)
"""


@pytest.fixture
def errors(tmp_path):
    def load(text, name="swap-it", examples=True):
        (tmp_path / f"{name}.yaml").write_text(dedent(text))
        with pytest.raises(PorterError) as error:
            load_rules(tmp_path, examples=examples)
        return error.value.diagnostics

    return load


def changed(old, new):
    assert old in GOOD, f"{old!r} is not in the good rule"
    return GOOD.replace(old, new)


def test_a_good_rule_loads_with_and_without_its_examples(tmp_path):
    (tmp_path / "swap-it.yaml").write_text(GOOD)
    assert len(load_rules(tmp_path, examples=True).by_id["swap-it"].spec.examples) == 2
    assert load_rules(tmp_path).by_id["swap-it"].spec.examples == []


@pytest.mark.parametrize(
    ("old", "new", "code", "line", "word"),
    [
        ("doc: Swaps.", "doc: [Swaps", "PORT210", 3, "YAML"),
        ("doc: Swaps.", "doc: Swaps.\ndoc: Again.", "PORT210", 3, "`doc` occurs twice"),
        ("doc: Swaps.", "doc: &a Swaps.\nafter: [*b]", "PORT210", 3, "undefined alias"),
        ("phase: normalize", "phase: normalise", "PORT212", 3, "Invalid enum value"),
        ("    edit:\n", "    edits:\n", "PORT212", 8, "unknown field `edits`"),
        ("rule: swap-it", "rule: swap-that", "PORT213", 1, "swap-that"),
        ("  - match: old($x)", "  - match: old($x", "PORT214", 7, "does not parse"),
        ("        with: new($x)", "        with: new($y)", "PORT215", 9, "$y is not bound"),
        ("        with: new($x)", "        with: newer($x)", "PORT216", 10, "`newer` is no symbol"),
        ("        with: new($x)", "", "PORT221", 9, "replace wants `with`"),
        ("      - replace: $site\n        with: new($x)", "      - {replace: $site, with: new($x), remove: $x}", "PORT221", 9, "exactly one verb"),  # noqa: E501
        ("  - match: old($x)\n    edit:\n      - replace: $site\n        with: new($x)", "  - match: old($x)", "PORT221", 7, "neither"),  # noqa: E501
        ("on: {call: old}", "on: {call: old, method: forward}", "PORT220", 5, "exactly one kind"),
        ("on: {call: old}", "on: {bind: x}", "PORT220", 5, "exactly one kind"),
        ("on: {call: old}", "on: {fact: no_such_fact}", "PORT217", 5, "no fact named no_such_fact"),
        ("on: {call: old}", "on: {call: '@nolist'}", "PORT223", 5, "nolist"),
        ("otherwise: PORT203", "otherwise: PORT299", "PORT218", 11, "PORT299"),
        ("otherwise: PORT203\n", "", "PORT212", 1, "otherwise"),
        ("on: {call: old}", "on: {call: old}\nafter: [nobody]", "PORT219", 6, "nobody"),
        ("  - name: leaves\n    unchanged: |\n      y = other(1)\n", "", "PORT222", 12, "lack one with `unchanged`"),
        ("      y = new(1)", "      y = = 1", "PORT214", 17, "`swaps`: the code does not parse"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_code_and_line(errors, old, new, code, line, word):
    found = errors(changed(old, new))
    assert [(d.code, d.span.line) for d in found] == [(code, line)], found
    assert word in found[0].message


def test_unknown_keys_get_a_suggestion(errors):
    (found,) = errors(changed("    edit:\n", "    edits:\n"))
    assert found.advice == "did you mean `edit`?"


def test_an_unknown_op_lists_the_known_ones(errors):
    text = changed("    edit:\n      - replace: $site\n        with: new($x)", "    op: no_such_op")
    (found,) = errors(text)
    assert found.code == "PORT217" and "known:" in found.advice


def test_errors_of_several_files_come_together(tmp_path):
    (tmp_path / "swap-it.yaml").write_text(changed("phase: normalize", "phase: x"))
    (tmp_path / "other.yaml").write_text("rule: [")
    with pytest.raises(PorterError) as error:
        load_rules(tmp_path)
    assert {d.code for d in error.value.diagnostics} == {"PORT210", "PORT212"}


def test_a_circle_of_after_is_named_as_a_path(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.yaml").write_text(GOOD.replace("swap-it", one).replace("on:", f"after: [{other}]\non:"))
    with pytest.raises(PorterError) as error:
        load_rules(tmp_path)
    assert ["a -> b -> a" in d.message for d in error.value.diagnostics] == [True]


def test_two_files_with_one_id_are_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "swap-it.yaml").write_text(GOOD)
    with pytest.raises(PorterError) as error:
        load_rules(tmp_path)
    assert [d.code for d in error.value.diagnostics] == ["PORT224"]


def test_a_rule_cannot_wait_for_a_later_phase(tmp_path):
    (tmp_path / "late.yaml").write_text(GOOD.replace("swap-it", "late").replace("phase: normalize", "phase: tidy"))
    (tmp_path / "early.yaml").write_text(GOOD.replace("swap-it", "early").replace("on:", "after: [late]\non:"))
    with pytest.raises(PorterError) as error:
        load_rules(tmp_path)
    assert error.value.diagnostics[0].code == "PORT219"


def test_strata_follow_after_and_nothing_else(tmp_path):
    for name, after in (("zebra", ""), ("ant", "after: [zebra]\n"), ("bee", "")):
        (tmp_path / f"{name}.yaml").write_text(GOOD.replace("swap-it", name).replace("on:", f"{after}on:"))
    strata = load_rules(tmp_path).strata("normalize")
    assert [[r.id for r in s] for s in strata] == [["bee", "zebra"], ["ant"]]


def test_a_field_the_fact_does_not_have_is_refused(errors, monkeypatch):
    monkeypatch.setitem(FACTS, "norm", lambda unit: [FactSite(None, "x", {})])
    monkeypatch.setitem(FACT_FIELDS, "norm", ("dim",))
    text = changed("on: {call: old}", "on: {fact: norm, bind: n}")
    found = errors(text.replace("new($x)", "new(${n.width})"))
    assert [d.code for d in found] == ["PORT217"] and "it has dim" in found[0].advice


def test_on_is_a_word_and_not_a_boolean():
    assert parse("on: yes\noff: true\n", "f").data == {"on": "yes", "off": True}


def test_lines_count_through_block_scalars():
    document = parse("a:\n  - b: |\n      one\n      two\n", "f")
    assert document.code_line("$.a[0].b", 2) == 4


def test_every_shipped_rule_fits_the_checked_in_schema():
    schema = json.loads((RULES / "rule.schema.json").read_text())
    assert schema == json.loads(json.dumps(json_schema())), "run porter rules schema --write"
    jsonschema.Draft202012Validator.check_schema(schema)
    for rule in load_rules(RULES, examples=True).rules:
        jsonschema.validate(rule.document.data, schema)


def test_the_schema_refuses_an_unknown_key():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**parse(GOOD, "f").data, "prio": 1}, json_schema())
