# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.ChromaTransformer2DModel (models/transformers/transformer_chroma.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import FluxPosEmbed, PixArtAlphaTextProjection, Timesteps, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.cudnn_attn import CuDNNAttentionBackend
from vllm_omni.diffusion.attention.backends.flash_attn import FlashAttentionImpl
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.attention.backends.utils.fa import flash_attn_varlen_func
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sequence_parallel_world_size
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.distributed.sp_sharding import sp_gather, sp_shard_with_padding
from vllm_omni.diffusion.forward_context import get_forward_context, get_sp_shard_original_seq_len
from vllm_omni.diffusion.layers.fused_qk_norm_rope import fused_qk_norm_rope, fused_qk_norm_rope_min_tokens
from vllm_omni.platforms import current_omni_platform

logger = init_logger(__name__)  # pylint: disable=invalid-name


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


class PackedRowParallelLinear(RowParallelLinear):
    """Row-parallel linear over several tensors side by side, each of them sharded on its own.

    A rank's input is its shard of every tensor in turn, so the columns of the weight are put into that order before they
    are sliced.
    """

    def __init__(self, input_sizes: list[int], output_size: int, **kwargs):
        self.input_sizes = input_sizes
        super().__init__(sum(input_sizes), output_size, input_is_parallel=True, **kwargs)

    def _by_rank(self, weight: torch.Tensor) -> torch.Tensor:
        world_size = get_tensor_model_parallel_world_size()
        if weight.dim() != 2 or world_size == 1:
            return weight
        parts = [part.chunk(world_size, dim=1) for part in weight.split(self.input_sizes, dim=1)]
        return torch.cat([shards[rank] for rank in range(world_size) for shards in parts], dim=1)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        super().weight_loader(param, self._by_rank(loaded_weight))

    def weight_loader_v2(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        super().weight_loader_v2(param, self._by_rank(loaded_weight))


def mask_if_padded(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, or None where it masks nothing: asked once for all layers. One that is added to scores stays."""
    return None if mask is not None and not mask.is_floating_point() and mask.all() else mask


def norm_and_rotate(
    query: torch.Tensor, key: torch.Tensor, norm_q: nn.Module, norm_k: nn.Module, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm of every head of [B, S, heads, head_dim], then the rotary embedding of adjacent pairs by
    cosines and sines of [S, head_dim / 2] or [B, S, head_dim / 2]; for many tokens in one kernel."""
    batch, tokens = query.shape[:2]
    if batch * tokens >= fused_qk_norm_rope_min_tokens(2048):
        table = torch.cat((cos, sin), dim=-1).float().expand(batch, -1, -1).flatten(0, 1)
        query, key = fused_qk_norm_rope(
            query.flatten(0, 1), key.flatten(0, 1), norm_q.weight, norm_k.weight, table, norm_q.eps, interleaved=True
        )
        return query.unflatten(0, (batch, tokens)), key.unflatten(0, (batch, tokens))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.stack((real * c - imag * s, real * s + imag * c), dim=-1).flatten(3).type_as(x)

    return rotate(norm_q(query)), rotate(norm_k(key))


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


def shard_streams(tensor: torch.Tensor, dim: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """This rank's tokens of every stream that `tensor` holds one after the other along `dim`."""
    if get_forward_context().omni_diffusion_config.parallel_config.sequence_parallel_size == 1:
        return tensor
    return torch.cat([sp_shard_with_padding(part, dim)[0] for part in tensor.split(lengths, dim=dim)], dim=dim)


class ChromaCombinedTimestepTextProjEmbeddings(nn.Module):
    def __init__(self, num_channels: int, out_dim: int):
        super().__init__()

        self.time_proj = Timesteps(num_channels=num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.guidance_proj = Timesteps(num_channels=num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)

        self.register_buffer(
            "mod_proj",
            get_timestep_embedding(
                torch.arange(out_dim) * 1000, 2 * num_channels, flip_sin_to_cos=True, downscale_freq_shift=0
            ),
            persistent=False,
        )

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        mod_index_length = self.mod_proj.shape[0]
        batch_size = timestep.shape[0]

        timesteps_proj = self.time_proj(timestep).to(dtype=timestep.dtype)
        guidance_proj = self.guidance_proj(torch.tensor([0] * batch_size)).to(
            dtype=timestep.dtype, device=timestep.device
        )

        mod_proj = self.mod_proj.to(dtype=timesteps_proj.dtype, device=timesteps_proj.device).repeat(batch_size, 1, 1)
        timestep_guidance = (
            torch.cat([timesteps_proj, guidance_proj], dim=1).unsqueeze(1).repeat(1, mod_index_length, 1)
        )
        input_vec = torch.cat([timestep_guidance, mod_proj], dim=-1)
        return input_vec.to(timestep.dtype)


class ChromaApproximator(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, n_layers: int = 5):
        super().__init__()
        self.in_proj = nn.Linear(in_dim, hidden_dim, bias=True)
        self.layers = nn.ModuleList(
            [PixArtAlphaTextProjection(hidden_dim, hidden_dim, act_fn="silu") for _ in range(n_layers)]
        )
        self.norms = nn.ModuleList([nn.RMSNorm(hidden_dim) for _ in range(n_layers)])
        self.out_proj = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        x = self.in_proj(x)

        for layer, norms in zip(self.layers, self.norms):
            x = x + layer(norms(x))

        return self.out_proj(x)


class ChromaAdaLayerNormZeroPruned(nn.Module):
    r"""
    Norm layer adaptive layer norm zero (adaLN-Zero).

    Parameters:
        embedding_dim (`int`): The size of each embedding vector.
        num_embeddings (`int`): The size of the embeddings dictionary.
    """

    def __init__(
        self,
        embedding_dim: int,
    ):
        super().__init__()

        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.flatten(1, 2).chunk(6, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class ChromaFluxJointAttention(nn.Module):
    """`FluxAttention` of Diffusers as this model uses it, with `FluxAttnProcessor`."""

    def __init__(
        self,
        query_dim: int,
        dim_head: int = 64,
        added_kv_proj_dim: int | None = None,
        out_dim: int = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.head_dim = dim_head

        self.norm_q = nn.RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        self.norm_k = nn.RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        self.to_qkv = QKVParallelLinear(
            query_dim,
            self.head_dim,
            out_dim // self.head_dim,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
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

        self.norm_added_q = nn.RMSNorm(dim_head, eps=1e-6)
        self.norm_added_k = nn.RMSNorm(dim_head, eps=1e-6)
        self.add_qkv_proj = QKVParallelLinear(
            added_kv_proj_dim,
            self.head_dim,
            out_dim // self.head_dim,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.add_qkv_proj",
        )
        self.to_add_out = RowParallelLinear(
            out_dim,
            query_dim,
            input_is_parallel=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_add_out",
        )
        num_heads = out_dim // self.head_dim
        self.attn = Attention(
            num_heads=divide(num_heads, get_tensor_model_parallel_world_size()),
            head_size=self.head_dim,
            softmax_scale=self.head_dim**-0.5,
            causal=False,
            role="self",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        encoder_query = encoder_key = encoder_value = None
        encoder_query, encoder_key, encoder_value = self.add_qkv_proj(encoder_hidden_states).chunk(3, dim=-1)

        # Reshape by a fixed `head_dim` and let `-1` absorb the head count. Under tensor parallelism each rank
        # holds a column-sharded slice (`attn.heads // tp_degree` heads); this keeps the processor TP-agnostic.
        query = query.unflatten(-1, (-1, self.head_dim))
        key = key.unflatten(-1, (-1, self.head_dim))
        value = value.unflatten(-1, (-1, self.head_dim))

        encoder_query = encoder_query.unflatten(-1, (-1, self.head_dim))
        encoder_key = encoder_key.unflatten(-1, (-1, self.head_dim))
        encoder_value = encoder_value.unflatten(-1, (-1, self.head_dim))
        encoder_query, encoder_key = norm_and_rotate(
            encoder_query,
            encoder_key,
            self.norm_added_q,
            self.norm_added_k,
            image_rotary_emb[0][: encoder_query.shape[1], ::2],
            image_rotary_emb[1][: encoder_query.shape[1], ::2],
        )
        query, key = norm_and_rotate(
            query,
            key,
            self.norm_q,
            self.norm_k,
            image_rotary_emb[0][encoder_query.shape[1] :, ::2],
            image_rotary_emb[1][encoder_query.shape[1] :, ::2],
        )

        query = torch.cat([encoder_query, query], dim=1)
        key = torch.cat([encoder_key, key], dim=1)
        value = torch.cat([encoder_value, value], dim=1)

        hidden_states = self.attn(
            query,
            key,
            value,
            attn_metadata=sequence_metadata(query, attention_mask, "encoder_hidden_states", "hidden_states"),
        )
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(query.dtype)

        encoder_hidden_states, hidden_states = hidden_states.split_with_sizes(
            [encoder_hidden_states.shape[1], hidden_states.shape[1] - encoder_hidden_states.shape[1]], dim=1
        )
        hidden_states = self.to_out[0](hidden_states.contiguous())
        encoder_hidden_states = self.to_add_out(encoder_hidden_states.contiguous())

        return hidden_states, encoder_hidden_states


class ChromaGELU(nn.Module):
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


class ChromaFeedForward(nn.Module):
    """`FeedForward` of Diffusers as this model uses it."""

    def __init__(
        self, dim: int, dim_out: int | None = None, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        inner_dim = int(dim * 4)
        act_fn = ChromaGELU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")

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


class ChromaTransformerBlock(nn.Module):
    def __init__(
        self, dim: int, attention_head_dim: int, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.norm1 = ChromaAdaLayerNormZeroPruned(dim)
        self.norm1_context = ChromaAdaLayerNormZeroPruned(dim)

        self.attn = ChromaFluxJointAttention(
            query_dim=dim,
            added_kv_proj_dim=dim,
            dim_head=attention_head_dim,
            out_dim=dim,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = ChromaFeedForward(dim=dim, dim_out=dim, quant_config=quant_config, prefix=f"{prefix}.ff")

        self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff_context = ChromaFeedForward(
            dim=dim, dim_out=dim, quant_config=quant_config, prefix=f"{prefix}.ff_context"
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        temb_img, temb_txt = temb[:, :6], temb[:, 6:]
        norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb_img)

        norm_encoder_hidden_states, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(
            encoder_hidden_states, emb=temb_txt
        )
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :] * attention_mask[:, None, :, None]

        # Attention.
        attention_outputs = self.attn(
            hidden_states=norm_hidden_states,
            encoder_hidden_states=norm_encoder_hidden_states,
            image_rotary_emb=image_rotary_emb,
            attention_mask=attention_mask,
        )

        attn_output, context_attn_output = attention_outputs

        # Process attention outputs for the `hidden_states`.
        attn_output = gate_msa.unsqueeze(1) * attn_output
        hidden_states = hidden_states + attn_output

        norm_hidden_states = self.norm2(hidden_states)
        norm_hidden_states = norm_hidden_states * (1 + scale_mlp[:, None]) + shift_mlp[:, None]

        ff_output = self.ff(norm_hidden_states)
        ff_output = gate_mlp.unsqueeze(1) * ff_output

        hidden_states = hidden_states + ff_output

        # Process attention outputs for the `encoder_hidden_states`.

        context_attn_output = c_gate_msa.unsqueeze(1) * context_attn_output
        encoder_hidden_states = encoder_hidden_states + context_attn_output

        norm_encoder_hidden_states = self.norm2_context(encoder_hidden_states)
        norm_encoder_hidden_states = norm_encoder_hidden_states * (1 + c_scale_mlp[:, None]) + c_shift_mlp[:, None]

        context_ff_output = self.ff_context(norm_encoder_hidden_states)
        encoder_hidden_states = encoder_hidden_states + c_gate_mlp.unsqueeze(1) * context_ff_output
        if encoder_hidden_states.dtype == torch.float16:
            encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)

        return encoder_hidden_states, hidden_states


class ChromaAdaLayerNormZeroSinglePruned(nn.Module):
    r"""
    Norm layer adaptive layer norm zero (adaLN-Zero).

    Parameters:
        embedding_dim (`int`): The size of each embedding vector.
        num_embeddings (`int`): The size of the embeddings dictionary.
    """

    def __init__(
        self,
        embedding_dim: int,
    ):
        super().__init__()

        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=1e-6)

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        shift_msa, scale_msa, gate_msa = emb.flatten(1, 2).chunk(3, dim=1)
        x = self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        return x, gate_msa


class ChromaFluxSelfAttention(nn.Module):
    """`FluxAttention` of Diffusers as this model uses it, with `FluxAttnProcessor`."""

    def __init__(
        self,
        query_dim: int,
        dim_head: int = 64,
        out_dim: int = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.head_dim = dim_head

        self.norm_q = nn.RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        self.norm_k = nn.RMSNorm(dim_head, eps=1e-6, elementwise_affine=True)
        self.to_qkv = QKVParallelLinear(
            query_dim,
            self.head_dim,
            out_dim // self.head_dim,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )
        num_heads = out_dim // self.head_dim
        self.attn = Attention(
            num_heads=divide(num_heads, get_tensor_model_parallel_world_size()),
            head_size=self.head_dim,
            softmax_scale=self.head_dim**-0.5,
            causal=False,
            role="self",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        # Reshape by a fixed `head_dim` and let `-1` absorb the head count. Under tensor parallelism each rank
        # holds a column-sharded slice (`attn.heads // tp_degree` heads); this keeps the processor TP-agnostic.
        query = query.unflatten(-1, (-1, self.head_dim))
        key = key.unflatten(-1, (-1, self.head_dim))
        value = value.unflatten(-1, (-1, self.head_dim))

        query, key = norm_and_rotate(
            query, key, self.norm_q, self.norm_k, image_rotary_emb[0][:, ::2], image_rotary_emb[1][:, ::2]
        )

        hidden_states = self.attn(
            query,
            key,
            value,
            attn_metadata=sequence_metadata(query, attention_mask, "encoder_hidden_states", "hidden_states"),
        )
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(query.dtype)

        return hidden_states


class ChromaSingleTransformerBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.mlp_hidden_dim = int(dim * mlp_ratio)
        self.norm = ChromaAdaLayerNormZeroSinglePruned(dim)
        self.proj_mlp = ColumnParallelLinear(
            dim,
            self.mlp_hidden_dim,
            gather_output=False,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.proj_mlp",
        )
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = PackedRowParallelLinear(
            [dim, self.mlp_hidden_dim],
            dim,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.proj_out",
        )

        self.attn = ChromaFluxSelfAttention(
            query_dim=dim, dim_head=attention_head_dim, out_dim=dim, quant_config=quant_config, prefix=f"{prefix}.attn"
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        norm_hidden_states, gate = self.norm(hidden_states, emb=temb)
        mlp_hidden_states = self.act_mlp(self.proj_mlp(norm_hidden_states))

        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :] * attention_mask[:, None, :, None]

        attn_output = self.attn(
            hidden_states=norm_hidden_states, image_rotary_emb=image_rotary_emb, attention_mask=attention_mask
        )

        hidden_states = torch.cat([attn_output, mlp_hidden_states], dim=2)
        gate = gate.unsqueeze(1)
        hidden_states = gate * self.proj_out(hidden_states)
        hidden_states = residual + hidden_states
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-65504, 65504)

        return hidden_states


class ChromaAdaLayerNormContinuousPruned(nn.Module):
    r"""
    Adaptive normalization layer with a norm layer (layer_norm or rms_norm).

    Args:
        embedding_dim (`int`): Embedding dimension to use during projection.
        conditioning_embedding_dim (`int`): Dimension of the input condition.
        elementwise_affine (`bool`, defaults to `True`):
            Boolean flag to denote if affine transformation should be applied.
        eps (`float`, defaults to 1e-5): Epsilon factor.
        bias (`bias`, defaults to `True`): Boolean flag to denote if bias should be use.
        norm_type (`str`, defaults to `"layer_norm"`):
            Normalization layer to use. Values supported: "layer_norm", "rms_norm".
    """

    def __init__(
        self,
        embedding_dim: int,
        elementwise_affine=True,
        eps=1e-5,
        bias=True,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(embedding_dim, eps, elementwise_affine, bias)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        # convert back to the original dtype in case `conditioning_embedding`` is upcasted to float32 (needed for hunyuanDiT)
        shift, scale = torch.chunk(emb.flatten(1, 2).to(x.dtype), 2, dim=1)
        x = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        return x


class ChromaTransformer2DModel(nn.Module):
    """
    The Transformer model introduced in Flux, modified for Chroma.

    Reference: https://huggingface.co/lodestones/Chroma1-HD

    Args:
        patch_size (`int`, defaults to `1`):
            Patch size to turn the input data into small patches.
        in_channels (`int`, defaults to `64`):
            The number of channels in the input.
        out_channels (`int`, *optional*, defaults to `None`):
            The number of channels in the output. If not specified, it defaults to `in_channels`.
        num_layers (`int`, defaults to `19`):
            The number of layers of dual stream DiT blocks to use.
        num_single_layers (`int`, defaults to `38`):
            The number of layers of single stream DiT blocks to use.
        attention_head_dim (`int`, defaults to `128`):
            The number of dimensions to use for each attention head.
        num_attention_heads (`int`, defaults to `24`):
            The number of attention heads to use.
        joint_attention_dim (`int`, defaults to `4096`):
            The number of dimensions to use for the joint attention (embedding/channel dimension of
            `encoder_hidden_states`).
        axes_dims_rope (`tuple[int]`, defaults to `(16, 56, 56)`):
            The dimensions to use for the rotary positional embeddings.
    """

    _repeated_blocks = ["ChromaTransformerBlock", "ChromaSingleTransformerBlock"]
    _layerwise_offload_blocks_attrs = ["transformer_blocks", "single_transformer_blocks"]
    _hsdp_shard_conditions = [
        lambda name, module: (
            name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and name.rpartition(".")[2].isdigit()
        )
    ]
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
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
    ):
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            axes_dims_rope=axes_dims_rope,
            approximator_num_channels=approximator_num_channels,
            approximator_hidden_dim=approximator_hidden_dim,
            approximator_layers=approximator_layers,
        )
        self.out_channels = out_channels or in_channels
        self.inner_dim = num_attention_heads * attention_head_dim

        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=axes_dims_rope)

        self.time_text_embed = ChromaCombinedTimestepTextProjEmbeddings(
            num_channels=approximator_num_channels // 4,
            out_dim=3 * num_single_layers + 2 * 6 * num_layers + 2,
        )
        self.distilled_guidance_layer = ChromaApproximator(
            in_dim=approximator_num_channels,
            out_dim=self.inner_dim,
            hidden_dim=approximator_hidden_dim,
            n_layers=approximator_layers,
        )

        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim)
        self.x_embedder = nn.Linear(in_channels, self.inner_dim)

        self.transformer_blocks = nn.ModuleList(
            [
                ChromaTransformerBlock(
                    dim=self.inner_dim,
                    attention_head_dim=attention_head_dim,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"transformer_blocks.{i}"),
                )
                for i in range(num_layers)
            ]
        )

        self.single_transformer_blocks = nn.ModuleList(
            [
                ChromaSingleTransformerBlock(
                    dim=self.inner_dim,
                    attention_head_dim=attention_head_dim,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"single_transformer_blocks.{i}"),
                )
                for i in range(num_single_layers)
            ]
        )

        self.norm_out = ChromaAdaLayerNormContinuousPruned(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels, bias=True)
        self.shard_encoder_hidden_states = nn.Identity()
        self.shard_hidden_states = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor = None,
        timestep: torch.LongTensor = None,
        img_ids: torch.Tensor = None,
        txt_ids: torch.Tensor = None,
        attention_mask: torch.Tensor = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> torch.Tensor | Transformer2DModelOutput:
        """
        The [`FluxTransformer2DModel`] forward method.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, image_sequence_length, in_channels)`):
                Input `hidden_states`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, text_sequence_length, joint_attention_dim)`):
                Conditional embeddings (embeddings computed from the input conditions such as prompts) to use.
            timestep ( `torch.LongTensor`):
                Used to indicate denoising step.
            img_ids (`torch.Tensor`):
                Image position ids used to compute the rotary positional embeddings.
            txt_ids (`torch.Tensor`):
                Text position ids used to compute the rotary positional embeddings.
            attention_mask (`torch.Tensor`, *optional*):
                Mask applied to `encoder_hidden_states` during attention.
            controlnet_block_samples (`list` of `torch.Tensor`, *optional*):
                A list of tensors that if specified are added to the residuals of transformer blocks.
            controlnet_single_block_samples (`list` of `torch.Tensor`, *optional*):
                A list of tensors that if specified are added to the residuals of single transformer blocks.
            controlnet_blocks_repeat (`bool`, *optional*, defaults to `False`):
                Whether to repeat the controlnet block samples across all transformer blocks.
            joint_attention_kwargs (`dict`, *optional*):
                A kwargs dictionary that if specified is passed along to the `AttentionProcessor` as defined under
                `self.processor` in
                [diffusers.models.attention_processor](https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_processor.py).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.

        Returns:
            If `return_dict` is True, an [`~models.transformer_2d.Transformer2DModelOutput`] is returned, otherwise a
            `tuple` where the first element is the sample tensor.
        """
        if joint_attention_kwargs:
            raise NotImplementedError(
                "`joint_attention_kwargs` has no counterpart in the engine; LoRA scales are set per request"
            )

        hidden_states = self.x_embedder(hidden_states)

        timestep = timestep.to(hidden_states.dtype) * 1000

        input_vec = self.time_text_embed(timestep)
        pooled_temb = self.distilled_guidance_layer(input_vec)

        encoder_hidden_states = self.context_embedder(encoder_hidden_states)

        if txt_ids.ndim == 3:
            logger.warning(
                "Passing `txt_ids` 3d torch.Tensor is deprecated."
                "Please remove the batch dimension and pass it as a 2d torch Tensor"
            )
            txt_ids = txt_ids[0]
        if img_ids.ndim == 3:
            logger.warning(
                "Passing `img_ids` 3d torch.Tensor is deprecated."
                "Please remove the batch dimension and pass it as a 2d torch Tensor"
            )
            img_ids = img_ids[0]

        ids = torch.cat((txt_ids, img_ids), dim=0)
        image_rotary_emb = self.pos_embed(ids)
        attention_mask = mask_if_padded(attention_mask)
        image_rotary_emb = tuple(
            shard_streams(table, -2, (encoder_hidden_states.shape[1], hidden_states.shape[1]))
            for table in image_rotary_emb
        )
        encoder_hidden_states = self.shard_encoder_hidden_states(encoder_hidden_states)
        hidden_states = self.shard_hidden_states(hidden_states)

        for index_block, block in enumerate(self.transformer_blocks):
            img_offset = 3 * len(self.single_transformer_blocks)
            txt_offset = img_offset + 6 * len(self.transformer_blocks)
            img_modulation = img_offset + 6 * index_block
            text_modulation = txt_offset + 6 * index_block
            temb = torch.cat(
                (
                    pooled_temb[:, img_modulation : img_modulation + 6],
                    pooled_temb[:, text_modulation : text_modulation + 6],
                ),
                dim=1,
            )
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
                attention_mask=attention_mask,
            )

            # controlnet residual
            if controlnet_block_samples is not None:
                interval_control = len(self.transformer_blocks) / len(controlnet_block_samples)
                interval_control = int(np.ceil(interval_control))
                # For Xlabs ControlNet.
                if controlnet_blocks_repeat:
                    hidden_states = (
                        hidden_states + controlnet_block_samples[index_block % len(controlnet_block_samples)]
                    )
                else:
                    hidden_states = hidden_states + controlnet_block_samples[index_block // interval_control]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)

        for index_block, block in enumerate(self.single_transformer_blocks):
            start_idx = 3 * index_block
            temb = pooled_temb[:, start_idx : start_idx + 3]
            hidden_states = block(
                hidden_states=hidden_states, temb=temb, image_rotary_emb=image_rotary_emb, attention_mask=attention_mask
            )

            # controlnet residual
            if controlnet_single_block_samples is not None:
                interval_control = len(self.single_transformer_blocks) / len(controlnet_single_block_samples)
                interval_control = int(np.ceil(interval_control))
                hidden_states[:, encoder_hidden_states.shape[1] :, ...] = (
                    hidden_states[:, encoder_hidden_states.shape[1] :, ...]
                    + controlnet_single_block_samples[index_block // interval_control]
                )

        hidden_states = hidden_states[:, encoder_hidden_states.shape[1] :, ...]

        temb = pooled_temb[:, -2:]
        hidden_states = self.norm_out(hidden_states, temb)
        output = self.proj_out(hidden_states)

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
