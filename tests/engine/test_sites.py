"""Which sites `on` finds, and how each one ends."""

import pytest

from porter.engine.registry import FACTS, OPS, FactSite
from porter.model import Diagnostic, Unknown
from porter.source.tree import find

REPORT = "- report: {PORT304: 'seen ${statement.lines}'}".replace(" ${statement.lines}", "")


def lines(bench):
    return [s.span.line - 2 for s in bench.outcome.statuses]


@pytest.mark.parametrize(
    ("on", "text", "expected"),
    [
        ("{call: old}", "def f(x):\n    old(x)\n    x.old(x)\n    return old\n", [2]),
        ("{reference: old}", "def f(x):\n    old(x)\n    return old\n", [2, 3]),
        ("{reference: '*.old'}", "def f(x):\n    return old, new\n", [2]),
        ("{decorator: old}", "@old\ndef f():\n    pass\n@old(1)\ndef g():\n    pass\n@new\ndef h():\n    pass\n", [2, 5]),
        ("{class: {derives_from: Old}}", "class A(Old):\n    x = 1\nclass B(A):\n    x = 1\nclass C:\n    x = 1\n", [1, 3]),
        ("{class: {name: 'A*'}}", "class Ab:\n    x = 1\nclass Ba:\n    x = 1\n", [1]),
        ("{method: forward}", "class A:\n    def forward(self):\n        pass\ndef forward():\n    pass\n", [2]),
        ("{class_attribute: _a*}", "class A:\n    _a = 1\n    _ab: int = 2\n    b = 1\n    def f(self):\n        _a = 1\n", [2, 3]),  # noqa: E501
        ("{pattern: 'self.x.$y'}", "def f(self):\n    return self.x.shape, self.z.shape\n", [2]),
        ("{statement: 'self.x = $v'}", "def f(self, x):\n    self.x = 1\n    x.x = 2\n", [2]),
        ("{call: old, within: {method: forward}}", "class A:\n    def forward(self):\n        old()\n    def g(self):\n        old()\n", [3]),  # noqa: E501
        ("{call: old, within: {class: 'B*'}}", "class A:\n    def f(self):\n        old()\nclass B:\n    def f(self):\n        old()\n", [6]),  # noqa: E501
    ],
)  # fmt: skip
def test_a_trigger_finds_exactly_its_sites(bench, on, text, expected):
    bench.rule(on, REPORT).run(text)
    assert lines(bench) == expected


def test_a_local_name_of_the_same_spelling_is_no_site(bench):
    bench.rule("{call: old}", REPORT).run("def f(old):\n    return old(1)\n")
    assert bench.statuses == []


def test_the_first_case_that_fits_wins(bench):
    cases = """
    - match: old(1)
      edit: [{replace: $site, with: "10"}]
    - match: old($x)
      edit: [{replace: $site, with: "20"}]
    """
    bench.rule("{call: old}", cases).run("def f():\n    return old(1), old(2)\n")
    assert "return 10, 20" in bench.text


def test_a_site_no_case_fits_is_reported_and_left(bench):
    bench.rule("{call: old}", "- match: old(1)\n  edit: [{remove: $site}]").run("def f():\n    return old(2)\n")
    assert bench.codes == ["PORT203"] and bench.statuses == ["diagnosed"]
    assert bench.outcome.diagnostics[0].span.line == 4 and bench.outcome.diagnostics[0].rule == "a-rule"
    assert not bench.outcome.edits


def test_otherwise_keep_waives_with_its_reason(bench):
    bench.rule("{call: old}", "- match: old(1)\n  edit: [{remove: $site}]", otherwise="{keep: it is fine}")
    bench.run("def f():\n    return old(2)\n")
    assert (bench.codes, bench.statuses) == ([], ["waived"])
    assert bench.outcome.statuses[0].detail == "it is fine"


def test_a_kept_site_is_waived(bench):
    bench.rule("{call: old}", "- keep: the engine wants $site").run("def f():\n    return old(2)\n")
    assert bench.outcome.statuses[0].detail == "the engine wants old(2)"


def test_inferred_is_a_visible_status(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: new()}]\n  status: inferred")
    assert bench.run("def f():\n    return old(2)\n").statuses == ["inferred"]


def test_match_looks_outwards_for_the_nearest_node(bench):
    cases = "- match: |\n    if $c:\n        $$b\n  edit: [{replace: $site, with: $$b}]"
    bench.rule("{call: old}", cases).run("def f(x):\n    if x:\n        if old(x):\n            y = 1\n")
    assert "if x:\n        y = 1" in bench.text


