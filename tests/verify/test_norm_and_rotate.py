"""The printed helper that norms and turns queries and keys gives what Diffusers gives, by the kernel and without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from porter.emit.templates import render
from porter.verify.environment import check_environment

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
from porter.verify.platform.bootstrap import activate
activate()
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
{helper}
torch.manual_seed(0)
batch, tokens, heads, size = 2, 7, 3, 8
qkv = torch.randn(batch, tokens, 3 * heads * size)
query, key, _ = (x.unflatten(-1, (heads, size)) for x in qkv.chunk(3, dim=-1))  # as a merged projection leaves them
norm_q, norm_k = torch.nn.RMSNorm(size, eps=1e-3), torch.nn.RMSNorm(size, eps=1e-3)
for norm in (norm_q, norm_k):
    torch.nn.init.normal_(norm.weight)
real = get_1d_rotary_pos_embed(size, torch.arange(tokens).float() * 0.7, use_real=True)
turned = get_1d_rotary_pos_embed(size, torch.arange(tokens).float() * 0.7, use_real=False)
expected = [apply_rotary_emb(norm(x), real, sequence_dim=1) for norm, x in ((norm_q, query), (norm_k, key))]
assert all((e - x).abs().max() > 0.1 for e, x in zip(expected, (query, key)))
for cos, sin in ((real[0][:, ::2], real[1][:, ::2]), (turned.real, turned.imag), (turned.real[None], turned.imag[None])):
    for one, two in zip(norm_and_rotate(query, key, norm_q, norm_k, cos, sin), expected):
        assert one.shape == two.shape and (one - two).abs().max() < 2e-6, (one - two).abs().max()
print("equal", fused_qk_norm_rope_min_tokens(2048))
"""


@pytest.mark.skipif(bool(check_environment()), reason="the engine is not installed")
@pytest.mark.parametrize("threshold", ["", "0"], ids=["few tokens", "the kernel's way"])
def test_normed_and_turned_as_in_diffusers(threshold: str) -> None:
    program = PROGRAM.format(helper=render("transformer/norm_and_rotate.py.jinja"))
    environment = {**os.environ, "VLLM_OMNI_FUSED_QK_NORM_ROPE_MIN_TOKENS": threshold}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"equal {threshold or 2048}"
