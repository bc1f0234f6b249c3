"""Edits that can't stand together are found before anything is changed; those that can, compose."""

import pytest

from porter.engine.absolute_text import unit_of
from porter.engine.index import IndexCache
from porter.engine.plan import plan
from porter.engine.run import run_rules
from porter.source.tree import code, expression

SWAP = "- match: {0}($x)\n  edit: [{{replace: $site, with: {1}($x)}}]"


def test_an_edit_inside_a_place_spliced_once_composes(bench):
    bench.rule("{call: old}", "- match: old($x)\n  edit: [{replace: $site, with: outer($x)}]".replace("outer", "len"))
    bench.rule("{call: new}", "- match: new($x)\n  edit: [{replace: $site, with: abs($x)}]", name="b-rule")
    bench.run("def f(x):\n    return old(1 + new(x))\n")
    assert "len(1 + abs(x))" in bench.text and bench.codes == []


def test_an_edit_of_exactly_the_spliced_node_composes(bench):
    bench.rule("{call: old}", "- match: old($x)\n  edit: [{replace: $site, with: len($x)}]")
    bench.rule("{call: new}", "- match: new($x)\n  edit: [{replace: $site, with: abs($x)}]", name="b-rule")
    assert "len(abs(x))" in bench.run("def f(x):\n    return old(new(x))\n").text


def test_an_edit_inside_a_place_spliced_twice_is_a_conflict(bench):
    bench.rule("{call: old}", '- match: old($x)\n  edit: [{replace: $site, with: "max($x, $x)"}]')
    bench.rule("{call: new}", "- match: new($x)\n  edit: [{replace: $site, with: abs($x)}]", name="b-rule")
    bench.run("def f(x):\n    return old(new(x))\n")
    assert bench.codes == ["PORT201"] and "old(new(x))" in bench.text


def test_an_edit_inside_what_another_rule_takes_away_names_both_rules_and_places(bench):
    bench.rule("{method: gone}", "- edit: [{remove: $site}]")
    bench.rule("{call: new}", "- edit: [{replace: $site, with: abs(1)}]", name="b-rule")
    bench.run("class A:\n    def gone(self):\n        return new(1)\n    def stays(self):\n        return 1\n")
    (found,) = bench.outcome.diagnostics
    assert found.code == "PORT201" and "a-rule and b-rule" in found.message
    assert {found.span.line, *(s.line for s in found.related)} == {4, 5}
    assert "after: [a-rule]" in found.advice
    assert bench.statuses == ["diagnosed", "diagnosed"] and not bench.outcome.edits


def test_ordering_the_rules_resolves_the_conflict(bench):
    bench.rule("{method: gone}", "- edit: [{remove: $site}]")
    bench.rule("{call: new}", "- edit: [{replace: $site, with: abs(1)}]", name="b-rule", extra="after: [a-rule]\n")
    bench.run("class A:\n    def gone(self):\n        return new(1)\n    def stays(self):\n        return new(1)\n")
    assert bench.codes == [] and bench.text.count("abs(1)") == 1 and "gone" not in bench.text


def test_two_rules_that_replace_one_place_differently_conflict(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: len(1)}]")
    bench.rule("{call: old}", "- edit: [{replace: $site, with: abs(1)}]", name="b-rule")
    assert bench.run("def f(x):\n    return old(x)\n").codes == ["PORT201"]
    assert "old(x)" in bench.text


def test_two_rules_that_agree_are_one_edit(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: len(1)}]")
    bench.rule("{call: old}", "- edit: [{replace: $site, with: 'len( 1 )'}]", name="b-rule")
    bench.run("def f(x):\n    return old(x)\n")
    assert bench.codes == [] and len(bench.outcome.edits) == 1


def test_a_conflict_drops_every_edit_of_both_sites_and_no_other(bench):
    bench.rule(
        "{call: old}", "- edit:\n    - {insert_before: $site, with: a = 1}\n    - {replace: $site, with: len(1)}"
    )
    bench.rule("{pattern: old(2)}", "- edit: [{replace: $site, with: abs(1)}]", name="b-rule")
    bench.run("def f(x):\n    y = old(1)\n    z = old(2)\n    return y + z\n")
    assert bench.text.count("a = 1") == 1 and "y = len(1)" in bench.text and "z = old(2)" in bench.text


