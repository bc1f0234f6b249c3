"""FlashAttention sees the valid keys of every sample and no others; nothing of it depends on their number.

Run by `test_masked_flash_attention.py` in a process with the engine's environment.
"""

import pytest
import torch
from vllm_omni.diffusion.attention.backends import abstract
from vllm_omni.diffusion.attention.backends.utils import fa

from porter.emit.templates import render

HEADS, SIZE, SCALE = 2, 8, 0.3
MASKS = {
    "padding on the right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "padding on the left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "gaps": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
    "nothing": [[1, 1, 1, 1, 1]] * 3,
}


@torch.library.custom_op("porter_tests::varlen", mutates_args=())
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_q: torch.Tensor, of_k: torch.Tensor) -> torch.Tensor:
    """Attention over packed samples, one by one."""
    out = torch.zeros_like(q)
    for i in range(len(of_q) - 1):
        rows, keys = slice(*of_q[i : i + 2].tolist()), slice(*of_k[i : i + 2].tolist())
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * SCALE
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])
    return out


@varlen.register_fake
def _(q, k, v, of_q, of_k):
    return torch.empty_like(q)


@pytest.fixture
def attention(monkeypatch):
    """The layer's FlashAttention, with a kernel that any device has."""

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
        assert (causal, softmax_scale) == (False, SCALE)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k)

    monkeypatch.setattr(fa, "flash_attn_varlen_func", kernel)
    names = {}
    exec(render("transformer/masked_flash_attention.py.jinja"), names)
    return names["MaskedFlashAttention"](HEADS, SIZE, SCALE)


def given(queries):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, n, HEADS, SIZE, generator=draw) for n in (queries, 5, 5)]


@pytest.mark.parametrize("queries", [5, 3])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_query_attends_to_the_valid_keys_of_its_sample(attention, mask, queries):
    query, key, value = given(queries)
    mask = torch.tensor(mask, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask[:, None, None], scale=SCALE
    ).transpose(1, 2)
    torch.testing.assert_close(
        attention.forward_cuda(query, key, value, abstract.AttentionMetadata(attn_mask=mask)), expected
    )


def test_one_graph_holds_it_whatever_the_mask(attention):
    compiled = torch.compile(
        lambda q, k, v, m: attention.forward_cuda(q, k, v, abstract.AttentionMetadata(attn_mask=m)),
        backend="eager", fullgraph=True,
    )  # fmt: skip
    query, key, value = given(5)
    for mask in MASKS.values():
        mask = torch.tensor(mask, dtype=torch.bool)
        expected = attention.forward_cuda(query, key, value, abstract.AttentionMetadata(attn_mask=mask))
        torch.testing.assert_close(compiled(query, key, value, mask), expected)