def test_a_site_inside_swallowed_statements_is_not_the_matched_one(bench):
    cases = "- match: |\n    if $c:\n        $$b\n  edit: [{replace: $site, with: $$b}]"
    bench.rule("{call: old}", cases).run("def f(x):\n    if x:\n        old(x)\n")
    assert bench.statuses == ["diagnosed"]


OPTIONS = """options:
  mask: {bind: mask, default: None}
  drop: {must_be: 0.0}
  scale: {bind: scale, must_be: literal}
  backend: {ignore: the engine chooses}
"""
CASES = """
- where: {mask: {is: None}, scale: {absent: true}}
  edit: [{replace: $site, with: new($q)}]
- where: {scale: {absent: true}}
  edit: [{replace: $site, with: "new($q, mask=$mask)"}]
- edit: [{replace: $site, with: "new($q, scale=$scale)"}]
"""


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("old(q)", "new(q)"),
        ("old(q, backend=self.b)", "new(q)"),
        ("old(q, drop=0.0)", "new(q)"),
        ("old(q, mask=m)", "new(q, mask=m)"),
        ("old(q, mask=None)", "new(q)"),
        ("old(q, scale=2)", "new(q, scale=2)"),
    ],
)
def test_options_account_for_every_keyword(bench, call, expected):
    bench.rule("{call: old}", CASES, match="old($q)", extra=OPTIONS).run(f"def f(self, q, m):\n    return {call}\n")
    assert f"return {expected}\n" in bench.text and bench.codes == []


@pytest.mark.parametrize(
    ("call", "code", "word"),
    [
        ("old(q, kwargs=1)", "PORT302", "`kwargs=1`"),
        ("old(q, **more)", "PORT302", "`**more`"),
        ("old(q, drop=0.1)", "PORT303", "only take 0.0"),
        ("old(q, scale=self.s)", "PORT303", "only take literal"),
        ("old(q, 1)", "PORT203", "no case"),
    ],
)
def test_a_keyword_nobody_accounted_for_is_never_dropped(bench, call, code, word):
    bench.rule("{call: old}", CASES, match="old($q)", extra=OPTIONS).run(f"def f(self, q, more):\n    return {call}\n")
    assert bench.codes == [code] and word in bench.outcome.diagnostics[0].message
    assert call in bench.text


@pytest.fixture
def calls_fact(monkeypatch):
    def finder(unit):
        import libcst as cst

        for definition in unit.definitions:
            for call in find(definition.node, cst.Call):
                size = Unknown("not written out") if not call.args else call.args[0].value
                yield FactSite(call, definition.name, {"size": size, "kind": "cross", "text": "self.heads", "count": 2})

    monkeypatch.setitem(FACTS, "calls", finder)
    monkeypatch.setattr("porter.engine.registry.load", lambda: None)


def test_facts_give_sites_with_fields(bench, calls_fact):
    cases = """
    - where: {c.kind: [cross, self], c.size: {known: true}}
      edit: [{replace: $c, with: "new(${c.size}, ${c.text}, ${c.count})"}]
    """
    bench.rule("{fact: calls, bind: c}", cases).run("def f(x):\n    return g(x), h()\n")
    assert "new(x, self.heads, 2), h()" in bench.text
    assert bench.statuses == ["applied", "diagnosed"]


def test_facts_are_filtered_by_value(bench, calls_fact):
    bench.rule("{fact: calls, filter: {kind: [joint]}}", REPORT).run("def f(x):\n    return g(x)\n")
    assert bench.statuses == []


def test_an_unknown_field_in_an_edit_is_reported_not_spliced(bench, calls_fact):
    bench.rule("{fact: calls, bind: c}", '- edit: [{replace: $c, with: "new(${c.size})"}]').run(
        "def f():\n    return h()\n"
    )
    assert bench.codes == ["PORT203"] and "h()" in bench.text


def test_an_op_returns_edits_or_one_diagnostic(bench, monkeypatch):
    from porter.engine.edits import replaced
    from porter.source.tree import expression

    def swap(site, unit, args):
        if args["to"] == "nothing":
            return Diagnostic("PORT304", "can't", site.span, site.rule)
        return [replaced(site.node, expression(args["to"], x=args["x"]))]

    monkeypatch.setitem(OPS, "swap", swap)
    monkeypatch.setattr("porter.engine.registry.load", lambda: None)
    cases = "- match: old($x)\n  op: swap\n  args: {to: x * 2, x: $x}\n- op: swap\n  args: {to: nothing}"
    bench.rule("{call: old}", cases).run("def f(a):\n    return old(a), old()\n")
    assert "return a * 2, old()" in bench.text
    assert (bench.codes, bench.statuses) == (["PORT304"], ["applied", "diagnosed"])
