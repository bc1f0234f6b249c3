# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.LuminaNextDiT2DModel (models/transformers/lumina_nextdit2d.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cache_dit import ForwardPattern
from diffusers.models.embeddings import LuminaCombinedTimestepCaptionEmbedding, LuminaPatchEmbed, apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm, LpNorm, LuminaLayerNormContinuous, RMSNorm
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.cudnn_attn import CuDNNAttentionBackend
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionImpl
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.attention.backends.utils.fa import flash_attn_varlen_func
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.cache.cachedit.config import CacheDiTAdapterConfig
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sequence_parallel_world_size
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.distributed.sp_sharding import sp_gather
from vllm_omni.diffusion.forward_context import get_sp_shard_original_seq_len
from vllm_omni.platforms import current_omni_platform


class MaskedFlashAttention(FlashAttentionImpl):
    """FlashAttention for the masks it can take, bools that are the same for all heads and queries; cuDNN's, or torch's where
    there is none, for the others."""

    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, **kwargs):
        super().__init__(num_heads, head_size, softmax_scale, **kwargs)
        self.is_cross_attn = True  # a query that is padding keeps its row
        cudnn = current_omni_platform.is_cuda() and CuDNNAttentionBackend.supports_head_size(head_size)
        backend = CuDNNAttentionBackend if cudnn else SDPABackend
        self.dense = backend.get_impl_cls()(num_heads, head_size, softmax_scale, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        mask = attn_metadata.attn_mask if attn_metadata is not None else None
        if mask is None:
            return super().forward(query, key, value, attn_metadata)
        if mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
            mask = mask[:, 0, 0]
        if mask.dtype == torch.bool and mask.ndim == 2:
            mask = mask.expand(key.shape[0], -1)
            return super().forward(query, key, value, replace(attn_metadata, attn_mask=mask))
        return self.dense.forward(query, key, value, attn_metadata)

    def forward_cuda(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """The valid keys of all samples come first, padding behind them. To take padding out, the host would have to wait
        for the number of keys in every layer."""
        from vllm_omni.diffusion.attention.backends.utils.fa import flash_attn_varlen_func

        mask = attn_metadata.attn_mask if attn_metadata is not None else None
        if mask is None or flash_attn_varlen_func is None:
            return super().forward_cuda(query, key, value, attn_metadata)
        self._warn_fa_deterministic_non_dense("masked-varlen")
        batch_size, query_length = query.shape[:2]
        index = torch.arange(mask.numel(), device=mask.device)
        count = mask.flatten().cumsum(0)  # of the valid keys up to each
        place = torch.where(mask.flatten(), count - 1, count[-1] + index - count)
        order = torch.empty_like(index).scatter(0, place, index)
        starts = torch.arange(batch_size + 1, dtype=torch.int32, device=mask.device)
        out = flash_attn_varlen_func(
            query.flatten(0, 1),
            key.flatten(0, 1)[order],
            value.flatten(0, 1)[order],
            cu_seqlens_q=starts * query_length,
            cu_seqlens_k=F.pad(count.view(batch_size, -1)[:, -1].int(), (1, 0)),
            max_seqlen_q=query_length,
            max_seqlen_k=key.shape[1],
            causal=self.causal,
            softmax_scale=self.softmax_scale,
        )
        return self._unwrap_flash_output(out).unflatten(0, (batch_size, query_length))


def all_tokens(length: int, *streams: str) -> int:
    """How many tokens `streams` have on all ranks that share them; this rank has `length` of them."""
    lengths = [get_sp_shard_original_seq_len(stream) for stream in streams]
    return length if None in lengths else sum(lengths)


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


class LuminaNextDiT2DSelfAttention(nn.Module):
    """`Attention` of Diffusers as this model uses it, with `LuminaAttnProcessor2_0`."""

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        qk_norm: str | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.inner_dim = dim_head * heads
        self.inner_kv_dim = self.inner_dim if kv_heads is None else dim_head * kv_heads
        self.scale = dim_head**-0.5

        self.heads = heads

        if qk_norm is None:
            self.norm_q = None
            self.norm_k = None
        elif qk_norm == "layer_norm":
            self.norm_q = nn.LayerNorm(dim_head, eps=1e-5, elementwise_affine=True)
            self.norm_k = nn.LayerNorm(dim_head, eps=1e-5, elementwise_affine=True)
        elif qk_norm == "fp32_layer_norm":
            self.norm_q = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-5)
            self.norm_k = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-5)
        elif qk_norm == "layer_norm_across_heads":
            # Lumina applies qk norm across all heads
            self.norm_q = nn.LayerNorm(dim_head * heads, eps=1e-5)
            self.norm_k = nn.LayerNorm(dim_head * kv_heads, eps=1e-5)
        elif qk_norm == "rms_norm":
            self.norm_q = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
            self.norm_k = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
        elif qk_norm == "rms_norm_across_heads":
            # LTX applies qk norm across all heads
            self.norm_q = RMSNorm(dim_head * heads, eps=1e-5)
            self.norm_k = RMSNorm(dim_head * kv_heads, eps=1e-5)
        elif qk_norm == "l2":
            self.norm_q = LpNorm(p=2, dim=-1, eps=1e-5)
            self.norm_k = LpNorm(p=2, dim=-1, eps=1e-5)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
            )

        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=False)

        # only relevant for the `AddedKVProcessor` classes
        self.to_k = nn.Linear(query_dim, self.inner_kv_dim, bias=False)
        self.to_v = nn.Linear(query_dim, self.inner_kv_dim, bias=False)

        self.to_out = nn.ModuleList([])
        self.to_out.append(nn.Linear(self.inner_dim, query_dim, bias=False))
        self.to_out.append(nn.Identity())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=1.0,
            causal=False,
            role="self",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: torch.Tensor | None = None,
        key_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
        **cross_attention_kwargs,
    ) -> torch.Tensor:

        input_ndim = hidden_states.ndim

        if input_ndim == 4:
            batch_size, channel, height, width = hidden_states.shape
            hidden_states = hidden_states.view(batch_size, channel, height * width).transpose(1, 2)

        batch_size, sequence_length, _ = hidden_states.shape

        # Get Query-Key-Value Pair
        query = self.to_q(hidden_states)
        key = self.to_k(encoder_hidden_states)
        value = self.to_v(encoder_hidden_states)

        query_dim = query.shape[-1]
        inner_dim = key.shape[-1]
        head_dim = query_dim // self.heads
        dtype = query.dtype

        # Get key-value heads
        kv_heads = inner_dim // head_dim

        # Apply Query-Key Norm if needed
        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)

        query = query.view(batch_size, -1, self.heads, head_dim)

        key = key.view(batch_size, -1, kv_heads, head_dim)
        value = value.view(batch_size, -1, kv_heads, head_dim)

        # Apply RoPE if needed
        query = apply_rotary_emb(query, query_rotary_emb, use_real=False)
        key = apply_rotary_emb(key, key_rotary_emb, use_real=False)

        query, key = query.to(dtype), key.to(dtype)

        # Apply proportional attention if true
        if base_sequence_length is not None:
            softmax_scale = (
                math.sqrt(math.log(all_tokens(sequence_length, "hidden_states"), base_sequence_length)) * self.scale
            )
        else:
            softmax_scale = self.scale

        # perform Grouped-qurey Attention (GQA)
        n_rep = self.heads // kv_heads
        if n_rep >= 1:
            key = key.unsqueeze(3).repeat(1, 1, 1, n_rep, 1).flatten(2, 3)
            value = value.unsqueeze(3).repeat(1, 1, 1, n_rep, 1).flatten(2, 3)

        # scaled_dot_product_attention expects attention_mask shape to be
        # (batch, heads, source_length, target_length)
        attention_mask = attention_mask.bool()

        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)

        # the output of sdp = (batch, num_heads, seq_len, head_dim)
        # TODO: add support for attn.scale when we move to Torch 2.1
        hidden_states = self.attn(
            (query * softmax_scale).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_metadata=sequence_metadata((query * softmax_scale).transpose(1, 2), attention_mask, "hidden_states"),
        ).transpose(1, 2)
        hidden_states = hidden_states.transpose(1, 2).to(dtype)

        return hidden_states


