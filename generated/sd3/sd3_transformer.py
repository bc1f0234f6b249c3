# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.SD3Transformer2DModel (models/transformers/transformer_sd3.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cache_dit import ForwardPattern
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, FP32LayerNorm, LpNorm, RMSNorm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.cache.cachedit.config import CacheDiTAdapterConfig
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sequence_parallel_world_size
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.distributed.sp_sharding import sp_gather
from vllm_omni.diffusion.forward_context import get_sp_shard_original_seq_len


def refuse_cache_dit(denoiser: nn.Module, value: object) -> None:
    """Cache-DiT runs a list of blocks as one, without what is done between them where `value` is given."""
    if value is not None and hasattr(denoiser, "_context_manager"):
        raise NotImplementedError("Cache-DiT is on, and something is added between the blocks that it runs as one.")


@functools.lru_cache(maxsize=32)
def sequence_order(lengths: tuple[int, ...], world_size: int, device: torch.device) -> torch.Tensor:
    """Positions of the streams' tokens in the order in which the ranks hold them; -1 for padding."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    shares = [-(-length // world_size) for length in lengths]
    order = [
        start + i if i < length else -1
        for rank in range(world_size)
        for start, length, share in zip(starts, lengths, shares)
        for i in range(rank * share, (rank + 1) * share)
    ]
    return torch.tensor(order, device=device)


def sequence_metadata(query: torch.Tensor, mask: torch.Tensor | None, *streams: str) -> AttentionMetadata | None:
    """Metadata of attention over the tokens of `streams`, one after the other.

    Where ranks share the tokens, attention sees those of rank 0 of every stream, then those of rank 1, and so on. `mask`
    ([B, keys], or [B, heads, queries, keys] with 1 for what is the same) follows them, and nothing attends to padding. It is
    of all tokens, or of this rank's keys alone.
    """
    lengths = tuple(get_sp_shard_original_seq_len(stream) for stream in streams)
    if None not in lengths:
        world_size = get_sequence_parallel_world_size()
        if mask is not None or any(length % world_size for length in lengths):
            order = sequence_order(lengths, world_size, query.device)
            padding = order < 0
            if mask is None:
                mask = ~padding.expand(query.shape[0], -1)
            elif mask.shape[-1] != sum(lengths):
                mask = sp_gather(mask.to(torch.uint8), dim=-1).bool() & ~padding
            else:
                queries = mask.shape[-2] == sum(lengths) and mask.ndim > 2
                mask = mask[..., order.clamp(min=0)]
                mask = mask.masked_fill(padding, False if mask.dtype == torch.bool else float("-inf"))
                mask = mask[..., order.clamp(min=0), :] if queries else mask
                if mask.ndim == 4 and mask.shape[1] > 1:  # attention has this rank's heads
                    mask = mask.chunk(world_size, dim=1)[get_sequence_parallel_rank()]
    return AttentionMetadata(attn_mask=mask) if mask is not None else None


class SD35AdaLayerNormZeroX(nn.Module):
    """`SD35AdaLayerNormZeroX` of Diffusers as this model uses it."""

    def __init__(self, embedding_dim: int, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()

        self.silu = nn.SiLU()
        self.linear = ColumnParallelLinear(
            embedding_dim,
            9 * embedding_dim,
            gather_output=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear",
        )
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(
        self,
        hidden_states: torch.Tensor,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        emb = self.linear(self.silu(emb))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, shift_msa2, scale_msa2, gate_msa2 = emb.chunk(
            9, dim=1
        )
        norm_hidden_states = self.norm(hidden_states)
        hidden_states = norm_hidden_states * (1 + scale_msa[:, None]) + shift_msa[:, None]
        norm_hidden_states2 = norm_hidden_states * (1 + scale_msa2[:, None]) + shift_msa2[:, None]
        return hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp, norm_hidden_states2, gate_msa2


class SD3AdaLayerNormZero(nn.Module):
    """`AdaLayerNormZero` of Diffusers as this model uses it."""

    def __init__(self, embedding_dim: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()

        self.silu = nn.SiLU()
        self.linear = ColumnParallelLinear(
            embedding_dim,
            6 * embedding_dim,
            gather_output=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear",
        )
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        emb = self.linear(self.silu(emb))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class SD3JointAttention(nn.Module):
    """`Attention` of Diffusers as this model uses it, with `JointAttnProcessor2_0`."""

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        qk_norm: str | None = None,
        added_kv_proj_dim: int | None = None,
        out_dim: int = None,
        context_pre_only=None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.context_pre_only = context_pre_only

        self.heads = out_dim // dim_head

        if qk_norm is None:
            self.norm_q = None
            self.norm_k = None
        elif qk_norm == "layer_norm":
            self.norm_q = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
            self.norm_k = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
        elif qk_norm == "fp32_layer_norm":
            self.norm_q = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
            self.norm_k = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
        elif qk_norm == "layer_norm_across_heads":
            # Lumina applies qk norm across all heads
            self.norm_q = nn.LayerNorm(dim_head * heads, eps=1e-6)
            self.norm_k = nn.LayerNorm(dim_head * None, eps=1e-6)
        elif qk_norm == "rms_norm":
            self.norm_q = RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
            self.norm_k = RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        elif qk_norm == "rms_norm_across_heads":
            # LTX applies qk norm across all heads
            self.norm_q = RMSNorm(dim_head * heads, eps=1e-6)
            self.norm_k = RMSNorm(dim_head * None, eps=1e-6)
        elif qk_norm == "l2":
            self.norm_q = LpNorm(p=2, dim=-1, eps=1e-6)
            self.norm_k = LpNorm(p=2, dim=-1, eps=1e-6)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
            )

        self.to_qkv = QKVParallelLinear(
            query_dim,
            dim_head,
            self.heads,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )
        self.add_qkv_proj = QKVParallelLinear(
            added_kv_proj_dim,
            dim_head,
            self.heads,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.add_qkv_proj",
        )

        self.to_out = nn.ModuleList([])
        self.to_out.append(
            RowParallelLinear(
                out_dim,
                out_dim,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.to_out.0",
            )
        )

        if not context_pre_only:
            self.to_add_out = RowParallelLinear(
                out_dim,
                query_dim,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.to_add_out",
            )
        else:
            self.to_add_out = None

        if qk_norm is not None and added_kv_proj_dim is not None:
            if qk_norm == "layer_norm":
                self.norm_added_q = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
                self.norm_added_k = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
            elif qk_norm == "fp32_layer_norm":
                self.norm_added_q = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
                self.norm_added_k = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
            elif qk_norm == "rms_norm":
                self.norm_added_q = RMSNorm(dim_head, eps=1e-6)
                self.norm_added_k = RMSNorm(dim_head, eps=1e-6)
            elif qk_norm == "rms_norm_across_heads":
                # Wan applies qk norm across all heads
                # Wan also doesn't apply a q norm
                self.norm_added_q = None
                self.norm_added_k = RMSNorm(dim_head * None, eps=1e-6)
            else:
                raise ValueError(
                    f"unknown qk_norm: {qk_norm}. Should be one of `None,'layer_norm','fp32_layer_norm','rms_norm'`"
                )
        else:
            self.norm_added_q = None
            self.norm_added_k = None
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=dim_head**-0.5,
            causal=False,
            role="self",
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, hidden_states: torch.FloatTensor, encoder_hidden_states: torch.FloatTensor = None
    ) -> torch.FloatTensor:
        residual = hidden_states

        batch_size = hidden_states.shape[0]

        # `sample` projections.
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        inner_dim = key.shape[-1]
        head_dim = inner_dim // self.heads

        query = query.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        key = key.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        value = value.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)

        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)

        # `context` projections.
        encoder_hidden_states_query_proj, encoder_hidden_states_key_proj, encoder_hidden_states_value_proj = (
            self.add_qkv_proj(encoder_hidden_states).chunk(3, dim=-1)
        )

        encoder_hidden_states_query_proj = encoder_hidden_states_query_proj.view(
            batch_size, -1, self.heads, head_dim
        ).transpose(1, 2)
        encoder_hidden_states_key_proj = encoder_hidden_states_key_proj.view(
            batch_size, -1, self.heads, head_dim
        ).transpose(1, 2)
        encoder_hidden_states_value_proj = encoder_hidden_states_value_proj.view(
            batch_size, -1, self.heads, head_dim
        ).transpose(1, 2)

        if self.norm_added_q is not None:
            encoder_hidden_states_query_proj = self.norm_added_q(encoder_hidden_states_query_proj)
        if self.norm_added_k is not None:
            encoder_hidden_states_key_proj = self.norm_added_k(encoder_hidden_states_key_proj)

        query = torch.cat([query, encoder_hidden_states_query_proj], dim=2)
        key = torch.cat([key, encoder_hidden_states_key_proj], dim=2)
        value = torch.cat([value, encoder_hidden_states_value_proj], dim=2)

        hidden_states = self.attn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_metadata=sequence_metadata(query.transpose(1, 2), None, "hidden_states", "encoder_hidden_states"),
        ).transpose(1, 2)
        hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, self.heads * head_dim)
        hidden_states = hidden_states.to(query.dtype)

        # Split the attention outputs.
        hidden_states, encoder_hidden_states = (
            hidden_states[:, : residual.shape[1]],
            hidden_states[:, residual.shape[1] :],
        )
        if not self.context_pre_only:
            encoder_hidden_states = self.to_add_out(encoder_hidden_states)

        # linear proj
        hidden_states = self.to_out[0](hidden_states)

        return hidden_states, encoder_hidden_states


class SD3SelfAttention(nn.Module):
    """`Attention` of Diffusers as this model uses it, with `JointAttnProcessor2_0`."""

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        qk_norm: str | None = None,
        out_dim: int = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.context_pre_only = None

        self.heads = out_dim // dim_head

        if qk_norm is None:
            self.norm_q = None
            self.norm_k = None
        elif qk_norm == "layer_norm":
            self.norm_q = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
            self.norm_k = nn.LayerNorm(dim_head, eps=1e-6, elementwise_affine=True)
        elif qk_norm == "fp32_layer_norm":
            self.norm_q = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
            self.norm_k = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-6)
        elif qk_norm == "layer_norm_across_heads":
            # Lumina applies qk norm across all heads
            self.norm_q = nn.LayerNorm(dim_head * heads, eps=1e-6)
            self.norm_k = nn.LayerNorm(dim_head * None, eps=1e-6)
        elif qk_norm == "rms_norm":
            self.norm_q = RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
            self.norm_k = RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        elif qk_norm == "rms_norm_across_heads":
            # LTX applies qk norm across all heads
            self.norm_q = RMSNorm(dim_head * heads, eps=1e-6)
            self.norm_k = RMSNorm(dim_head * None, eps=1e-6)
        elif qk_norm == "l2":
            self.norm_q = LpNorm(p=2, dim=-1, eps=1e-6)
            self.norm_k = LpNorm(p=2, dim=-1, eps=1e-6)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
            )

        self.to_qkv = QKVParallelLinear(
            query_dim,
            dim_head,
            self.heads,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )
        self.add_q_proj = None
        self.add_k_proj = None
        self.add_v_proj = None

        self.to_out = nn.ModuleList([])
        self.to_out.append(
            RowParallelLinear(
                out_dim,
                out_dim,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.to_out.0",
            )
        )

        self.to_add_out = None

        self.norm_added_q = None
        self.norm_added_k = None
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=dim_head**-0.5,
            causal=False,
            role="self",
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.FloatTensor) -> torch.FloatTensor:

        batch_size = hidden_states.shape[0]

        # `sample` projections.
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        inner_dim = key.shape[-1]
        head_dim = inner_dim // self.heads

        query = query.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        key = key.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        value = value.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)

        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)

        hidden_states = self.attn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_metadata=sequence_metadata(query.transpose(1, 2), None, "hidden_states"),
        ).transpose(1, 2)
        hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, self.heads * head_dim)
        hidden_states = hidden_states.to(query.dtype)

        # linear proj
        hidden_states = self.to_out[0](hidden_states)

        return hidden_states


class SD3GELU(nn.Module):
    """`GELU` of Diffusers as this model uses it."""

    def __init__(self, dim_in: int, dim_out: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.proj = ColumnParallelLinear(
            dim_in,
            dim_out,
            gather_output=False,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.proj",
        )

    def forward(self, hidden_states):
        hidden_states = self.proj(hidden_states)
        hidden_states = F.gelu(hidden_states, approximate="tanh")
        return hidden_states


class SD3FeedForward(nn.Module):
    """`FeedForward` of Diffusers as this model uses it."""

    def __init__(
        self, dim: int, dim_out: int | None = None, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        inner_dim = int(dim * 4)
        act_fn = SD3GELU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")

        self.net = nn.ModuleList([])
        # project in
        self.net.append(act_fn)
        # project dropout
        self.net.append(nn.Identity())
        # project out
        self.net.append(
            RowParallelLinear(
                inner_dim,
                dim_out,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.net.2",
            )
        )

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class SD3JointTransformerBlock(nn.Module):
    """`JointTransformerBlock` of Diffusers as this model uses it."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        context_pre_only: bool = False,
        qk_norm: str | None = None,
        use_dual_attention: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.use_dual_attention = use_dual_attention
        self.context_pre_only = context_pre_only
        context_norm_type = "ada_norm_continous" if context_pre_only else "ada_norm_zero"

        if use_dual_attention:
            self.norm1 = SD35AdaLayerNormZeroX(dim, quant_config=quant_config, prefix=f"{prefix}.norm1")
        else:
            self.norm1 = SD3AdaLayerNormZero(dim, quant_config=quant_config, prefix=f"{prefix}.norm1")

        if context_norm_type == "ada_norm_continous":
            self.norm1_context = AdaLayerNormContinuous(
                dim, dim, elementwise_affine=False, eps=1e-6, bias=True, norm_type="layer_norm"
            )
        elif context_norm_type == "ada_norm_zero":
            self.norm1_context = SD3AdaLayerNormZero(dim, quant_config=quant_config, prefix=f"{prefix}.norm1_context")
        else:
            raise ValueError(
                f"Unknown context_norm_type: {context_norm_type}, currently only support `ada_norm_continous`, `ada_norm_zero`"
            )

        self.attn = SD3JointAttention(
            query_dim=dim,
            added_kv_proj_dim=dim,
            dim_head=attention_head_dim,
            heads=num_attention_heads,
            out_dim=dim,
            context_pre_only=context_pre_only,
            qk_norm=qk_norm,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

        if use_dual_attention:
            self.attn2 = SD3SelfAttention(
                query_dim=dim,
                dim_head=attention_head_dim,
                heads=num_attention_heads,
                out_dim=dim,
                qk_norm=qk_norm,
                quant_config=quant_config,
                prefix=f"{prefix}.attn2",
            )
        else:
            self.attn2 = None

        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = SD3FeedForward(dim=dim, dim_out=dim, quant_config=quant_config, prefix=f"{prefix}.ff")

        if not context_pre_only:
            self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.ff_context = SD3FeedForward(
                dim=dim, dim_out=dim, quant_config=quant_config, prefix=f"{prefix}.ff_context"
            )
        else:
            self.norm2_context = None
            self.ff_context = None

    def forward(
        self,
        hidden_states: torch.FloatTensor,
        encoder_hidden_states: torch.FloatTensor,
        temb: torch.FloatTensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.use_dual_attention:
            norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp, norm_hidden_states2, gate_msa2 = self.norm1(
                hidden_states, emb=temb
            )
        else:
            norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)

        if self.context_pre_only:
            norm_encoder_hidden_states = self.norm1_context(encoder_hidden_states, temb)
        else:
            norm_encoder_hidden_states, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(
                encoder_hidden_states, emb=temb
            )

        # Attention.
        attn_output, context_attn_output = self.attn(
            hidden_states=norm_hidden_states, encoder_hidden_states=norm_encoder_hidden_states
        )

        # Process attention outputs for the `hidden_states`.
        attn_output = gate_msa.unsqueeze(1) * attn_output
        hidden_states = hidden_states + attn_output

        if self.use_dual_attention:
            attn_output2 = self.attn2(hidden_states=norm_hidden_states2)
            attn_output2 = gate_msa2.unsqueeze(1) * attn_output2
            hidden_states = hidden_states + attn_output2

        norm_hidden_states = self.norm2(hidden_states)
        norm_hidden_states = norm_hidden_states * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        ff_output = self.ff(norm_hidden_states)
        ff_output = gate_mlp.unsqueeze(1) * ff_output

        hidden_states = hidden_states + ff_output

        # Process attention outputs for the `encoder_hidden_states`.
        if self.context_pre_only:
            encoder_hidden_states = None
        else:
            context_attn_output = c_gate_msa.unsqueeze(1) * context_attn_output
            encoder_hidden_states = encoder_hidden_states + context_attn_output

            norm_encoder_hidden_states = self.norm2_context(encoder_hidden_states)
            norm_encoder_hidden_states = norm_encoder_hidden_states * (1 + c_scale_mlp[:, None]) + c_shift_mlp[:, None]
            context_ff_output = self.ff_context(norm_encoder_hidden_states)
            encoder_hidden_states = encoder_hidden_states + c_gate_mlp.unsqueeze(1) * context_ff_output

        return encoder_hidden_states, hidden_states


class SD3Transformer2DModel(nn.Module):
    """
    The Transformer model introduced in [Stable Diffusion 3](https://huggingface.co/papers/2403.03206).

    Parameters:
        sample_size (`int`, defaults to `128`):
            The width/height of the latents. This is fixed during training since it is used to learn a number of
            position embeddings.
        patch_size (`int`, defaults to `2`):
            Patch size to turn the input data into small patches.
        in_channels (`int`, defaults to `16`):
            The number of latent channels in the input.
        num_layers (`int`, defaults to `18`):
            The number of layers of transformer blocks to use.
        attention_head_dim (`int`, defaults to `64`):
            The number of channels in each head.
        num_attention_heads (`int`, defaults to `18`):
            The number of heads to use for multi-head attention.
        joint_attention_dim (`int`, defaults to `4096`):
            The embedding dimension to use for joint text-image attention.
        caption_projection_dim (`int`, defaults to `1152`):
            The embedding dimension of caption embeddings.
        pooled_projection_dim (`int`, defaults to `2048`):
            The embedding dimension of pooled text projections.
        out_channels (`int`, defaults to `16`):
            The number of latent channels in the output.
        pos_embed_max_size (`int`, defaults to `96`):
            The maximum latent height/width of positional embeddings.
        dual_attention_layers (`tuple[int, ...]`, defaults to `()`):
            The number of dual-stream transformer blocks to use.
        qk_norm (`str`, *optional*, defaults to `None`):
            The normalization to use for query and key in the attention layer. If `None`, no normalization is used.
    """

    _repeated_blocks = ["SD3JointTransformerBlock"]
    _layerwise_offload_blocks_attrs = ["transformer_blocks"]
    _hsdp_shard_conditions = [
        lambda name, module: name.startswith(("transformer_blocks.",)) and name.rpartition(".")[2].isdigit()
    ]
    _cache_dit_adapter_config = CacheDiTAdapterConfig(
        block_forward_patterns={"transformer_blocks": ForwardPattern.Pattern_1}
    )
    stacked_params_mapping = [
        (".to_qkv", ".to_q", "q"),
        (".to_qkv", ".to_k", "k"),
        (".to_qkv", ".to_v", "v"),
        (".add_qkv_proj", ".add_q_proj", "q"),
        (".add_qkv_proj", ".add_k_proj", "k"),
        (".add_qkv_proj", ".add_v_proj", "v"),
    ]
    packed_modules_mapping = {
        "to_qkv": ["to_q", "to_k", "to_v"],
        "add_qkv_proj": ["add_q_proj", "add_k_proj", "add_v_proj"],
    }
    _sp_plan = {
        "shard_encoder_hidden_states": {
            "input": SequenceParallelInput(
                split_dim=1, expected_dims=3, auto_pad=True, shard_group="encoder_hidden_states"
            )
        },
        "shard_hidden_states": {
            0: SequenceParallelInput(
                split_dim=1, expected_dims=3, split_output=True, auto_pad=True, shard_group="hidden_states"
            )
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, shard_group="hidden_states"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self.out_channels = out_channels if out_channels is not None else in_channels
        self.inner_dim = num_attention_heads * attention_head_dim

        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=self.inner_dim,
            pos_embed_max_size=pos_embed_max_size,  # hard-code for now.
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            embedding_dim=self.inner_dim, pooled_projection_dim=pooled_projection_dim
        )
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)

        self.transformer_blocks = nn.ModuleList(
            [
                SD3JointTransformerBlock(
                    dim=self.inner_dim,
                    num_attention_heads=num_attention_heads,
                    attention_head_dim=attention_head_dim,
                    context_pre_only=i == num_layers - 1,
                    qk_norm=qk_norm,
                    use_dual_attention=True if i in dual_attention_layers else False,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"transformer_blocks.{i}"),
                )
                for i in range(num_layers)
            ]
        )

        self.norm_out = AdaLayerNormContinuous(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels, bias=True)
        self.shard_encoder_hidden_states = nn.Identity()
        self.shard_hidden_states = nn.Identity()
        # Buffers of a checkpoint have the model's dtype, however they were computed.
        names = self.state_dict().keys()
        for name, buffer in self.named_buffers():
            if name in names and buffer.is_floating_point():
                buffer.data = buffer.data.to(torch.get_default_dtype())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor = None,
        pooled_projections: torch.Tensor = None,
        timestep: torch.LongTensor = None,
        block_controlnet_hidden_states: list = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> torch.Tensor | Transformer2DModelOutput:
        """
        The [`SD3Transformer2DModel`] forward method.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch size, channel, height, width)`):
                Input `hidden_states`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch size, sequence_len, embed_dims)`):
                Conditional embeddings (embeddings computed from the input conditions such as prompts) to use.
            pooled_projections (`torch.Tensor` of shape `(batch_size, projection_dim)`):
                Embeddings projected from the embeddings of input conditions.
            timestep (`torch.LongTensor`):
                Used to indicate denoising step.
            block_controlnet_hidden_states (`list` of `torch.Tensor`):
                A list of tensors that if specified are added to the residuals of transformer blocks.
            joint_attention_kwargs (`dict`, *optional*):
                A kwargs dictionary that if specified is passed along to the `AttentionProcessor` as defined under
                `self.processor` in
                [diffusers.models.attention_processor](https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_processor.py).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.
            skip_layers (`list` of `int`, *optional*):
                A list of layer indices to skip during the forward pass.

        Returns:
            If `return_dict` is True, an [`~models.transformer_2d.Transformer2DModelOutput`] is returned, otherwise a
            `tuple` where the first element is the sample tensor.
        """
        if joint_attention_kwargs:
            raise NotImplementedError(
                "`joint_attention_kwargs` has no counterpart in the engine; LoRA scales are set per request"
            )

        height, width = hidden_states.shape[-2:]

        hidden_states = self.pos_embed(hidden_states)  # takes care of adding positional embeddings too.
        # pos_embed output is non-contiguous due to flatten+transpose in PatchEmbed (BCHW -> BNC).
        hidden_states = hidden_states.contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        refuse_cache_dit(self, block_controlnet_hidden_states)
        refuse_cache_dit(self, skip_layers)
        encoder_hidden_states = self.shard_encoder_hidden_states(encoder_hidden_states)
        hidden_states = self.shard_hidden_states(hidden_states)

        for index_block, block in enumerate(self.transformer_blocks):
            # Skip specified layers
            is_skip = True if skip_layers is not None and index_block in skip_layers else False

            if not is_skip:
                encoder_hidden_states, hidden_states = block(
                    hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb
                )

            # controlnet residual
            if block_controlnet_hidden_states is not None and block.context_pre_only is False:
                interval_control = len(self.transformer_blocks) / len(block_controlnet_hidden_states)
                hidden_states = hidden_states + block_controlnet_hidden_states[int(index_block / interval_control)]

        hidden_states = self.norm_out(hidden_states, temb)
        hidden_states = self.proj_out(hidden_states)

        # unpatchify
        patch_size = self.config.patch_size
        height = height // patch_size
        width = width // patch_size

        hidden_states = hidden_states.reshape(
            shape=(hidden_states.shape[0], height, width, patch_size, patch_size, self.out_channels)
        )
        hidden_states = torch.einsum("nhwpqc->nchpwq", hidden_states)
        output = hidden_states.reshape(
            shape=(hidden_states.shape[0], self.out_channels, height * patch_size, width * patch_size)
        )

        if not return_dict:
            return (output,)

        return Transformer2DModelOutput(sample=output)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a Diffusers state dict. Raises ValueError for a name this model does not have, and for a merged projection
        of which a part is missing."""
        params = dict(self.named_parameters())
        params.update(self.named_buffers())
        loaded: set[str] = set()
        missing: dict[str, set[str]] = {}
        for name, weight in weights:
            module, _, kind = name.rpartition(".")
            for merged, source, shard_id in self.stacked_params_mapping:
                target = f"{module.removesuffix(source)}{merged}.{kind}"
                if module.endswith(source) and target in params:
                    param = params[target]
                    param.weight_loader(param, weight, shard_id)
                    parts = {s for m, s, _ in self.stacked_params_mapping if m == merged}
                    missing.setdefault(target, parts).discard(source)
                    loaded.add(target)
                    break
            else:
                if name not in params:
                    raise ValueError(f"{type(self).__name__} has no parameter for the weight {name}")
                param = params[name]
                getattr(param, "weight_loader", default_weight_loader)(param, weight)
                loaded.add(name)
        incomplete = {name: sorted(parts) for name, parts in missing.items() if parts}
        if incomplete:
            raise ValueError(f"{type(self).__name__}: parts of merged projections are missing: {incomplete}")
        self.requires_grad_(False)  # with gradients in view, torch copies a transposed input before a linear layer
        return loaded

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
