"""What a generated file must not contain: names bound nowhere, text that does not parse, Diffusers' machinery."""

import ast
from textwrap import dedent

import pytest

from porter.check.static import check_files, unbound


def missing(text):
    return [name for name, _ in unbound(ast.parse(dedent(text)))]


def codes(text):
    return [d.code for d in check_files({"a.py": dedent(text)})]


@pytest.mark.parametrize(
    "text",
    [
        "def f(a, /, b, *c, d, **e):\n    return a, b, c, d, e",
        "def f(xs):\n    return [x for x in xs], {k: v for k, v in xs}, (y for ys in xs for y in ys)",
        "def f(xs):\n    return [z for x in xs if (z := x)]",
        "def f():\n    def g():\n        return h\n    h = 1\n    return g",
        "def f():\n    return later()\n\ndef later(): pass",
        "class A:\n    size = 1\n    twice = size * 2",
        "class A:\n    def f(self):\n        return A, super().f(), __class__",
        "import a.b as c, d.e\nfrom f import g as h\nc, d, h",
        "try:\n    pass\nexcept ValueError as error:\n    print(error)",
        "with open('x') as (a, b):\n    a, b",
        "f = lambda x, *y, z=1, **w: (x, y, z, w)",
        "for i, (j, *k) in []:\n    i, j, k",
        "print(len([]), __name__)",
    ],
)
def test_a_bound_name_is_not_reported(text):
    assert missing(text) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("def f():\n    return gone", "gone"),
        ("def f():\n    def g():\n        inner = 1\n    return inner", "inner"),
        ("def f(x):\n    pass\n\ny = x", "x"),
        ("def f(xs):\n    return [gone for x in xs]", "gone"),
        ("f = lambda x: x + gone", "gone"),
        ("(lambda x: x)(x)", "x"),
        ("def f(x=gone): pass", "gone"),
        ("def f(x: gone): pass", "gone"),
        ("@gone\ndef f(): pass", "gone"),
        ("class A(gone): pass", "gone"),
        ("class A:\n    def f(self):\n        return {gone: 1}", "gone"),
        ("import a.gone\ngone", "gone"),
        ("from a import gone as here\ngone", "gone"),
    ],
)
def test_a_name_bound_nowhere_is_reported(text, name):
    assert missing(text) == [name]


def test_a_method_does_not_see_the_names_of_its_class():
    assert missing("class A:\n    size = 1\n    def f(self):\n        return size") == ["size"]


def test_a_class_in_a_class_does_not_see_the_names_around_it():
    assert missing("class A:\n    size = 1\n    class B:\n        twice = size * 2") == ["size"]


def test_an_attribute_or_keyword_is_no_name():
    assert missing("def f(x):\n    return x.gone(other=1)") == []


def test_an_unbound_name_is_reported_with_its_line():
    (found,) = check_files({"a/b.py": "x = 1\n\ny = gone\n"})
    assert (found.code, found.span.file, found.span.line) == ("PORT604", "a/b.py", 3)
    assert "gone" in found.message


def test_a_file_that_does_not_parse_is_reported_once_and_does_not_stop_the_others():
    found = check_files({"a.py": "def f(:\n", "b.py": "gone\n"})
    assert [(d.code, d.span.file) for d in found] == [("PORT601", "a.py"), ("PORT604", "b.py")]


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def f(self):\n        self.set_processor(1)",
        "def f(x):\n    return x.gradient_checkpointing",
        "from diffusers.configuration_utils import register_to_config",
        "import torch.nn.functional as F\n\ndef f(q):\n    return F.scaled_dot_product_attention(q, q, q)",
    ],
)
def test_machinery_of_diffusers_is_not_left_over(text):
    assert codes(text) == ["PORT603"]


def test_a_leftover_in_a_string_or_comment_is_no_leftover():
    assert codes('"""dispatch_attention_fn is gone."""\nx = "set_processor"  # register_to_config\n') == []


def test_a_name_that_only_contains_a_leftover_is_none():
    assert codes("def my_set_processor(x):\n    return x.set_processors\n") == []


def test_clean_files_are_not_reported():
    assert check_files({"a.py": "import torch\n\nx = torch.cat\n", "b.py": ""}) == []