class LuminaNextDiT2DCrossAttention(nn.Module):
    """`Attention` of Diffusers as this model uses it, with `LuminaAttnProcessor2_0`."""

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        qk_norm: str | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.inner_dim = dim_head * heads
        self.inner_kv_dim = self.inner_dim if kv_heads is None else dim_head * kv_heads
        self.cross_attention_dim = cross_attention_dim if cross_attention_dim is not None else query_dim
        self.scale = dim_head**-0.5

        self.heads = heads

        if qk_norm is None:
            self.norm_q = None
            self.norm_k = None
        elif qk_norm == "layer_norm":
            self.norm_q = nn.LayerNorm(dim_head, eps=1e-5, elementwise_affine=True)
            self.norm_k = nn.LayerNorm(dim_head, eps=1e-5, elementwise_affine=True)
        elif qk_norm == "fp32_layer_norm":
            self.norm_q = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-5)
            self.norm_k = FP32LayerNorm(dim_head, elementwise_affine=False, bias=False, eps=1e-5)
        elif qk_norm == "layer_norm_across_heads":
            # Lumina applies qk norm across all heads
            self.norm_q = nn.LayerNorm(dim_head * heads, eps=1e-5)
            self.norm_k = nn.LayerNorm(dim_head * kv_heads, eps=1e-5)
        elif qk_norm == "rms_norm":
            self.norm_q = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
            self.norm_k = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
        elif qk_norm == "rms_norm_across_heads":
            # LTX applies qk norm across all heads
            self.norm_q = RMSNorm(dim_head * heads, eps=1e-5)
            self.norm_k = RMSNorm(dim_head * kv_heads, eps=1e-5)
        elif qk_norm == "l2":
            self.norm_q = LpNorm(p=2, dim=-1, eps=1e-5)
            self.norm_k = LpNorm(p=2, dim=-1, eps=1e-5)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
            )

        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=False)

        # only relevant for the `AddedKVProcessor` classes
        self.to_k = nn.Linear(self.cross_attention_dim, self.inner_kv_dim, bias=False)
        self.to_v = nn.Linear(self.cross_attention_dim, self.inner_kv_dim, bias=False)

        self.to_out = nn.ModuleList([])
        self.to_out.append(nn.Linear(self.inner_dim, query_dim, bias=False))
        self.to_out.append(nn.Identity())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=dim_head**-0.5,
            causal=False,
            role="cross",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            skip_sequence_parallel=True,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: torch.Tensor | None = None,
        key_rotary_emb: torch.Tensor | None = None,
        base_sequence_length: int | None = None,
        **cross_attention_kwargs,
    ) -> torch.Tensor:

        input_ndim = hidden_states.ndim

        if input_ndim == 4:
            batch_size, channel, height, width = hidden_states.shape
            hidden_states = hidden_states.view(batch_size, channel, height * width).transpose(1, 2)

        batch_size, sequence_length, _ = hidden_states.shape

        # Get Query-Key-Value Pair
        query = self.to_q(hidden_states)
        key = self.to_k(encoder_hidden_states)
        value = self.to_v(encoder_hidden_states)

        query_dim = query.shape[-1]
        inner_dim = key.shape[-1]
        head_dim = query_dim // self.heads
        dtype = query.dtype

        # Get key-value heads
        kv_heads = inner_dim // head_dim

        # Apply Query-Key Norm if needed
        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)

        query = query.view(batch_size, -1, self.heads, head_dim)

        key = key.view(batch_size, -1, kv_heads, head_dim)
        value = value.view(batch_size, -1, kv_heads, head_dim)

        # Apply RoPE if needed
        query = apply_rotary_emb(query, query_rotary_emb, use_real=False)

        query, key = query.to(dtype), key.to(dtype)

        # perform Grouped-qurey Attention (GQA)
        n_rep = self.heads // kv_heads
        if n_rep >= 1:
            key = key.unsqueeze(3).repeat(1, 1, 1, n_rep, 1).flatten(2, 3)
            value = value.unsqueeze(3).repeat(1, 1, 1, n_rep, 1).flatten(2, 3)

        # scaled_dot_product_attention expects attention_mask shape to be
        # (batch, heads, source_length, target_length)
        attention_mask = attention_mask.bool()

        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)

        # the output of sdp = (batch, num_heads, seq_len, head_dim)
        # TODO: add support for attn.scale when we move to Torch 2.1
        hidden_states = self.attn(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_metadata=AttentionMetadata(attn_mask=attention_mask) if attention_mask is not None else None,
        ).transpose(1, 2)
        hidden_states = hidden_states.transpose(1, 2).to(dtype)

        return hidden_states


