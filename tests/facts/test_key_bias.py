"""A bias that only says which keys are padding is followed from the model into every layer that adds it."""

from textwrap import dedent

import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.key_bias import key_biases
from tests.facts.conftest import HEAD, build

IMPORTS = HEAD + "from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata\n"
SPREAD = """
batch, length, _ = x.shape
if mask is not None:
    head_size = self.heads
    current_length = mask.shape[-1]
    if current_length != length:
        mask = F.pad(mask, (0, length), value=0.0)
    if mask.shape[0] < batch * head_size:
        mask = mask.repeat_interleave(head_size, dim=0)
    mask = mask.view(batch, self.heads, -1, mask.shape[-1])
return self.attn(x, x, x, attn_metadata=AttentionMetadata(attn_mask=mask) if mask is not None else None)
"""
MADE = """
if mask is not None and mask.ndim == 2:
    mask = (1 - mask.to(x.dtype)) * -10000.0
    mask = mask.unsqueeze(1)
"""
LOOP = (
    MADE
    + "for i, (first, second) in enumerate(zip(self.blocks, self.others)):\n    x = second(first(x, mask), mask=mask)\n"
)
LAYERS = ("self.heads = heads", "self.attn = nn.Identity()")
LISTS = (
    "self.blocks = nn.ModuleList([Layer(2), Layer(2)])",
    "self.others = nn.ModuleList([Layer(2) for _ in range(2)])",
)


def found(forward, layer=SPREAD):
    text = build(*LAYERS, forward=layer, name="Layer", parameters="heads", arguments="x, mask=None")
    text += build(*LISTS, forward=forward, name="Net", arguments="x, mask=None, other=None")
    return [(s.definition, s.fields["made"]) for s in key_biases(unit_of(IMPORTS + dedent(text)))]


def test_a_bias_is_followed_through_loops_over_several_lists():
    assert found(LOOP + "return x") == [("Net", True), ("Layer", False)]


@pytest.mark.parametrize(
    "use",
    [
        "x = self.blocks[0](x, mask=other)",
        "layer = self.blocks[0]\nx = layer(x, other)",
        "x = self.blocks[0](x, *other)",
        "x = x + mask",
        "x = x if mask is None else 2 * x",
        "x = self.others[1](x, mask=mask * 2)",
    ],
)
def test_a_bias_that_something_else_meets_or_reads_is_left_alone(use):
    assert found(LOOP + use + "\nreturn x") == []


@pytest.mark.parametrize(
    "change",
    [
        ("mask.ndim == 2", "mask.ndim == 3"),
        ("-10000.0", "-10.0"),
        ("mask.unsqueeze(1)", "mask.unsqueeze(2)"),
    ],
)
def test_another_bias_is_none_of_padding(change):
    assert found(LOOP.replace(*change) + "return x") == []


@pytest.mark.parametrize(
    "change",
    [
        ("mask.repeat_interleave(head_size, dim=0)", "mask.repeat_interleave(head_size, dim=1)"),
        ("mask.view(batch, self.heads, -1, mask.shape[-1])", "mask.view(batch, self.heads, mask.shape[-1], -1)"),
        ("return ", "x = x * head_size\nreturn "),
        ("return ", "x = x + mask.sum()\nreturn "),
    ],
)
def test_a_layer_that_does_more_with_the_bias_keeps_it(change):
    assert found(LOOP + "return x", SPREAD.replace(*change)) == []
