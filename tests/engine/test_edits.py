"""Each verb does its one thing, is idempotent where it says so, and refuses what it can't do."""

import pytest

NET = """
class Net(nn.Module):
    '''A net.'''

    size = 1

    def __init__(self, heads, dim=2):
        '''Builds.'''
        super().__init__()
        self.heads = heads
        self.dim = dim
        self.last = 1

    def forward(self, x):
        return old(x)
"""


def ensured(bench, edit, text=NET):
    return bench.rule("{call: old}", f"- edit:\n    - {edit}").run(text)


def body(text, start, count):
    rows = [line.strip() for line in text.splitlines()]
    at = rows.index(start)
    return rows[at + 1 : at + 1 + count]


def test_replacing_statements_keeps_their_comments(bench):
    cases = "- match: |\n    if $c:\n        $$b\n  edit: [{replace: $site, with: $$b}]"
    bench.rule("{pattern: old($x)}", cases)
    bench.run("def f(x):\n    # above\n    if old(x):\n        # inside\n        y = 1  # beside\n    return y\n")
    assert "    # above\n    # inside\n    y = 1  # beside\n    return y" in bench.text


def test_removing_the_last_statement_leaves_pass(bench):
    bench.rule("{call: old}", "- edit: [{remove: $site}]").run("def f(x):\n    old(x)\n")
    assert bench.text == "def f(x):\n    pass\n"


def test_removing_an_argument_and_an_element(bench):
    bench.rule("{reference: old}", "- edit: [{remove: $site}]").run("def f(x):\n    return g(x, old), [old, x]\n")
    assert "g(x, )" in bench.text.replace("g(x)", "g(x, )") and "[x]" in bench.text


def test_what_is_no_item_of_a_list_cannot_be_removed(bench):
    bench.rule("{reference: old}", "- edit: [{remove: $site}]").run("def f(x):\n    return old + x\n")
    assert bench.codes == ["PORT203"] and "return old + x" in bench.text


def test_inserting_before_and_after(bench):
    bench.rule(
        "{call: old}", "- edit:\n    - {insert_before: $site, with: a = 1}\n    - {insert_after: $site, with: b = 2}"
    )
    bench.run("def f(x):\n    y = old(x)\n    return y\n")
    assert body(bench.text, "def f(x):", 3) == ["a = 1", "y = old(x)", "b = 2"]


def test_new_code_may_splice_the_node_it_replaces(bench):
    bench.rule("{call: old}", "- edit: [{replace: $site, with: new($site)}]").run("def f(x):\n    return old(x)\n")
    assert "return new(old(x))" in bench.text


def test_spliced_code_gets_the_parentheses_it_needs_and_no_more(bench):
    bench.rule("{call: old}", '- match: old($x)\n  edit: [{replace: $site, with: "new($x, 2 * $x)"}]')
    bench.run("def f(a, b):\n    return old(a + b), old((a))\n")
    assert "new(a + b, 2 * (a + b)), new(a, 2 * (a))" in bench.text


def test_a_capture_can_be_named_in_a_string(bench):
    bench.rule("{call: old}", "- match: old(self.$slot)\n  edit: [{replace: $site, with: 'new(\"$slot\")'}]")
    bench.run("def f(self):\n    return old(self.attn)\n")
    assert 'new("attn")' in bench.text


def test_bases_are_removed_and_ensured(bench):
    cases = "- edit:\n    - remove_bases: {bases: Old}\n    - ensure_base: {base: nn.Module}"
    bench.rule("{class: {derives_from: Old}}", cases).run(
        "class A(Old):\n    x = 1\nclass B(nn.Module, Old):\n    x = 1\n"
    )
    assert "class A(Module):" in bench.text.replace("(Module, )", "(Module)")
    assert bench.text.count("Module") == 2 and "Old" not in bench.text


def test_a_decorator_is_removed_by_name(bench):
    bench.rule("{method: forward}", "- edit: [{remove_decorator: old}]")
    bench.run("class A:\n    @old(1)\n    @new\n    def forward(self):\n        pass\n")
    assert "old" not in bench.text and "@new" in bench.text


@pytest.mark.parametrize(
    ("edit", "signature"),
    [
        ("ensure_parameter: {name: config, of: __init__, at: first}", "(self, config, heads, dim=2)"),
        (
            "ensure_parameter: {name: config, of: __init__, type: int, default: '3'}",
            "(self, heads, dim=2, config: int = 3)",
        ),
        ("ensure_parameter: {name: config, of: __init__, at: keyword}", "(self, heads, dim=2, *, config)"),
        ("ensure_parameter: {name: config, of: __init__}", "(self, heads, dim=2, *, config)"),
        ("ensure_parameter: {name: heads, of: __init__}", "(self, heads, dim=2)"),
        ("ensure_parameter: {name: dim, of: __init__, default: '2'}", "(self, heads, dim=2)"),
    ],
)
def test_a_parameter_is_ensured(bench, edit, signature):
    assert f"def __init__{signature}:" in ensured(bench, edit).text


def test_a_parameter_with_another_default_is_a_clash(bench):
    assert ensured(bench, "ensure_parameter: {name: dim, of: __init__, default: '3'}").codes == ["PORT202"]


