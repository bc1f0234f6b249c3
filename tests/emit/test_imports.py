"""Imports are derived from the names that are left: each name bound once, none without use."""

import ast

from porter.emit.imports import resolve_imports
from porter.source.names import absolute


def resolved(*names, local=None):
    """(spelling of each name, import lines)"""
    found = resolve_imports("\n".join(absolute(n) if "." in n else n for n in names), local or {})
    return found.body.split("\n"), list(found.imports)


def bound(lines):
    """Name -> what it is, as Python reads the import lines."""
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        for alias in node.names:
            origin = alias.name if isinstance(node, ast.Import) else f"{'.' * node.level}{node.module}.{alias.name}"
            found.setdefault(alias.asname or alias.name, []).append(origin)
    return found


def test_groups_are_standard_then_third_party_then_engine_then_this_folder():
    _, lines = resolved("sibling.other.D", "vllm_omni.layers.C", "torch.Tensor", "typing.Any")
    assert lines == ["from typing import Any", "", "import torch", "", "from vllm_omni.layers import C", "",
                     "from .other import D"]  # fmt: skip


def test_there_is_no_blank_line_where_a_group_is_missing():
    _, lines = resolved("torch.Tensor", "diffusers.utils.logging")
    assert "" not in lines


def test_a_text_without_absolute_names_needs_no_import():
    assert resolved("x", "y") == (["x", "y"], [])


def test_customary_short_names_are_used():
    names, lines = resolved("torch.nn.Linear", "torch.nn.functional.relu", "numpy.array")
    assert names == ["nn.Linear", "F.relu", "np.array"]
    assert bound(lines) == {"nn": ["torch.nn"], "F": ["torch.nn.functional"], "np": ["numpy"]}


def test_a_module_itself_can_be_named():
    found = resolve_imports(absolute("math") + "·", {})
    assert (found.body, found.imports) == ("math", ("import math",))


def test_names_of_one_module_share_a_line():
    _, lines = resolved("typing.Any", "typing.Literal", "typing.Any")
    assert lines == ["from typing import Any, Literal"]


def test_a_name_that_the_port_defines_itself_is_not_imported():
    assert resolved("diffusers.a.X", local={"diffusers.a.X": "MyX"}) == (["MyX"], [])


def test_two_imports_of_one_name_do_not_hide_each_other():
    names, lines = resolved("a.X", "b.X")
    assert len(set(names)) == 2
    assert {n: bound(lines)[n] for n in names} == {names[0]: ["a.X"], names[1]: ["b.X"]}


def test_an_import_does_not_hide_a_definition_of_the_port():
    names, lines = resolved("X", "a.X", local={"p.X": "X"})
    assert names[0] == "X" and "X" not in bound(lines)
    assert bound(lines)[names[1]] == ["a.X"]


def test_a_name_of_the_same_folder_is_imported_relatively():
    assert resolved("sibling.foo_transformer.Foo") == (["Foo"], ["from .foo_transformer import Foo"])


def test_an_attribute_that_only_looks_like_a_name_is_left_alone():
    found = resolve_imports("x.Linear + Linear + torch·nn·Linear", {})
    assert found.body == "x.Linear + Linear + nn.Linear"


def test_no_middle_dot_is_left():
    names, lines = resolved("torch.utils.checkpoint.checkpoint", "os.path.join", "collections.abc.Callable", "a.b.C")
    assert "·" not in "".join([*names, *lines])


def test_the_order_of_use_does_not_change_the_order_of_imports():
    names = ["typing.Any", "torch.nn.Linear", "diffusers.a.B", "vllm_omni.c.D", "math.pi"]
    assert resolved(*names)[1] == resolved(*reversed(names))[1]