class LuminaNextDiT2DFP32SiLU(nn.Module):
    """`FP32SiLU` of Diffusers as this model uses it."""

    def __init__(self):
        super().__init__()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.silu(inputs.float(), inplace=False).to(inputs.dtype)


class LuminaNextDiT2DLuminaFeedForward(nn.Module):
    """`LuminaFeedForward` of Diffusers as this model uses it."""

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        multiple_of: int | None = 256,
        ffn_dim_multiplier: float | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        # custom hidden_size factor multiplier
        if ffn_dim_multiplier is not None:
            inner_dim = int(ffn_dim_multiplier * inner_dim)
        inner_dim = multiple_of * ((inner_dim + multiple_of - 1) // multiple_of)

        self.linear_1 = ColumnParallelLinear(
            dim,
            inner_dim,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear_1",
        )
        self.linear_2 = RowParallelLinear(
            inner_dim,
            dim,
            input_is_parallel=True,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear_2",
        )
        self.linear_3 = ColumnParallelLinear(
            dim,
            inner_dim,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear_3",
        )
        self.silu = LuminaNextDiT2DFP32SiLU()

    def forward(self, x):
        return self.linear_2(self.silu(self.linear_1(x)) * self.linear_3(x))


class LuminaNextDiT2DLuminaRMSNormZero(nn.Module):
    """`LuminaRMSNormZero` of Diffusers as this model uses it."""

    def __init__(
        self, embedding_dim: int, norm_eps: float, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = ColumnParallelLinear(
            min(embedding_dim, 1024),
            4 * embedding_dim,
            gather_output=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear",
        )
        self.norm = RMSNorm(embedding_dim, eps=norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        emb = self.linear(self.silu(emb))
        scale_msa, gate_msa, scale_mlp, gate_mlp = emb.chunk(4, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None])

        return x, gate_msa, scale_mlp, gate_mlp


class LuminaNextDiTBlock(nn.Module):
    """
    A LuminaNextDiTBlock for LuminaNextDiT2DModel.

    Parameters:
        dim (`int`): Embedding dimension of the input features.
        num_attention_heads (`int`): Number of attention heads.
        num_kv_heads (`int`):
            Number of attention heads in key and value features (if using GQA), or set to None for the same as query.
        multiple_of (`int`): The number of multiple of ffn layer.
        ffn_dim_multiplier (`float`): The multiplier factor of ffn layer dimension.
        norm_eps (`float`): The eps for norm layer.
        qk_norm (`bool`): normalization for query and key.
        cross_attention_dim (`int`): Cross attention embedding dimension of the input text prompt hidden_states.
        norm_elementwise_affine (`bool`, *optional*, defaults to True),
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        num_kv_heads: int,
        multiple_of: int,
        ffn_dim_multiplier: float,
        norm_eps: float,
        qk_norm: bool,
        cross_attention_dim: int,
        norm_elementwise_affine: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()

        self.gate = nn.Parameter(torch.zeros([num_attention_heads]))

        # Self-attention
        self.attn1 = LuminaNextDiT2DSelfAttention(
            query_dim=dim,
            dim_head=dim // num_attention_heads,
            qk_norm="layer_norm_across_heads" if qk_norm else None,
            heads=num_attention_heads,
            kv_heads=num_kv_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.attn1",
        )
        self.attn1.to_out = nn.Identity()

        # Cross-attention
        self.attn2 = LuminaNextDiT2DCrossAttention(
            query_dim=dim,
            cross_attention_dim=cross_attention_dim,
            dim_head=dim // num_attention_heads,
            qk_norm="layer_norm_across_heads" if qk_norm else None,
            heads=num_attention_heads,
            kv_heads=num_kv_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.attn2",
        )

        self.feed_forward = LuminaNextDiT2DLuminaFeedForward(
            dim=dim,
            inner_dim=int(4 * 2 * dim / 3),
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            quant_config=quant_config,
            prefix=f"{prefix}.feed_forward",
        )

        self.norm1 = LuminaNextDiT2DLuminaRMSNormZero(
            embedding_dim=dim, norm_eps=norm_eps, quant_config=quant_config, prefix=f"{prefix}.norm1"
        )
        self.ffn_norm1 = RMSNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)

        self.norm2 = RMSNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ffn_norm2 = RMSNorm(dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)

        self.norm1_context = RMSNorm(cross_attention_dim, eps=norm_eps, elementwise_affine=norm_elementwise_affine)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor,
        temb: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """
        Perform a forward pass through the LuminaNextDiTBlock.

        Parameters:
            hidden_states (`torch.Tensor`): The input of hidden_states for LuminaNextDiTBlock.
            attention_mask (`torch.Tensor): The input of hidden_states corresponse attention mask.
            image_rotary_emb (`torch.Tensor`): Precomputed cosine and sine frequencies.
            encoder_hidden_states: (`torch.Tensor`): The hidden_states of text prompt are processed by Gemma encoder.
            encoder_mask (`torch.Tensor`): The hidden_states of text prompt attention mask.
            temb (`torch.Tensor`): Timestep embedding with text prompt embedding.
            cross_attention_kwargs (`dict[str, Any]`): kwargs for cross attention.
        """
        residual = hidden_states

        # Self-attention
        norm_hidden_states, gate_msa, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
        self_attn_output = self.attn1(
            hidden_states=norm_hidden_states,
            encoder_hidden_states=norm_hidden_states,
            attention_mask=attention_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=image_rotary_emb,
            **cross_attention_kwargs,
        )

        # Cross-attention
        norm_encoder_hidden_states = self.norm1_context(encoder_hidden_states)
        cross_attn_output = self.attn2(
            hidden_states=norm_hidden_states,
            encoder_hidden_states=norm_encoder_hidden_states,
            attention_mask=encoder_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=None,
            **cross_attention_kwargs,
        )
        cross_attn_output = cross_attn_output * self.gate.tanh().view(1, 1, -1, 1)
        mixed_attn_output = self_attn_output + cross_attn_output
        mixed_attn_output = mixed_attn_output.flatten(-2)
        # linear proj
        hidden_states = self.attn2.to_out[0](mixed_attn_output)

        hidden_states = residual + gate_msa.unsqueeze(1).tanh() * self.norm2(hidden_states)

        mlp_output = self.feed_forward(self.ffn_norm1(hidden_states) * (1 + scale_mlp.unsqueeze(1)))

        hidden_states = hidden_states + gate_mlp.unsqueeze(1).tanh() * self.ffn_norm2(mlp_output)

        return hidden_states


class LuminaNextDiT2DModel(nn.Module):
    """
    LuminaNextDiT: Diffusion model with a Transformer backbone.

    Inherit ModelMixin and ConfigMixin to be compatible with the sampler StableDiffusionPipeline of diffusers.

    Parameters:
        sample_size (`int`): The width of the latent images. This is fixed during training since
            it is used to learn a number of position embeddings.
        patch_size (`int`, *optional*, (`int`, *optional*, defaults to 2):
            The size of each patch in the image. This parameter defines the resolution of patches fed into the model.
        in_channels (`int`, *optional*, defaults to 4):
            The number of input channels for the model. Typically, this matches the number of channels in the input
            images.
        hidden_size (`int`, *optional*, defaults to 4096):
            The dimensionality of the hidden layers in the model. This parameter determines the width of the model's
            hidden representations.
        num_layers (`int`, *optional*, default to 32):
            The number of layers in the model. This defines the depth of the neural network.
        num_attention_heads (`int`, *optional*, defaults to 32):
            The number of attention heads in each attention layer. This parameter specifies how many separate attention
            mechanisms are used.
        num_kv_heads (`int`, *optional*, defaults to 8):
            The number of key-value heads in the attention mechanism, if different from the number of attention heads.
            If None, it defaults to num_attention_heads.
        multiple_of (`int`, *optional*, defaults to 256):
            A factor that the hidden size should be a multiple of. This can help optimize certain hardware
            configurations.
        ffn_dim_multiplier (`float`, *optional*):
            A multiplier for the dimensionality of the feed-forward network. If None, it uses a default value based on
            the model configuration.
        norm_eps (`float`, *optional*, defaults to 1e-5):
            A small value added to the denominator for numerical stability in normalization layers.
        learn_sigma (`bool`, *optional*, defaults to True):
            Whether the model should learn the sigma parameter, which might be related to uncertainty or variance in
            predictions.
        qk_norm (`bool`, *optional*, defaults to True):
            Indicates if the queries and keys in the attention mechanism should be normalized.
        cross_attention_dim (`int`, *optional*, defaults to 2048):
            The dimensionality of the text embeddings. This parameter defines the size of the text representations used
            in the model.
        scaling_factor (`float`, *optional*, defaults to 1.0):
            A scaling factor applied to certain parameters or layers in the model. This can be used for adjusting the
            overall scale of the model's operations.
    """

    _repeated_blocks = ["LuminaNextDiTBlock"]
    _layerwise_offload_blocks_attrs = ["layers"]
    _hsdp_shard_conditions = [lambda name, module: name.startswith(("layers.",)) and name.rpartition(".")[2].isdigit()]
    _cache_dit_adapter_config = CacheDiTAdapterConfig(block_forward_patterns={"layers": ForwardPattern.Pattern_3})
    _sp_plan = {
        "shard_image_rotary_emb": {"input": SequenceParallelInput(split_dim=-2, auto_pad=True)},
        "shard_hidden_states": {
            0: SequenceParallelInput(
                split_dim=1, expected_dims=3, split_output=True, auto_pad=True, shard_group="hidden_states"
            )
        },
        "norm_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, shard_group="hidden_states"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        sample_size: int = 128,
        patch_size: int | None = 2,
        in_channels: int | None = 4,
        hidden_size: int | None = 2304,
        num_layers: int | None = 32,
        num_attention_heads: int | None = 32,
        num_kv_heads: int | None = None,
        multiple_of: int | None = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float | None = 1e-5,
        learn_sigma: bool | None = True,
        qk_norm: bool | None = True,
        cross_attention_dim: int | None = 2048,
        scaling_factor: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_kv_heads=num_kv_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            norm_eps=norm_eps,
            learn_sigma=learn_sigma,
            qk_norm=qk_norm,
            cross_attention_dim=cross_attention_dim,
            scaling_factor=scaling_factor,
        )
        self.sample_size = sample_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.scaling_factor = scaling_factor

        self.patch_embedder = LuminaPatchEmbed(
            patch_size=patch_size, in_channels=in_channels, embed_dim=hidden_size, bias=True
        )

        self.pad_token = nn.Parameter(torch.empty(hidden_size))

        self.time_caption_embed = LuminaCombinedTimestepCaptionEmbedding(
            hidden_size=min(hidden_size, 1024), cross_attention_dim=cross_attention_dim
        )

        self.layers = nn.ModuleList(
            [
                LuminaNextDiTBlock(
                    hidden_size,
                    num_attention_heads,
                    num_kv_heads,
                    multiple_of,
                    ffn_dim_multiplier,
                    norm_eps,
                    qk_norm,
                    cross_attention_dim,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"layers.{i}"),
                )
                for i in range(num_layers)
            ]
        )
        self.norm_out = LuminaLayerNormContinuous(
            embedding_dim=hidden_size,
            conditioning_embedding_dim=min(hidden_size, 1024),
            elementwise_affine=False,
            eps=1e-6,
            bias=True,
            out_dim=patch_size * patch_size * self.out_channels,
        )
        # self.final_layer = LuminaFinalLayer(hidden_size, patch_size, self.out_channels)

        assert (hidden_size // num_attention_heads) % 4 == 0, "2d rope needs head dim to be divisible by 4"
        self.shard_image_rotary_emb = nn.Identity()
        self.shard_hidden_states = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor,
        image_rotary_emb: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] = None,
        return_dict=True,
    ) -> tuple[torch.Tensor] | Transformer2DModelOutput:
        """
        Forward pass of LuminaNextDiT.

        Parameters:
            hidden_states (torch.Tensor): Input tensor of shape (N, C, H, W).
            timestep (torch.Tensor): Tensor of diffusion timesteps of shape (N,).
            encoder_hidden_states (torch.Tensor): Tensor of caption features of shape (N, D).
            encoder_mask (torch.Tensor): Tensor of caption masks of shape (N, L).
            image_rotary_emb (`torch.Tensor`):
                Pre-computed rotary positional embeddings.
            cross_attention_kwargs (`dict`, *optional*):
                A kwargs dictionary that if specified is passed along to the `AttentionProcessor` as defined under
                `self.processor` in
                [diffusers.models.attention_processor](https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_processor.py).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.

        Returns:
            [`~models.transformer_2d.Transformer2DModelOutput`] or `tuple`:
                If `return_dict` is True, a [`~models.transformer_2d.Transformer2DModelOutput`] is returned, otherwise
                a plain `tuple` is returned.
        """
        hidden_states, mask, img_size, image_rotary_emb = self.patch_embedder(hidden_states, image_rotary_emb)
        image_rotary_emb = image_rotary_emb.to(hidden_states.device)

        temb = self.time_caption_embed(timestep, encoder_hidden_states, encoder_mask)

        encoder_mask = encoder_mask.bool()
        image_rotary_emb = self.shard_image_rotary_emb(image_rotary_emb)
        hidden_states = self.shard_hidden_states(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                mask,
                image_rotary_emb,
                encoder_hidden_states,
                encoder_mask,
                temb=temb,
                cross_attention_kwargs=cross_attention_kwargs,
            )

        hidden_states = self.norm_out(hidden_states, temb)

        # unpatchify
        height_tokens = width_tokens = self.patch_size
        height, width = img_size[0]
        batch_size = hidden_states.size(0)
        sequence_length = (height // height_tokens) * (width // width_tokens)
        hidden_states = hidden_states[:, :sequence_length].view(
            batch_size, height // height_tokens, width // width_tokens, height_tokens, width_tokens, self.out_channels
        )
        output = hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

        if not return_dict:
            return (output,)

        return Transformer2DModelOutput(sample=output)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a Diffusers state dict. Raises ValueError for a name this model does not have, and for a merged projection
        of which a part is missing."""
        params = dict(self.named_parameters())
        params.update(self.named_buffers())
        loaded: set[str] = set()
        for name, weight in weights:
            if name not in params:
                raise ValueError(f"{type(self).__name__} has no parameter for the weight {name}")
            param = params[name]
            getattr(param, "weight_loader", default_weight_loader)(param, weight)
            loaded.add(name)
        self.requires_grad_(False)  # with gradients in view, torch copies a transposed input before a linear layer
        return loaded

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
