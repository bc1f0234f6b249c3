"""Attention that can't become the engine's layer is reported, with what is wrong about it; it stays as it was."""

import pytest

from porter.engine import load_rules, run_rules
from porter.engine.absolute_text import unit_of
from porter.source.tree import code

ATTENTION = """
import torch.nn as nn
from diffusers.models.attention_dispatch import dispatch_attention_fn

class Net(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        k = self.k(x).unflatten(-1, (self.num_heads, -1))
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return dispatch_attention_fn(ARGUMENTS).flatten(2, 3)
"""


def outcome(arguments):
    return run_rules(unit_of(ATTENTION.replace("ARGUMENTS", arguments)), load_rules().only("engine-attention"))


def test_attention_becomes_the_engines_layer():
    found = outcome("q, k, v, dropout_p=0.0")
    assert not found.diagnostics and "self.attn(q, k, v)" in code(found.unit.definitions[0].node)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("q, k", "Net: no value is given"),
        ("query=q, value=v", "Net: no key is given"),
        ("q, k, v, bias=1", "Net: keyword bias"),
        ("*x", "Net: arguments hidden behind *"),
    ],
)
def test_attention_that_is_not_understood_stays_and_is_reported(arguments, says):
    found = outcome(arguments)
    assert says in [d.message for d in found.diagnostics]
    assert f"dispatch_attention_fn({arguments})" in code(found.unit.definitions[0].node)
