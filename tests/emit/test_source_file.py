"""A printed file defines what it was given, imports what that needs, and parses."""

import ast

import libcst as cst

from porter.emit.source_file import print_definitions
from porter.model import Definition


def printed(*sources, local=None):
    definitions = []
    for text in sources:
        node = cst.parse_module(text).body[0]
        definitions.append(Definition(node.name.value, node, "diffusers.m", "m.py"))
    return print_definitions(definitions, local or {}, "# header")


def test_the_header_stands_first_and_the_file_parses():
    text = printed("def f(x):\n    return torch·cat(x)\n")
    assert text.startswith("# header\n")
    assert [type(n).__name__ for n in ast.parse(text).body] == ["ImportFrom", "Import", "FunctionDef"]


def test_annotations_may_name_what_is_defined_further_down():
    text = printed("def f(x: B):\n    pass\n", "class B:\n    pass\n")
    assert "from __future__ import annotations" in text


def test_definitions_keep_their_order():
    text = printed("def z():\n    pass\n", "def a():\n    pass\n")
    assert text.index("def z") < text.index("def a")


def test_a_definition_is_not_imported_by_the_file_that_holds_it():
    text = printed("def f():\n    return diffusers·m·g()\n", "def g():\n    pass\n", local={"diffusers.m.g": "g"})
    assert "return g()" in text and "import g" not in text