def test_a_nested_site_of_the_same_rule_goes_with_the_outer_one(bench):
    bench.rule("{pattern: 'old($$x)'}", "- edit: [{replace: $site, with: '1'}]").run(
        "def f(x):\n    return old(old(x))\n"
    )
    assert "return 1" in bench.text and bench.codes == [] and bench.statuses == ["applied", "applied"]


def test_planning_changes_nothing(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: len(1)}]").run("def f(x):\n    return old(x)\n")
    before = code(bench.unit.definitions[0].node)
    made = plan(bench.unit, bench.rules.rules)
    assert len(made.edits) == 1 and code(bench.unit.definitions[0].node) == before


def test_what_was_not_edited_keeps_its_identity_and_its_index(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: len(1)}]")
    bench.run("class A:\n    def f(self):\n        return old(1)\n    def g(self):\n        return 2\n")
    before, after = bench.unit.definitions[0].node, bench.outcome.unit.definitions[0].node
    assert before.body.body[1] is after.body.body[1] and before.body.body[0] is not after.body.body[0]


def test_a_tree_that_holds_one_node_twice_is_edited_in_the_right_place(bench):
    bench.rule("{call: old}", "- match: old($x)\n  edit: [{replace: $site, with: new($x)}]").run(
        "def f(x):\n    return 1\n"
    )
    shared = expression("pkg·old(x)")
    unit = unit_of("def f(x):\n    return (1, 2)\n")
    node = unit.definitions[0].node
    line = node.body.body[0]
    both = line.body[0].value.with_changes(elements=[e.with_changes(value=shared) for e in line.body[0].value.elements])
    statement = line.with_changes(body=[line.body[0].with_changes(value=both)])
    tree = node.with_changes(body=node.body.with_changes(body=[statement]))
    outcome = run_rules(unit.replace(unit.definitions[0].with_node(tree)), bench.rules)
    assert code(outcome.unit.definitions[0].node).count("pkg·new(x)") == 2


def test_one_cache_serves_successive_runs(bench):
    bench.rule("{call: old}", "- match: old($x)\n  edit: [{replace: $site, with: new($x)}]").run(
        "def f(x):\n    return old(x)\n"
    )
    cache = IndexCache()
    first = run_rules(bench.unit, bench.rules, cache=cache)
    assert not run_rules(first.unit, bench.rules, cache=cache).edits


def test_definitions_can_be_removed_and_added(bench, monkeypatch):
    from porter.engine.edits import AddDefinition, RemoveDefinition
    from porter.engine.registry import OPS

    def swap(site, unit, args):
        extra = unit_of("def g(x):\n    return x\n").definitions[0]
        return [RemoveDefinition("h"), AddDefinition(extra, before="f")]

    monkeypatch.setitem(OPS, "swap", swap)
    monkeypatch.setattr("porter.engine.registry.load", lambda: None)
    bench.rule("{call: old}", "- op: swap").run("def h():\n    return 0\ndef f(x):\n    return old(x)\n")
    assert [d.name for d in bench.outcome.unit.definitions] == ["g", "f"]


def test_editing_a_definition_that_another_rule_removes_is_a_conflict(bench, monkeypatch):
    from porter.engine.edits import RemoveDefinition
    from porter.engine.registry import OPS

    monkeypatch.setitem(OPS, "gone", lambda site, unit, args: [RemoveDefinition("h")])
    monkeypatch.setattr("porter.engine.registry.load", lambda: None)
    bench.rule("{call: old}", "- op: gone")
    bench.rule("{call: new}", "- edit: [{replace: $site, with: abs(1)}]", name="b-rule")
    bench.run("def h():\n    return new(1)\ndef f(x):\n    return old(x)\n")
    assert bench.codes == ["PORT201"] and [d.name for d in bench.outcome.unit.definitions] == ["h", "f"]


@pytest.mark.parametrize("edit", ["{insert_before: $site, with: x = 1}", '{replace: $site, with: "x = 1\\ny = 2"}'])
def test_a_definition_keeps_its_place_alone(bench, edit):
    bench.rule("{class: {name: A}}", f"- edit:\n    - {edit}").run("class A:\n    size = 1\n")
    assert bench.codes == ["PORT203"] and "class A:" in bench.text


def test_a_whole_definition_can_be_removed(bench):
    bench.rule("{class: {name: A}}", "- edit: [{remove: $site}]").run(
        "class A:\n    size = 1\nclass B:\n    size = 1\n"
    )
    assert [d.name for d in bench.outcome.unit.definitions] == ["B"]
