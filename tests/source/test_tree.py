"""Edits of trees: exactly what was planned, and nothing beside it."""

import libcst as cst
import pytest

from porter.source import tree
from porter.source.shipping import packed, unpacked


def module(text):
    return cst.parse_module(text)


def name_of(node, value):
    return next(tree.find(node, cst.Name, where=lambda n: n.value == value))


def function(text):
    return module(text).body[0]


# ---- replace_nodes


def test_a_node_is_replaced_and_its_twin_of_the_same_code_is_not():
    node = tree.expression("f(a, a)")
    first = node.args[0].value
    assert tree.code(tree.replace_nodes(node, [(first, cst.Name("b"))])) == "f(b, a)"


def test_a_removed_statement_takes_no_other_with_it():
    node = module("a = 1\nb = 2\nc = 3\n")
    assert tree.replace_nodes(node, [(node.body[1], cst.RemoveFromParent())]).code == "a = 1\nc = 3\n"


def test_a_statement_may_become_several():
    node = module("a = 1\nb = 2\n")
    new = cst.FlattenSentinel(tree.statements("x = 1\ny = 2\n"))
    assert tree.replace_nodes(node, [(node.body[0], new)]).code == "x = 1\ny = 2\nb = 2\n"


def test_an_edit_sees_the_edits_below_it():
    node = tree.expression("f(g(x))")
    outer, inner = node, name_of(node, "x")
    edits = [(outer, lambda updated: updated.with_changes(func=cst.Name("h"))), (inner, cst.Name("y"))]
    assert tree.code(tree.replace_nodes(node, edits)) == "h(g(y))"


def test_what_replaces_a_node_discards_the_edits_below_it():
    node = tree.expression("f(g(x))")
    edits = [(node.args[0].value, cst.Name("z")), (name_of(node, "x"), cst.Name("y"))]
    assert tree.code(tree.replace_nodes(node, edits)) == "f(z)"


def test_untouched_parts_keep_their_identity():
    node = module("a = 1\nb = 2\n")
    assert tree.replace_nodes(node, [(name_of(node, "a"), cst.Name("c"))]).body[1] is node.body[1]


def test_no_edits_give_the_very_same_tree():
    node = module("a = 1\n")
    assert tree.replace_nodes(node, []) is node


def test_an_optional_child_can_be_removed():
    node = module("if a:\n    b\nelse:\n    c\n").body[0]
    assert "else" not in tree.code(tree.replace_nodes(node, [(node.orelse, cst.RemoveFromParent())]))


# ---- substitute


@pytest.mark.parametrize("text", ["y.x", "f(x=y)", "y.x.z", "lambda x: y"])
def test_attribute_names_keywords_and_parameters_are_not_substituted(text):
    assert tree.code(tree.expression(text, x=cst.Name("new"))) == text


def test_a_name_is_substituted_wherever_it_is_read():
    assert tree.code(tree.expression("f(x, k=x)[x].a", x=cst.Name("y"))) == "f(y, k=y)[y].a"


def test_what_is_substituted_keeps_its_meaning_beside_an_operator():
    assert tree.code(tree.expression("x * 2", x=tree.expression("a + b"))) == "(a + b) * 2"
    assert tree.code(tree.expression("x.real", x=tree.expression("a + b"))) == "(a + b).real"


def test_an_argument_gets_no_parentheses_that_it_does_not_need():
    assert tree.code(tree.expression("f(x)", x=tree.expression("a + b"))) == "f(a + b)"


def test_a_starred_argument_is_kept_together():
    assert tree.code(tree.expression("f(*x)", x=tree.expression("a or b"))) == "f(*(a or b))"


# ---- same, clone


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("f( a,b )", "f(a, b)"),
        ("(a + b)", "a + b"),
        ("'x'", '"x"'),
        ("f(\n  a,  # why\n)", "f(a)"),
        ("[1,2,]", "[1, 2]"),
    ],
)
def test_layout_makes_no_difference(left, right):
    assert tree.same(tree.expression(left), tree.expression(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a - b", "a + b"),
        ("f(a=b)", "f(b)"),
        ("f(*a)", "f(a)"),
        ("f(*a)", "f(**a)"),
        ("(a + b) * c", "a + b * c"),
        ("'1'", "1"),
        ("a[1]", "a[1:]"),
        ("f'a'", "'a'"),
        ("f'{a!r}'", "f'{a!s}'"),
        ("a is b", "a is not b"),
        ("ab", "a"),
    ],
)
def test_other_code_is_not_the_same(left, right):
    assert not tree.same(tree.expression(left), tree.expression(right))


