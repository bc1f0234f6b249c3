# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.LTXVideoTransformer3DModel (models/transformers/transformer_ltx.py, diffusers 0.40.0), rule set 91e97b116ae2.
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
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle, RMSNorm
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.utils import divide
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

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


def apply_rotary_emb(x, freqs):
    cos, sin = freqs
    x_real, x_imag = x.unflatten(2, (-1, 2)).unbind(-1)  # [B, S, C // 2]
    x_rotated = torch.stack([-x_imag, x_real], dim=-1).flatten(2)
    out = (x.float() * cos + x_rotated.float() * sin).to(x.dtype)
    return out


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


class TensorParallelRMSNorm(nn.Module):
    """RMS norm over a dimension that is sharded over the tensor-parallel ranks: the squares are summed over all ranks."""

    def __init__(self, dim: int, eps: float | None = None):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(divide(dim, get_tensor_model_parallel_world_size())))
        set_weight_attrs(self.weight, {"weight_loader": self.weight_loader})

    def weight_loader(self, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        size = param.shape[0]
        param.data.copy_(loaded_weight.narrow(0, get_tensor_model_parallel_rank() * size, size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        squares = states.square().sum(dim=-1, keepdim=True)
        if get_tensor_model_parallel_world_size() > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        eps = torch.finfo(hidden_states.dtype).eps if self.eps is None else self.eps
        states = states * torch.rsqrt(squares / self.dim + eps)
        return (states * self.weight.float()).type_as(hidden_states)


def key_padding_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The keys to attend to ([B, keys], bool), where `mask` is 1 for them and 0 for padding.

    Diffusers adds -10000 to the scores of padding, of which a softmax leaves nothing, unless all is padding: such a row attends
    to everything. A bias ([B, 1, keys]) stays one, the same for all heads. Whether anything is padding is not asked: the host
    would wait for the device, and a text is seldom as long as it may be.
    """
    if mask is None or mask.ndim != 2:
        return mask if mask is None else mask.unsqueeze(1)
    keys = mask == 1
    return keys | ~keys.any(dim=-1, keepdim=True)


def rotary_of_this_rank(tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """This rank's share of rotary tables as wide as all heads: [batch, sequence, width] or [batch, heads, sequence, size]."""
    world_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    return tuple(table.chunk(world_size, dim=1 if table.ndim == 4 else -1)[rank] for table in tables)


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


class LTXVideoRotaryPosEmbed(nn.Module):
    def __init__(
        self,
        dim: int,
        base_num_frames: int = 20,
        base_height: int = 2048,
        base_width: int = 2048,
        patch_size: int = 1,
        patch_size_t: int = 1,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()

        self.dim = dim
        self.base_num_frames = base_num_frames
        self.base_height = base_height
        self.base_width = base_width
        self.patch_size = patch_size
        self.patch_size_t = patch_size_t
        self.theta = theta

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: tuple[torch.Tensor, float, float] | None = None,
        video_coords: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch_size = hidden_states.size(0)

        if video_coords is None:
            # Always compute rope in fp32
            grid_h = torch.arange(height, dtype=torch.float32, device=hidden_states.device)
            grid_w = torch.arange(width, dtype=torch.float32, device=hidden_states.device)
            grid_f = torch.arange(num_frames, dtype=torch.float32, device=hidden_states.device)
            grid = torch.meshgrid(grid_f, grid_h, grid_w, indexing="ij")
            grid = torch.stack(grid, dim=0)
            grid = grid.unsqueeze(0).repeat(batch_size, 1, 1, 1, 1)

            if rope_interpolation_scale is not None:
                grid[:, 0:1] = grid[:, 0:1] * rope_interpolation_scale[0] * self.patch_size_t / self.base_num_frames
                grid[:, 1:2] = grid[:, 1:2] * rope_interpolation_scale[1] * self.patch_size / self.base_height
                grid[:, 2:3] = grid[:, 2:3] * rope_interpolation_scale[2] * self.patch_size / self.base_width

            grid = grid.flatten(2, 4).transpose(1, 2)
        else:
            grid = torch.stack(
                [
                    video_coords[:, 0] / self.base_num_frames,
                    video_coords[:, 1] / self.base_height,
                    video_coords[:, 2] / self.base_width,
                ],
                dim=-1,
            )

        start = 1.0
        end = self.theta
        freqs = self.theta ** torch.linspace(
            math.log(start, self.theta),
            math.log(end, self.theta),
            self.dim // 6,
            device=hidden_states.device,
            dtype=torch.float32,
        )
        freqs = freqs * math.pi / 2.0
        freqs = freqs * (grid.unsqueeze(-1) * 2 - 1)
        freqs = freqs.transpose(-1, -2).flatten(2)

        cos_freqs = freqs.cos().repeat_interleave(2, dim=-1)
        sin_freqs = freqs.sin().repeat_interleave(2, dim=-1)

        if self.dim % 6 != 0:
            cos_padding = torch.ones_like(cos_freqs[:, :, : self.dim % 6])
            sin_padding = torch.zeros_like(cos_freqs[:, :, : self.dim % 6])
            cos_freqs = torch.cat([cos_padding, cos_freqs], dim=-1)
            sin_freqs = torch.cat([sin_padding, sin_freqs], dim=-1)

        return cos_freqs, sin_freqs


class LTXSelfAttention(nn.Module):
    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        kv_heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = True,
        out_bias: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        if qk_norm != "rms_norm_across_heads":
            raise NotImplementedError("Only 'rms_norm_across_heads' is supported as a valid value for `qk_norm`.")
        self.inner_dim = dim_head * heads
        self.inner_kv_dim = dim_head * kv_heads
        self.heads = heads

        norm_eps = 1e-5
        self.norm_q = TensorParallelRMSNorm(dim_head * heads, eps=norm_eps)
        self.norm_k = TensorParallelRMSNorm(dim_head * kv_heads, eps=norm_eps)
        self.to_qkv = QKVParallelLinear(
            query_dim,
            dim_head,
            self.heads,
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )
        self.to_out = nn.ModuleList([])
        self.to_out.append(
            RowParallelLinear(
                self.inner_dim,
                query_dim,
                input_is_parallel=True,
                bias=out_bias,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.to_out.0",
            )
        )
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=dim_head**-0.5,
            causal=False,
            role="self",
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor, image_rotary_emb: torch.Tensor | None = None) -> torch.Tensor:

        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        query = self.norm_q(query)
        key = self.norm_k(key)

        query = apply_rotary_emb(query, rotary_of_this_rank(image_rotary_emb))
        key = apply_rotary_emb(key, rotary_of_this_rank(image_rotary_emb))

        query = query.unflatten(2, (self.heads, -1))
        key = key.unflatten(2, (self.heads, -1))
        value = value.unflatten(2, (self.heads, -1))

        hidden_states = self.attn(query, key, value, attn_metadata=sequence_metadata(query, None, "hidden_states"))
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(query.dtype)

        hidden_states = self.to_out[0](hidden_states)
        return hidden_states


class LTXCrossAttention(nn.Module):
    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        kv_heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = True,
        cross_attention_dim: int | None = None,
        out_bias: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        if qk_norm != "rms_norm_across_heads":
            raise NotImplementedError("Only 'rms_norm_across_heads' is supported as a valid value for `qk_norm`.")
        self.inner_dim = dim_head * heads
        self.inner_kv_dim = dim_head * kv_heads
        self.heads = heads

        norm_eps = 1e-5
        self.norm_q = TensorParallelRMSNorm(dim_head * heads, eps=norm_eps)
        self.norm_k = TensorParallelRMSNorm(dim_head * kv_heads, eps=norm_eps)
        self.to_q = ColumnParallelLinear(
            query_dim,
            self.inner_dim,
            gather_output=False,
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_q",
        )
        self.to_kv = MergedColumnParallelLinear(
            cross_attention_dim,
            [self.inner_kv_dim, self.inner_kv_dim],
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_kv",
        )
        self.to_out = nn.ModuleList([])
        self.to_out.append(
            RowParallelLinear(
                self.inner_dim,
                query_dim,
                input_is_parallel=True,
                bias=out_bias,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.to_out.0",
            )
        )
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
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
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:

        query = self.to_q(hidden_states)
        key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)

        query = self.norm_q(query)
        key = self.norm_k(key)

        query = query.unflatten(2, (self.heads, -1))
        key = key.unflatten(2, (self.heads, -1))
        value = value.unflatten(2, (self.heads, -1))

        hidden_states = self.attn(
            query,
            key,
            value,
            attn_metadata=AttentionMetadata(attn_mask=attention_mask) if attention_mask is not None else None,
        )
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(query.dtype)

        hidden_states = self.to_out[0](hidden_states)
        return hidden_states


class LTXVideoGELU(nn.Module):
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
        hidden_states = F.gelu(hidden_states, approximate="none")
        return hidden_states


class LTXVideoGELUTanh(nn.Module):
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


class LTXVideoGEGLU(nn.Module):
    """`GEGLU` of Diffusers as this model uses it."""

    def __init__(self, dim_in: int, dim_out: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.proj = MergedColumnParallelLinear(
            dim_in, [dim_out] * 2, bias=True, return_bias=False, quant_config=quant_config, prefix=f"{prefix}.proj"
        )

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate)

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states = self.proj(hidden_states)
        hidden_states, gate = hidden_states.chunk(2, dim=-1)
        return hidden_states * self.gelu(gate)


class LTXVideoApproximateGELU(nn.Module):
    """`ApproximateGELU` of Diffusers as this model uses it."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        return x * torch.sigmoid(1.702 * x)


class LTXVideoSwiGLU(nn.Module):
    """`SwiGLU` of Diffusers as this model uses it."""

    def __init__(self, dim_in: int, dim_out: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()

        self.proj = MergedColumnParallelLinear(
            dim_in, [dim_out] * 2, bias=True, return_bias=False, quant_config=quant_config, prefix=f"{prefix}.proj"
        )
        self.activation = nn.SiLU()

    def forward(self, hidden_states):
        hidden_states = self.proj(hidden_states)
        hidden_states, gate = hidden_states.chunk(2, dim=-1)
        return hidden_states * self.activation(gate)


class LTXVideoLinearActivation(nn.Module):
    """`LinearActivation` of Diffusers as this model uses it."""

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
        self.activation = get_activation("silu")

    def forward(self, hidden_states):
        hidden_states = self.proj(hidden_states)
        return self.activation(hidden_states)


class LTXVideoFeedForward(nn.Module):
    """`FeedForward` of Diffusers as this model uses it."""

    def __init__(
        self, dim: int, activation_fn: str = "geglu", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        inner_dim = int(dim * 4)

        if activation_fn == "gelu":
            act_fn = LTXVideoGELU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")
        if activation_fn == "gelu-approximate":
            act_fn = LTXVideoGELUTanh(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")
        elif activation_fn == "geglu":
            act_fn = LTXVideoGEGLU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")
        elif activation_fn == "geglu-approximate":
            act_fn = LTXVideoApproximateGELU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")
        elif activation_fn == "swiglu":
            act_fn = LTXVideoSwiGLU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")
        elif activation_fn == "linear-silu":
            act_fn = LTXVideoLinearActivation(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")

        self.net = nn.ModuleList([])
        # project in
        self.net.append(act_fn)
        # project dropout
        self.net.append(nn.Identity())
        # project out
        self.net.append(
            RowParallelLinear(
                inner_dim,
                dim,
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


class LTXVideoTransformerBlock(nn.Module):
    r"""
    Transformer block used in [LTX](https://huggingface.co/Lightricks/LTX-Video).

    Args:
        dim (`int`):
            The number of channels in the input and output.
        num_attention_heads (`int`):
            The number of heads to use for multi-head attention.
        attention_head_dim (`int`):
            The number of channels in each head.
        qk_norm (`str`, defaults to `"rms_norm"`):
            The normalization layer to use.
        activation_fn (`str`, defaults to `"gelu-approximate"`):
            Activation function to use in feed-forward.
        eps (`float`, defaults to `1e-6`):
            Epsilon value for normalization layers.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int,
        qk_norm: str = "rms_norm_across_heads",
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        attention_out_bias: bool = True,
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.norm1 = RMSNorm(dim, eps=eps, elementwise_affine=elementwise_affine)
        self.attn1 = LTXSelfAttention(
            query_dim=dim,
            heads=num_attention_heads,
            kv_heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=attention_bias,
            out_bias=attention_out_bias,
            qk_norm=qk_norm,
            quant_config=quant_config,
            prefix=f"{prefix}.attn1",
        )

        self.norm2 = RMSNorm(dim, eps=eps, elementwise_affine=elementwise_affine)
        self.attn2 = LTXCrossAttention(
            query_dim=dim,
            cross_attention_dim=cross_attention_dim,
            heads=num_attention_heads,
            kv_heads=num_attention_heads,
            dim_head=attention_head_dim,
            bias=attention_bias,
            out_bias=attention_out_bias,
            qk_norm=qk_norm,
            quant_config=quant_config,
            prefix=f"{prefix}.attn2",
        )

        self.ff = LTXVideoFeedForward(
            dim, activation_fn=activation_fn, quant_config=quant_config, prefix=f"{prefix}.ff"
        )

        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch_size = hidden_states.size(0)
        norm_hidden_states = self.norm1(hidden_states)

        num_ada_params = self.scale_shift_table.shape[0]
        ada_values = self.scale_shift_table[None, None].to(temb.device) + temb.reshape(
            batch_size, temb.size(1), num_ada_params, -1
        )
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = ada_values.unbind(dim=2)
        norm_hidden_states = norm_hidden_states * (1 + scale_msa) + shift_msa

        attn_hidden_states = self.attn1(hidden_states=norm_hidden_states, image_rotary_emb=image_rotary_emb)
        hidden_states = hidden_states + attn_hidden_states * gate_msa

        attn_hidden_states = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        hidden_states = hidden_states + attn_hidden_states
        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp

        ff_output = self.ff(norm_hidden_states)
        hidden_states = hidden_states + ff_output * gate_mlp

        return hidden_states


class LTXVideoTransformer3DModel(nn.Module):
    r"""
    A Transformer model for video-like data used in [LTX](https://huggingface.co/Lightricks/LTX-Video).

    Args:
        in_channels (`int`, defaults to `128`):
            The number of channels in the input.
        out_channels (`int`, defaults to `128`):
            The number of channels in the output.
        patch_size (`int`, defaults to `1`):
            The size of the spatial patches to use in the patch embedding layer.
        patch_size_t (`int`, defaults to `1`):
            The size of the tmeporal patches to use in the patch embedding layer.
        num_attention_heads (`int`, defaults to `32`):
            The number of heads to use for multi-head attention.
        attention_head_dim (`int`, defaults to `64`):
            The number of channels in each head.
        cross_attention_dim (`int`, defaults to `2048 `):
            The number of channels for cross attention heads.
        num_layers (`int`, defaults to `28`):
            The number of layers of Transformer blocks to use.
        activation_fn (`str`, defaults to `"gelu-approximate"`):
            Activation function to use in feed-forward.
        qk_norm (`str`, defaults to `"rms_norm_across_heads"`):
            The normalization layer to use.
    """

    _repeated_blocks = ["LTXVideoTransformerBlock"]
    _layerwise_offload_blocks_attrs = ["transformer_blocks"]
    _hsdp_shard_conditions = [
        lambda name, module: name.startswith(("transformer_blocks.",)) and name.rpartition(".")[2].isdigit()
    ]
    _cache_dit_adapter_config = CacheDiTAdapterConfig(
        block_forward_patterns={"transformer_blocks": ForwardPattern.Pattern_2}
    )
    stacked_params_mapping = [
        (".to_qkv", ".to_q", "q"),
        (".to_qkv", ".to_k", "k"),
        (".to_qkv", ".to_v", "v"),
        (".to_kv", ".to_k", 0),
        (".to_kv", ".to_v", 1),
    ]
    packed_modules_mapping = {"to_qkv": ["to_q", "to_k", "to_v"], "to_kv": ["to_k", "to_v"]}
    _sp_plan = {
        "shard_image_rotary_emb": {
            "input": [
                SequenceParallelInput(split_dim=-2, auto_pad=True),
                SequenceParallelInput(split_dim=-2, auto_pad=True),
            ]
        },
        "shard_embedded_timestep": {"input": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True)},
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
        in_channels: int = 128,
        out_channels: int = 128,
        patch_size: int = 1,
        patch_size_t: int = 1,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 2048,
        num_layers: int = 28,
        activation_fn: str = "gelu-approximate",
        qk_norm: str = "rms_norm_across_heads",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        attention_bias: bool = True,
        attention_out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            patch_size_t=patch_size_t,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            num_layers=num_layers,
            activation_fn=activation_fn,
            qk_norm=qk_norm,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            caption_channels=caption_channels,
            attention_bias=attention_bias,
            attention_out_bias=attention_out_bias,
        )

        out_channels = out_channels or in_channels
        inner_dim = num_attention_heads * attention_head_dim

        self.proj_in = nn.Linear(in_channels, inner_dim)

        self.scale_shift_table = nn.Parameter(torch.randn(2, inner_dim) / inner_dim**0.5)
        self.time_embed = AdaLayerNormSingle(inner_dim, use_additional_conditions=False)

        self.caption_projection = PixArtAlphaTextProjection(in_features=caption_channels, hidden_size=inner_dim)

        self.rope = LTXVideoRotaryPosEmbed(
            dim=inner_dim,
            base_num_frames=20,
            base_height=2048,
            base_width=2048,
            patch_size=patch_size,
            patch_size_t=patch_size_t,
            theta=10000.0,
        )

        self.transformer_blocks = nn.ModuleList(
            [
                LTXVideoTransformerBlock(
                    dim=inner_dim,
                    num_attention_heads=num_attention_heads,
                    attention_head_dim=attention_head_dim,
                    cross_attention_dim=cross_attention_dim,
                    qk_norm=qk_norm,
                    activation_fn=activation_fn,
                    attention_bias=attention_bias,
                    attention_out_bias=attention_out_bias,
                    eps=norm_eps,
                    elementwise_affine=norm_elementwise_affine,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"transformer_blocks.{i}"),
                )
                for i in range(num_layers)
            ]
        )

        self.norm_out = nn.LayerNorm(inner_dim, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(inner_dim, out_channels)
        self.shard_embedded_timestep = nn.Identity()
        self.shard_image_rotary_emb = nn.Identity()
        self.shard_hidden_states = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.LongTensor,
        encoder_attention_mask: torch.Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: tuple[float, float, float] | torch.Tensor | None = None,
        video_coords: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> torch.Tensor:
        """
        The [`LTXVideoTransformer3DModel`] forward method.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, in_channels)`):
                Input `hidden_states`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_len, embed_dims)`):
                Conditional embeddings (embeddings computed from the input conditions such as prompts) to use.
            timestep (`torch.LongTensor`):
                Used to indicate denoising step.
            encoder_attention_mask (`torch.Tensor`):
                Mask applied to `encoder_hidden_states` during attention.
            num_frames (`int`, *optional*):
                Number of frames in the video used to compute the rotary positional embeddings.
            height (`int`, *optional*):
                Height of the latent used to compute the rotary positional embeddings.
            width (`int`, *optional*):
                Width of the latent used to compute the rotary positional embeddings.
            rope_interpolation_scale (`tuple` of `float` or `torch.Tensor`, *optional*):
                Interpolation scale used by the rotary positional embeddings.
            video_coords (`torch.Tensor`, *optional*):
                Pre-computed video coordinates used by the rotary positional embeddings.
            attention_kwargs (`dict`, *optional*):
                A kwargs dictionary that if specified is passed along to the `AttentionProcessor` as defined under
                `self.processor` in
                [diffusers.models.attention_processor](https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_processor.py).
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.

        Returns:
            `torch.Tensor`:
                The denoised output tensor of shape `(batch_size, sequence_length, out_channels)`.
        """
        if attention_kwargs:
            raise NotImplementedError(
                "`attention_kwargs` has no counterpart in the engine; LoRA scales are set per request"
            )
        image_rotary_emb = self.rope(hidden_states, num_frames, height, width, rope_interpolation_scale, video_coords)
        encoder_attention_mask = key_padding_mask(encoder_attention_mask)

        batch_size = hidden_states.size(0)
        hidden_states = self.proj_in(hidden_states)

        temb, embedded_timestep = self.time_embed(
            timestep.flatten(),
            batch_size=batch_size,
            hidden_dtype=hidden_states.dtype,
        )

        temb = temb.view(batch_size, -1, temb.size(-1))
        embedded_timestep = embedded_timestep.view(batch_size, -1, embedded_timestep.size(-1))

        encoder_hidden_states = self.caption_projection(encoder_hidden_states)
        encoder_hidden_states = encoder_hidden_states.view(batch_size, -1, hidden_states.size(-1))
        if embedded_timestep.ndim == 3 and embedded_timestep.shape[1] > 1:
            embedded_timestep = self.shard_embedded_timestep(embedded_timestep)
        image_rotary_emb = self.shard_image_rotary_emb(image_rotary_emb)
        hidden_states = self.shard_hidden_states(hidden_states)

        for block in self.transformer_blocks:
            hidden_states = block(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
                encoder_attention_mask=encoder_attention_mask,
            )

        scale_shift_values = self.scale_shift_table[None, None] + embedded_timestep[:, :, None]
        shift, scale = scale_shift_values[:, :, 0], scale_shift_values[:, :, 1]

        hidden_states = self.norm_out(hidden_states)
        hidden_states = hidden_states * (1 + scale) + shift
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
