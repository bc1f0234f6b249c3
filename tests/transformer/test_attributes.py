"""How a list of blocks is offered to Cache-DiT: by the form in which its blocks take and return states."""

from __future__ import annotations

import re

import libcst as cst
import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.module_tree import module_tree
from porter.source.tree import code
from porter.transformer.attributes import class_attributes
from tests.facts.conftest import HEAD, build

BLOCKS = "self.blocks = nn.ModuleList([{} for _ in range(2)])"


def patterns(*layers: str, made: str = "Layer(2)", root: str = "x = block(x)") -> dict[str, str]:
    """Pattern by list, for a model whose root is made of the layers."""
    text = "".join(layers)
    text += build(
        BLOCKS.format(made), forward=f"for block in self.blocks:\n    {root}\nreturn x", arguments="x, y=None"
    )
    unit = unit_of(HEAD + text)
    printed = "".join(
        code(s) for s in class_attributes(unit, module_tree(unit), []) if isinstance(s, cst.BaseStatement)
    )
    return dict(re.findall(r'"(\w+)": \S*?(Pattern_\d)', printed))


def layer(arguments: str, returned: str, name: str = "Layer") -> str:
    return build("self.linear = nn.Linear(dim, dim)", forward=f"return {returned}", name=name, arguments=arguments)


@pytest.mark.parametrize(
    ("arguments", "returned", "pattern"),
    [
        ("hidden_states, encoder_hidden_states, temb", "hidden_states, encoder_hidden_states", "Pattern_0"),
        ("hidden_states, encoder_hidden_states, temb", "encoder_hidden_states, hidden_states", "Pattern_1"),
        ("hidden_states, encoder_hidden_states", "hidden_states", "Pattern_2"),
        ("hidden_states, temb", "hidden_states", "Pattern_3"),
        ("hidden_states, mask=None, encoder_hidden_states=None", "hidden_states", "Pattern_3"),
    ],
)
def test_the_form_is_that_of_the_first_two_arguments_and_of_what_is_returned(
    arguments: str, returned: str, pattern: str
) -> None:
    assert patterns(layer(arguments, returned)) == {"blocks": pattern}


def test_blocks_of_several_classes_have_a_form_if_it_is_the_same() -> None:
    one, other = layer("hidden_states, temb", "hidden_states"), layer("hidden_states, x", "hidden_states", "Other")
    made = "Layer(2) if dim > 2 else Other(2)"
    assert patterns(one, other, made=made) == {"blocks": "Pattern_3"}
    unlike = layer("hidden_states, encoder_hidden_states", "hidden_states", "Other")
    assert patterns(one, unlike, made=made) == {}


def test_a_block_that_takes_no_states_is_not_offered() -> None:
    assert patterns(layer("x, temb", "x")) == {}


def test_a_loop_that_does_more_than_calling_is_not_offered() -> None:
    assert patterns(layer("hidden_states, temb", "hidden_states"), root="x = block(x) + x") == {}