def test_an_argument_is_ensured_before_double_stars(bench):
    bench.rule("{call: old}", "- edit:\n    - ensure_argument: {call: $site, name: k, value: '1'}")
    bench.run("def f(kw):\n    return old(2), old(k=1), old(k=2), old(**kw)\n")
    assert "old(2, k=1), old(k=1), old(k=2), old(k=1, **kw)" in bench.text
    assert bench.codes == ["PORT202"]


@pytest.mark.parametrize(
    ("value", "after"),
    [
        ("Old()", "super().__init__()"),
        ("Old(self.heads)", "self.heads = heads"),
        ("Old(self.dim, self.heads)", "self.dim = dim"),
        ("Old($h)", "super().__init__()"),
        ("Old(self.elsewhere)", "self.last = 1"),
    ],
)
def test_an_attribute_stands_after_what_its_value_reads(bench, value, after):
    bench.rule(
        "{call: old}", f"- match: old($h)\n  edit:\n    - ensure_init_attribute: {{name: attn, value: '{value}'}}"
    )
    bench.run(NET.replace("old(x)", "old(heads)"))
    value = value.replace("$h", "heads")
    assert body(bench.text, after, 1) == [f"self.attn = {value}"]


def test_the_same_attribute_wanted_twice_is_made_once(bench):
    text = NET.replace("return old(x)", "return old(x) + old(x)")
    ensured(bench, "ensure_init_attribute: {name: attn, value: Old()}", text)
    assert bench.text.count("self.attn = Old()") == 1 and bench.codes == []


def test_an_attribute_that_is_there_with_the_same_value_stays(bench):
    ensured(bench, "ensure_init_attribute: {name: last, value: '1'}")
    assert not bench.outcome.edits and bench.codes == []


def test_an_attribute_that_is_there_with_another_value_is_a_clash(bench):
    assert ensured(bench, "ensure_init_attribute: {name: last, value: '2'}").codes == ["PORT202"]


def test_two_rules_that_want_different_values_are_a_clash_that_names_both(bench):
    bench.rule("{call: old}", "- edit:\n    - ensure_init_attribute: {name: attn, value: Old()}")
    bench.rule("{call: old}", "- edit:\n    - ensure_init_attribute: {name: attn, value: Old(1)}", name="b-rule").run(
        NET
    )
    assert bench.codes == ["PORT202"] and not bench.outcome.edits
    assert "a-rule and b-rule" in bench.outcome.diagnostics[0].message


def test_a_class_without_init_gets_one(bench):
    text = "class A(nn.Module):\n    def forward(self, x):\n        return old(x)\n"
    ensured(bench, "ensure_init_attribute: {name: attn, value: Old()}", text)
    assert body(bench.text, "class A(Module):", 3) == [
        "def __init__(self, *args, **kwargs):",
        "super().__init__(*args, **kwargs)",
        "self.attn = Old()",
    ]


def test_a_class_attribute_stands_with_the_others(bench):
    assert body(ensured(bench, "ensure_class_attribute: {name: _plan, value: '[]'}").text, "size = 1", 1) == [
        "_plan = []"
    ]


def test_a_method_is_ensured_once(bench):
    edit = "ensure_method: {code: 'def extra(self): return 1'}"
    ensured(bench, edit)
    assert bench.text.count("def extra(self)") == 1
    assert not bench.again().edits


def test_a_local_is_renamed_everywhere_but_in_labels(bench):
    bench.rule("{method: forward}", "- edit:\n    - rename_local: {name: attn, to: self, of: $site}")
    bench.run("class A:\n    def forward(this, attn):\n        return attn.attn(g(attn=attn), lambda: attn)\n")
    assert "def forward(this, self):" in bench.text and "self.attn(g(attn=self), lambda: self)" in bench.text


def test_renaming_onto_a_name_in_use_is_refused(bench):
    bench.rule("{method: forward}", "- edit:\n    - rename_local: {name: a, to: b, of: $site}")
    assert bench.run("class A:\n    def forward(self, a, b):\n        return a\n").codes == ["PORT202"]


def test_a_statement_is_made_to_raise(bench):
    bench.rule("{call: old}", "- match: old($x)\n  edit:\n    - mark_raise: {message: no $x here}")
    bench.run("def f(x):\n    y = old(x)\n    return y\n")
    assert body(bench.text, "def f(x):", 1) == ["raise NotImplementedError('no x here')"]


def test_every_statement_a_rule_wrote_or_touched_carries_its_mark(bench):
    from porter.source.marks import read
    from porter.source.tree import code

    cases = """
    - match: old($x)
      edit:
        - insert_before: $site
          with: |
            if $x:
                y = 1
        - replace: $site
          with: new($x)
    """
    bench.rule("{call: old}", cases).run("def f(x):\n    z = old(x)\n    return z\n")
    marks = [read(line) for line in code(bench.outcome.unit.definitions[0].node).splitlines()]
    assert [(m.line - 2, m.rules) for m in marks] == [
        (1, ()),
        (2, ("a-rule",)),
        (2, ("a-rule",)),
        (2, ("a-rule",)),
        (3, ()),
    ]


def test_a_second_run_plans_nothing(bench):
    ensured(bench, "ensure_init_attribute: {name: attn, value: Old()}")
    assert bench.outcome.edits and not bench.again().edits
