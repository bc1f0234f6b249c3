"""Tokens are divided only where every step in between acts on each token alone, or is attention."""

from textwrap import dedent, indent

import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.sequence.plan import SequencePlan, sequence_plan
from porter.model import Unknown
from porter.source import tree
from porter.source.names import DOT

HEAD = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

"""
QKV = "q, k, v = self.qkv(x).unflatten(-1, (6, -1)).chunk(3, dim=2)\n"


def unit(
    block, *, arguments="x, temb", loop="x = block(x, temb)", before="", after="return x", inputs="x, temb, table=None",
    built="",
):  # fmt: skip
    """A model of two blocks whose forward is `block`."""
    return unit_of(
        HEAD
        + dedent(
            """
            class Block(nn.Module):
                def __init__(self, dim):
                    super().__init__()
                    self.norm = nn.LayerNorm(dim)
                    self.qkv = nn.Linear(dim, dim)
                    self.kv = nn.Linear(dim, dim)
                    self.conv = nn.Conv1d(dim, dim, 3)
                    self.attn = Attention(num_heads=2, head_size=8, softmax_scale=1.0, causal=False)
            """
        )
        + indent(f"def forward(self, {arguments}):\n" + indent(dedent(block), "    "), "    ")
        + dedent(
            """
            class Net(nn.Module):
                def __init__(self, dim):
                    super().__init__()
                    self.blocks = nn.ModuleList([Block(dim) for _ in range(2)])
                    self.norm_out = nn.LayerNorm(dim)
                    self.proj_out = nn.Linear(dim, dim)
            """
        )
        + indent(f"{built}\n", 8 * " ")
        + indent(
            f"def forward(self, {inputs}):\n"
            + indent(dedent(before), "    ")
            + indent(f"for block in self.blocks:\n    {loop}\n", "    ")
            + indent(dedent(after), "    "),
            "    ",
        )
    )


def plan(block, **more) -> SequencePlan:
    found = sequence_plan(unit(block, **more))
    assert isinstance(found, SequencePlan), found
    return found


def reason(block, **more) -> str:
    found = sequence_plan(unit(block, **more))
    assert isinstance(found, Unknown)
    return found.reason


SELF = QKV + "return x + self.attn(q, k, v).flatten(2)\n"


def test_what_the_blocks_hand_on_is_divided():
    assert [(s.name, s.axis) for s in plan(SELF).streams] == [("x", 1)]


def test_the_result_is_put_together_at_the_last_layer_that_acts_on_each_token():
    after = "x = self.norm_out(x)\nx = self.proj_out(x)\nreturn x.reshape(x.shape[0], 4, 4, -1)"
    gather = plan(SELF, after=after).gather
    assert (gather.module, gather.stream) == ("proj_out", "x")


def test_without_such_a_layer_it_is_put_together_behind_the_loop():
    assert plan(SELF, after="return x.reshape(x.shape[0], 4, 4, -1)").gather.module is None


def test_a_rotary_table_is_divided_with_the_tokens():
    block = QKV + "return self.attn(q * rotary[None, :, None, :], k, v).flatten(2)\n"
    found = plan(
        block, arguments="x, temb, rotary", loop="x = block(x, temb, freqs)", before="freqs = self.rope(table)\n"
    )
    assert [(e.variable, e.axis) for e in found.tables] == [("freqs", -2)]


@pytest.mark.parametrize("scale", ["temb[:, None]", "temb.unsqueeze(1)", "temb.unsqueeze(1).chunk(2, dim=-1)[0]"])
def test_modulation_is_the_same_for_all_tokens(scale):
    assert plan(f"x = self.norm(x) * (1 + {scale})\n" + SELF).tables == ()


def test_a_tensor_whose_rank_is_tested_counts_tokens_in_that_rank_alone():
    block = "if temb.ndim == 3:\n    x = x * temb\nelse:\n    x = x * temb.unsqueeze(1)\n" + SELF
    assert [(e.variable, e.axis, e.rank) for e in plan(block).tables] == [("temb", -2, 3)]


def test_positions_in_a_tuple_of_tuples_are_divided():
    rows, columns = (f"F.embedding(freqs[1][{i}], freqs[0][{i}])[:, :, None]" for i in range(2))
    block = QKV + f"q = q * {rows} * {columns}\nreturn self.attn(q, k, v).flatten(2)\n"
    found = plan(block, arguments="x, freqs", loop="x = block(x, freqs)", inputs="x, freqs")
    assert [(e.variable, e.path, e.axis) for e in found.tables] == [("freqs", (1, 0), -1), ("freqs", (1, 1), -1)]


VECTOR = {"before": "temb = self.embed(temb)\n", "inputs": "x, temb"}


def modulations(block, **more):
    found = plan(block, **{**VECTOR, **more})
    return [(e.variable, e.axis, e.rank) for e in found.modulations], [e.variable for e in found.undivided]


def test_a_modulation_of_unknown_shape_may_have_one_entry_per_token():
    assert modulations("x = x * temb\n" + SELF) == ([("temb", -2, 3)], [])
    either = "shift = temb\nif temb.ndim == 2:\n    shift = temb.unsqueeze(1)\nx = x + shift\n"
    assert modulations(either + SELF) == ([("temb", -2, 3)], [])


@pytest.mark.parametrize("block", ["x = x * temb[:, None]\n", "x = x * self.norm(temb)[:, None].chunk(2, dim=1)[0]\n"])
def test_a_vector_of_the_request_has_not(block):
    assert modulations(block + SELF) == ([], [])
    assert modulations("x = x * temb\n" + SELF, before="temb = self.embed(temb)[:, None]\n") == ([], [])


def test_what_is_also_used_in_a_way_that_can_t_be_followed_is_not_divided():
    assert modulations("x = x * temb * self.scale(temb)\n" + SELF) == ([], ["temb"])


def test_a_table_that_is_read_behind_the_tokens_is_whole_there():
    block = {"arguments": "x, freqs", "loop": "x = block(x, freqs)", "inputs": "x, freqs"}
    found = plan("x = x * freqs\n" + SELF, after="x = self.proj_out(x)\nreturn x * freqs", **block)
    assert (found.gather.module, found.restored) == ("proj_out", ("freqs",))
    assert plan("x = x * freqs\n" + SELF, after="x = self.proj_out(x)\nreturn x", **block).restored == ()


MASKED = QKV + "return x + self.attn(q, k, v, attn_metadata=AttentionMetadata(attn_mask=mask)).flatten(2)\n"
WITH_MASK = {"arguments": "x, mask", "loop": "x = block(x, mask)", "inputs": "x, mask"}


def counted(block, **more):
    return [(tree.code(c.node), c.parts) for c in plan(block, **more).counted]


def test_a_mask_that_every_rank_has_in_full_counts_all_tokens():
    block = "_, n, _ = x.shape\nif mask.shape[-1] != n:\n    mask = F.pad(mask, (0, n), value=0.0)\n" + MASKED
    assert counted(block, **WITH_MASK) == [("n", ("x",)), ("n", ("x",))]
    block = "mask = F.pad(mask, (x.shape[1] - mask.shape[1], 0))\n" + MASKED
    assert counted(block, **WITH_MASK) == [("x.shape[1]", ("x",))]


PAIRS = """
b, n, _ = x.shape
whole = torch.ones((b, n))
whole[:, :n] = mask
whole = whole.unsqueeze(2)
mask = (whole @ whole.transpose(1, 2) > 0).unsqueeze(1)
"""


def test_a_mask_of_every_pair_of_tokens_is_made_of_all_of_them():
    assert counted(PAIRS + MASKED, **WITH_MASK) == [("n", ("x",)), ("n", ("x",))]
    longer = "n = x.shape[1]\nmask = F.pad(mask, (0, n - mask.shape[1])).bool()\nrows = mask.view(2, 1, 1, n)"
    block = f"{longer}.repeat(1, 1, n, 1)\nmask = rows & rows.transpose(2, 3)\n" + MASKED
    assert [found for found, _ in counted(block, **WITH_MASK)] == ["n", "n", "n"]


def test_tokens_multiplied_with_tokens_have_no_plan():
    assert "multiplied with tokens" in reason("x = x @ x.transpose(1, 2) @ x\n" + SELF)
    block = PAIRS.replace("= mask", "= x[:, :, 0]") + MASKED
    assert "tokens are written into a tensor" in reason(block, **WITH_MASK)


def test_what_is_made_for_this_rank_s_tokens_stays_of_its_length():
    assert counted("x = x + torch.ones((2, x.shape[1], 1))\n" + MASKED, **WITH_MASK) == []


def test_a_number_compared_with_the_length_of_a_divided_table_is_this_rank_s():
    block = "if freqs.shape[-2] == x.shape[1]:\n    x = x * freqs\n" + SELF
    assert counted(block, arguments="x, freqs", loop="x = block(x, freqs)", inputs="x, freqs") == []


def test_a_number_that_shapes_tokens_is_this_rank_s():
    assert counted("n = x.shape[1]\nx = x.view(2, n, 4)[:, :n]\n" + MASKED, **WITH_MASK) == []


def test_a_layer_used_for_divided_and_for_whole_tokens_can_t_tell_which_it_counts():
    block = "if mask.shape[-1] != x.shape[1]:\n    mask = F.pad(mask, (0, x.shape[1]))\n" + MASKED
    assert "counts divided tokens and whole ones" in reason(
        block, built="self.first = Block(dim)", before="mask = self.first(mask, mask)\n", **WITH_MASK
    )


JOINT = """
q, k, v = self.qkv(x).unflatten(-1, (6, -1)).chunk(3, dim=2)
tq, tk, tv = self.qkv(text).unflatten(-1, (6, -1)).chunk(3, dim=2)
out = self.attn(torch.cat([tq, q], dim=1), torch.cat([tk, k], dim=1), torch.cat([tv, v], dim=1)).flatten(2)
n = text.shape[1]
return text + out[:, :n], x + out[:, n:]
"""
TWO = {"arguments": "text, x", "loop": "text, x = block(text, x)", "inputs": "x, text"}


def test_text_and_image_are_both_divided_and_attention_knows_their_order():
    found = plan(JOINT, **TWO)
    assert [s.name for s in found.streams] == ["text", "x"]
    assert [u.key for u in found.attention] == [("text", "x")]


def test_streams_that_come_apart_at_another_place_are_not_divided():
    assert "not the length of a stream" in reason(JOINT.replace("text.shape[1]", "77"), **TWO)


def test_text_that_blocks_only_attend_to_stays_whole():
    block = "q = self.qkv(x).unflatten(-1, (2, -1))\nk = self.kv(temb).unflatten(-1, (2, -1))\n"
    found = reason(block + "return x + self.attn(q, k, k).flatten(2)\n")
    assert found == "no attention goes over the tokens"


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("x = self.conv(x.transpose(1, 2)).transpose(1, 2)\n", "Conv1d"),
        ("x = x - x.mean(dim=1, keepdim=True)\n", "a reduction"),
        ("x = x.softmax(dim=1)\n", "a reduction"),
        ("x = x.reshape(x.shape[0], 4, 4, -1)\n", "reshaped"),
        ("x = x.unflatten(1, (4, -1))\n", "rows, columns or frames"),
        ("x = x + torch.arange(x.shape[1])[None, :, None]\n", "positions"),
        ("x = x[:, :4]\n", "not the length of a stream"),
        ("x = x[:, [0, 1]]\n", "single tokens"),
        ("x = torch.cumsum(x, dim=1)\n", "over the token axis"),
        ("x = torch.einsum('bsc,btc->bst', x, x)\n", "einsum"),
        ("x = x @ x.transpose(1, 2) @ x\n", "outside the attention layer"),
        ("x = torch.cat([temb, x], dim=1)[:, 4:]\n", "not the length of a stream"),
    ],
)
def test_what_mixes_tokens_is_refused(step, why):
    assert why in reason(step + SELF)


def test_a_reason_shows_the_source_as_it_is_written():
    said = reason("x = torch.nn.functional.pad(x, (0, 0, 0, 1))\n" + SELF)
    assert "torch.nn.functional.pad(x" in said and DOT not in said


def test_tokens_are_followed_through_a_dictionary_of_arguments():
    block = "more = {'hidden': x}\nx = self.norm(more['hidden'])\n" + SELF
    assert [u.key for u in plan(block).attention] == [("x",)]
    assert "self.inner is given tokens" in reason("more = {'x': x}\nreturn self.inner(**more)\n")


def test_an_argument_that_may_come_from_an_unknown_dictionary_is_not_taken_for_its_default():
    block = "if scale is not None:\n    x = x * torch.arange(x.shape[1], scale)\n" + SELF
    found = reason(block, arguments="x, scale=None", loop="x = block(x, **more)", inputs="x, more")
    assert "positions are counted" in found


def test_blocks_without_attention_over_the_tokens_have_no_plan():
    assert reason("return x + self.norm(x)\n") == "no attention goes over the tokens"


def test_an_optional_residual_is_refused_rather_than_the_plan():
    loop = "x = block(x, temb)\n    if controlnet_samples is not None:\n        x[:, temb.shape[1]:] = x[:, temb.shape[1]:] + 1"
    assert plan(SELF, inputs="x, temb, controlnet_samples=None", loop=loop).refused == ("controlnet_samples",)


@pytest.mark.parametrize(
    "strange",
    [
        "for i in enumerate():\n    pass\n",
        "for i in zip():\n    pass\n",
        "for i in reversed():\n    pass\n",
        "y = [i for i in range()]\n",
    ],
)
def test_a_call_without_its_arguments_is_no_reason_to_fall_over(strange):
    assert plan(strange + SELF).streams
