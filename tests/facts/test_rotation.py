"""Which calls turn pairs of neighbours, and by which tables: what is not surely so is left alone."""

from __future__ import annotations

import libcst as cst
import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.normed_rotation import normed_rotations
from porter.facts.rotation import angles_come_twice, pair_rotation
from porter.model import Unit
from porter.source import tree

TABLES = """
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
import torch

def forward(x, table):
    return {call}

class Tables:
    def forward(self, ids):
        return get_1d_rotary_pos_embed(8, ids, use_real=True)
"""


def turn(call: str) -> object:
    unit = unit_of(TABLES.format(call=call))
    definition = unit.get("forward")
    assert definition is not None
    (line,) = tree.find(definition.node, cst.Return)
    return pair_rotation(line.value, unit)  # type: ignore[arg-type]


def test_real_tables_are_taken_at_every_second_column() -> None:
    found = turn("apply_rotary_emb(x, table, sequence_dim=1)")
    assert found is not None
    assert found.waves() == ("table[0][:, ::2]", "table[1][:, ::2]")  # type: ignore[attr-defined]
    assert found.waves(stop="n")[0] == "table[0][:n, ::2]"  # type: ignore[attr-defined]


def test_complex_tables_are_split_into_their_parts() -> None:
    found = turn("apply_rotary_emb(x, table, use_real=False)")
    assert found is not None
    assert found.waves() == ("table.real", "table.imag")  # type: ignore[attr-defined]
    assert found.waves(start="n")[1] == "table.imag[..., n:, :]"  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", [
    "apply_rotary_emb(x, table)",  # tokens along dimension 2
    "apply_rotary_emb(x, table, use_real_unbind_dim=-2, sequence_dim=1)",  # halves, not neighbours
    "apply_rotary_emb(x, table, use_real=table is not None, sequence_dim=1)",  # not known
    "apply_rotary_emb(*x)",
    "torch.roll(x, 1)",
    "unknown(x, table)",
])  # fmt: skip
def test_another_rotation_or_an_unknown_one_is_none(call: str) -> None:
    assert turn(call) is None


@pytest.mark.parametrize(("body", "twice"), [
    ("get_1d_rotary_pos_embed(8, ids, use_real=True)", True),
    ("get_1d_rotary_pos_embed(8, ids, use_real=True, repeat_interleave_real=False)", False),
    ("get_1d_rotary_pos_embed(8, ids)", False),
    ("ids.cos()", False),
    ("torch.cos(ids)", False),
    ("ids", False),
])  # fmt: skip
def test_angles_come_twice_only_where_all_tables_repeat_them(body: str, twice: bool) -> None:
    text = TABLES.format(call="x").replace("get_1d_rotary_pos_embed(8, ids, use_real=True)", body)
    assert angles_come_twice(unit_of(text)) is twice


def test_a_table_that_a_caller_gives_is_not_known() -> None:
    text = TABLES.format(call="x") + "\nclass Net:\n    def forward(self, x, image_rotary_emb):\n        return x\n"
    unit = unit_of(text)
    assert angles_come_twice(Unit(unit.definitions, "Tables")) and not angles_come_twice(Unit(unit.definitions, "Net"))


ATTENTION = """
import torch
from torch import nn
from diffusers.models.embeddings import apply_rotary_emb

class Attn(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm_q = nn.RMSNorm(size, eps={eps_q})
        self.norm_k = nn.RMSNorm(size, eps=1e-6{more})

    def forward(self, q, k, table):
        q = self.norm_q(q)
        k = self.norm_k(k)
        {between}
        q = apply_rotary_emb(q, table, use_real=False)
        k = apply_rotary_emb(k, {other}, use_real=False)
        return q, k
"""


@pytest.mark.parametrize(("change", "found"), [
    ({}, 1),
    ({"eps_q": "1e-5"}, 0),  # the kernel has one epsilon
    ({"more": ", elementwise_affine=False"}, 0),  # no weight to give to the kernel
    ({"between": "q = q * 2"}, 0),
    ({"between": "if table is None:\n            return q, k"}, 0),
    ({"between": "v = torch.ones(3)"}, 1),
    ({"other": "table[1:]"}, 0),
])  # fmt: skip
def test_heads_that_are_normed_and_turned_alike_are_found(change: dict[str, str], found: int) -> None:
    usual = {"eps_q": "1e-6", "more": "", "between": "pass", "other": "table"}
    assert len(list(normed_rotations(unit_of(ATTENTION.format(**usual | change))))) == found