def test_nothing_is_the_same_as_nothing_only():
    assert tree.same(None, None)
    assert not tree.same(None, tree.expression("a"))


def test_a_clone_is_the_same_code_with_no_node_in_common():
    node = function("def f(a, b=1):\n    if a:  # why\n        return b\n")
    copy = tree.clone(node)
    assert tree.code(copy) == tree.code(node)
    assert not {id(n) for n in tree.walk(node)} & {id(n) for n in tree.walk(copy)}


def test_editing_a_clone_leaves_the_original_alone():
    node = function("def f(a):\n    return a\n")
    copy = tree.clone(node)
    edited = tree.replace_nodes(copy, [(n, cst.Name("b")) for n in tree.find(copy.body, cst.Name)])
    assert "return b" in tree.code(edited) and "return a" in tree.code(node)
    assert tree.replace_nodes(copy, [(n, cst.Name("c")) for n in tree.find(node.body, cst.Name)]) is not node


# ---- functions and calls


def names(params):
    return [p.name.value for p in params]


def test_the_receiver_is_no_parameter_of_a_method():
    assert names(tree.own_parameters(function("def f(self, a, *, b): pass\n"))) == ["a", "b"]


def test_a_static_method_has_no_receiver_to_lose():
    assert names(tree.own_parameters(function("@staticmethod\ndef f(a, b): pass\n"))) == ["a", "b"]


def test_a_class_method_loses_its_receiver():
    assert names(tree.own_parameters(function("@classmethod\ndef f(cls, a): pass\n"))) == ["a"]


def test_arguments_are_bound_by_position_and_by_name():
    bound = tree.arguments(tree.expression("f(1, c=3)"), ["a", "b", "c"])
    assert {k: tree.code(v) for k, v in bound.items()} == {"a": "1", "c": "3"}


@pytest.mark.parametrize("call", ["f(*x)", "f(**x)", "f(1, 2, 3)"])
def test_a_call_that_cannot_be_bound_is_not_guessed(call):
    assert tree.arguments(tree.expression(call), ["a", "b"]) is None


def test_only_a_leading_docstring_is_stripped():
    stmts = function('def f():\n    """Doc."""\n    x = 1\n    "kept"\n').body.body
    assert [tree.code(s).strip() for s in tree.strip_docstring(stmts)] == ["x = 1", '"kept"']


def test_an_attribute_of_something_else_is_not_an_attribute_of_self():
    assert tree.self_attribute(tree.expression("self.a")) == "a"
    assert tree.self_attribute(tree.expression("self.a.b")) is None
    assert tree.self_attribute(tree.expression("attn.a")) is None


def test_an_emptied_body_is_still_a_body():
    assert "pass" in tree.code(tree.with_body(function("def f():\n    x = 1\n"), []))


def test_a_change_of_a_field_that_a_node_lacks_is_refused():
    with pytest.raises(TypeError, match="Name has no valeu"):
        cst.Name("a").with_changes(valeu="b")


def test_a_change_leaves_the_node_and_its_other_fields_as_they_were():
    old = tree.expression("(a)")
    new = old.with_changes(value="b")
    assert (tree.code(old), tree.code(new)) == ("(a)", "(b)")


@pytest.mark.parametrize(("kind", "expected"), [(cst.Name, True), (cst.BaseExpression, True), (cst.Attribute, False)])
def test_a_node_is_an_instance_of_its_class_and_of_that_class_bases(kind, expected):
    assert isinstance(cst.Name("a"), kind) is expected
    assert issubclass(cst.Name, kind) is expected


CLASS = """
@d
class A(B, c=1):
    def f(self, *, a: int = 3, **k) -> None:
        return [f'{a!r:>{w}}', (b, ), x[1:, ...], not a if b else -c]
"""


@pytest.mark.parametrize("text", ["x = 1  # why\n", CLASS])
def test_a_tree_comes_out_of_another_process_as_it_went_in(text):
    before = module(text)
    after = unpacked(packed(before))
    assert after.code == text and after.deep_equals(before)


def test_an_unpacked_tree_has_each_node_of_code_once():
    nodes = list(tree.walk(unpacked(packed(module("a = a + a\na = a + a\n")))))
    assert len({id(n) for n in nodes}) == len(nodes) > 10
