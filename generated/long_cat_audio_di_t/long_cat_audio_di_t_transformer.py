# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.LongCatAudioDiTTransformer (models/transformers/transformer_longcat_audio_dit.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.utils.outputs import BaseOutput
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
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sequence_parallel_world_size
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.distributed.sp_sharding import sp_gather
from vllm_omni.diffusion.forward_context import get_sp_shard_original_seq_len
from vllm_omni.platforms import current_omni_platform


@dataclass
class LongCatAudioDiTTransformerOutput(BaseOutput):
    sample: torch.Tensor


def _rotate_half(hidden_states: torch.Tensor) -> torch.Tensor:
    first, second = hidden_states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _apply_rotary_emb(hidden_states: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rope
    cos = cos[None, :, None].to(hidden_states.device)
    sin = sin[None, :, None].to(hidden_states.device)
    return (hidden_states.float() * cos + _rotate_half(hidden_states).float() * sin).to(hidden_states.dtype)


class AudioDiTGRN(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gx = torch.norm(hidden_states, p=2, dim=1, keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (hidden_states * nx) + self.beta + hidden_states


class AudioDiTConvNeXtV2Block(nn.Module):
    def __init__(
        self,
        dim: int,
        intermediate_dim: int,
        dilation: int = 1,
        kernel_size: int = 7,
        bias: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        padding = (dilation * (kernel_size - 1)) // 2
        self.dwconv = nn.Conv1d(
            dim, dim, kernel_size=kernel_size, padding=padding, groups=dim, dilation=dilation, bias=bias
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.pwconv1 = nn.Linear(dim, intermediate_dim, bias=bias)
        self.act = nn.SiLU()
        self.grn = AudioDiTGRN(intermediate_dim)
        self.pwconv2 = nn.Linear(intermediate_dim, dim, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.dwconv(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = self.norm(hidden_states)
        hidden_states = self.pwconv1(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.grn(hidden_states)
        hidden_states = self.pwconv2(hidden_states)
        return residual + hidden_states


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


class AudioDiTSinusPositionEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(
        self,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        device = timesteps.device
        half_dim = self.dim // 2
        exponent = math.log(10000) / max(half_dim - 1, 1)
        embeddings = torch.exp(torch.arange(half_dim, device=device).float() * -exponent)
        embeddings = 1000.0 * timesteps.unsqueeze(1) * embeddings.unsqueeze(0)
        return torch.cat((embeddings.sin(), embeddings.cos()), dim=-1)


class AudioDiTTimestepEmbedding(nn.Module):
    def __init__(
        self, dim: int, freq_embed_dim: int = 256, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.time_embed = AudioDiTSinusPositionEmbedding(freq_embed_dim)
        self.time_mlp = nn.Sequential(
            ColumnParallelLinear(
                freq_embed_dim,
                dim,
                gather_output=False,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.time_mlp.0",
            ),
            nn.SiLU(),
            RowParallelLinear(
                dim,
                dim,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.time_mlp.2",
            ),
        )

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = self.time_embed(timestep)
        return self.time_mlp(hidden_states.to(timestep.dtype))


class AudioDiTEmbedder(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.proj = nn.Sequential(
            ColumnParallelLinear(
                in_dim,
                out_dim,
                gather_output=False,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.proj.0",
            ),
            nn.SiLU(),
            RowParallelLinear(
                out_dim,
                out_dim,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.proj.2",
            ),
        )

    def forward(self, hidden_states: torch.Tensor, mask: torch.BoolTensor | None = None) -> torch.Tensor:
        if mask is not None:
            hidden_states = hidden_states.masked_fill(mask.logical_not().unsqueeze(-1), 0.0)
        hidden_states = self.proj(hidden_states)
        if mask is not None:
            hidden_states = hidden_states.masked_fill(mask.logical_not().unsqueeze(-1), 0.0)
        return hidden_states


class AudioDiTRotaryEmbedding(nn.Module):
    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 100000.0):
        super().__init__()
        self.dim = dim
        self.max_position_embeddings = max_position_embeddings
        self.base = base

    @functools.lru_cache(maxsize=128)
    def _build(self, seq_len: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim))
        inv_freq = inv_freq.to(device)
        steps = torch.arange(seq_len, dtype=torch.int64, device=inv_freq.device).type_as(inv_freq)
        freqs = torch.outer(steps, inv_freq)
        embeddings = torch.cat((freqs, freqs), dim=-1)
        return embeddings.cos().contiguous(), embeddings.sin().contiguous()

    def forward(self, hidden_states: torch.Tensor, seq_len: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._build(max(seq_len, self.max_position_embeddings), hidden_states.device)
        return cos[:seq_len].to(dtype=hidden_states.dtype), sin[:seq_len].to(dtype=hidden_states.dtype)


class AudioDiTAdaLNMLP(nn.Module):
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.SiLU(),
            ColumnParallelLinear(
                in_dim,
                out_dim,
                gather_output=True,
                bias=bias,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp.1",
            ),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden_states)


class AudioDiTSelfAttention(nn.Module):
    def __init__(
        self,
        q_dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = dim_head * heads
        self.to_qkv = QKVParallelLinear(
            q_dim,
            dim_head,
            self.heads,
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = TensorParallelRMSNorm(self.inner_dim, eps=eps)
            self.k_norm = TensorParallelRMSNorm(self.inner_dim, eps=eps)
        self.to_out = nn.ModuleList(
            [
                RowParallelLinear(
                    self.inner_dim,
                    q_dim,
                    input_is_parallel=True,
                    bias=bias,
                    return_bias=False,
                    quant_config=quant_config,
                    prefix=f"{prefix}.to_out.0",
                ),
            ]
        )
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.inner_dim = divide(self.inner_dim, get_tensor_model_parallel_world_size())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=dim_head,
            softmax_scale=dim_head**-0.5,
            causal=False,
            role="self",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.BoolTensor | None = None,
        audio_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        batch_size = hidden_states.shape[0]
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        if self.qk_norm:
            query = self.q_norm(query)
            key = self.k_norm(key)

        head_dim = self.inner_dim // self.heads
        query = query.view(batch_size, -1, self.heads, head_dim)
        key = key.view(batch_size, -1, self.heads, head_dim)
        value = value.view(batch_size, -1, self.heads, head_dim)

        query = _apply_rotary_emb(query, audio_rotary_emb)
        key = _apply_rotary_emb(key, audio_rotary_emb)

        hidden_states = self.attn(
            query, key, value, attn_metadata=sequence_metadata(query, attention_mask, "hidden_states")
        )
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[:, :, None, None].to(hidden_states.dtype)

        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        hidden_states = self.to_out[0](hidden_states)
        return hidden_states


class AudioDiTCrossAttention(nn.Module):
    def __init__(
        self,
        q_dim: int,
        kv_dim: int | None,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = dim_head * heads
        self.to_q = ColumnParallelLinear(
            q_dim,
            self.inner_dim,
            gather_output=False,
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_q",
        )
        self.to_kv = MergedColumnParallelLinear(
            kv_dim,
            [self.inner_dim, self.inner_dim],
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_kv",
        )
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = TensorParallelRMSNorm(self.inner_dim, eps=eps)
            self.k_norm = TensorParallelRMSNorm(self.inner_dim, eps=eps)
        self.to_out = nn.ModuleList(
            [
                RowParallelLinear(
                    self.inner_dim,
                    q_dim,
                    input_is_parallel=True,
                    bias=bias,
                    return_bias=False,
                    quant_config=quant_config,
                    prefix=f"{prefix}.to_out.0",
                ),
            ]
        )
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.inner_dim = divide(self.inner_dim, get_tensor_model_parallel_world_size())
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
        post_attention_mask: torch.BoolTensor | None = None,
        attention_mask: torch.BoolTensor | None = None,
        audio_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        prompt_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        batch_size = hidden_states.shape[0]
        query = self.to_q(hidden_states)
        key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)

        if self.qk_norm:
            query = self.q_norm(query)
            key = self.k_norm(key)

        head_dim = self.inner_dim // self.heads
        query = query.view(batch_size, -1, self.heads, head_dim)
        key = key.view(batch_size, -1, self.heads, head_dim)
        value = value.view(batch_size, -1, self.heads, head_dim)

        query = _apply_rotary_emb(query, audio_rotary_emb)
        key = _apply_rotary_emb(key, prompt_rotary_emb)

        hidden_states = self.attn(
            query,
            key,
            value,
            attn_metadata=AttentionMetadata(attn_mask=attention_mask) if attention_mask is not None else None,
        )
        if post_attention_mask is not None:
            hidden_states = hidden_states * post_attention_mask[:, :, None, None].to(hidden_states.dtype)

        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        hidden_states = self.to_out[0](hidden_states)
        return hidden_states


class AudioDiTFeedForward(nn.Module):
    def __init__(
        self,
        dim: int,
        mult: float = 4.0,
        dropout: float = 0.0,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        inner_dim = int(dim * mult)
        self.ff = nn.Sequential(
            ColumnParallelLinear(
                dim,
                inner_dim,
                gather_output=False,
                bias=bias,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.ff.0",
            ),
            nn.GELU(approximate="tanh"),
            nn.Identity(),
            RowParallelLinear(
                inner_dim,
                dim,
                input_is_parallel=True,
                bias=bias,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.ff.3",
            ),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ff(hidden_states)


class AudioDiTBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        cond_dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        cross_attn: bool = True,
        cross_attn_norm: bool = False,
        adaln_type: str = "global",
        adaln_use_text_cond: bool = True,
        ff_mult: float = 4.0,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.adaln_type = adaln_type
        self.adaln_use_text_cond = adaln_use_text_cond
        if adaln_type == "local":
            self.adaln_mlp = AudioDiTAdaLNMLP(
                dim, dim * 6, bias=True, quant_config=quant_config, prefix=f"{prefix}.adaln_mlp"
            )
        elif adaln_type == "global":
            self.adaln_scale_shift = nn.Parameter(torch.randn(dim * 6) / dim**0.5)

        self.self_attn = AudioDiTSelfAttention(
            dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            bias=bias,
            qk_norm=qk_norm,
            eps=eps,
            quant_config=quant_config,
            prefix=f"{prefix}.self_attn",
        )

        self.use_cross_attn = cross_attn
        if cross_attn:
            self.cross_attn = AudioDiTCrossAttention(
                dim,
                cond_dim,
                heads,
                dim_head,
                dropout=dropout,
                bias=bias,
                qk_norm=qk_norm,
                eps=eps,
                quant_config=quant_config,
                prefix=f"{prefix}.cross_attn",
            )
            self.cross_attn_norm = (
                nn.LayerNorm(dim, elementwise_affine=True, eps=eps) if cross_attn_norm else nn.Identity()
            )
            self.cross_attn_norm_c = (
                nn.LayerNorm(cond_dim, elementwise_affine=True, eps=eps) if cross_attn_norm else nn.Identity()
            )
        self.ffn = AudioDiTFeedForward(
            dim=dim, mult=ff_mult, dropout=dropout, bias=bias, quant_config=quant_config, prefix=f"{prefix}.ffn"
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep_embed: torch.Tensor,
        cond: torch.Tensor,
        mask: torch.BoolTensor | None = None,
        cond_mask: torch.BoolTensor | None = None,
        rope: tuple | None = None,
        cond_rope: tuple | None = None,
        adaln_global_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.adaln_type == "local" and adaln_global_out is None:
            if self.adaln_use_text_cond:
                denom = cond_mask.sum(1, keepdim=True).clamp(min=1).to(cond.dtype)
                cond_mean = cond.sum(1) / denom
                norm_cond = timestep_embed + cond_mean
            else:
                norm_cond = timestep_embed
            adaln_out = self.adaln_mlp(norm_cond)
            gate_sa, scale_sa, shift_sa, gate_ffn, scale_ffn, shift_ffn = torch.chunk(adaln_out, 6, dim=-1)
        else:
            adaln_out = adaln_global_out + self.adaln_scale_shift.unsqueeze(0)
            gate_sa, scale_sa, shift_sa, gate_ffn, scale_ffn, shift_ffn = torch.chunk(adaln_out, 6, dim=-1)

        norm_hidden_states = F.layer_norm(hidden_states.float(), (hidden_states.shape[-1],), eps=1e-6).type_as(
            hidden_states
        )
        norm_hidden_states = norm_hidden_states * (1 + scale_sa[:, None]) + shift_sa[:, None]
        attn_output = self.self_attn(
            norm_hidden_states,
            attention_mask=mask,
            audio_rotary_emb=rope,
        )
        hidden_states = hidden_states + gate_sa.unsqueeze(1) * attn_output

        if self.use_cross_attn:
            cross_output = self.cross_attn(
                hidden_states=self.cross_attn_norm(hidden_states),
                encoder_hidden_states=self.cross_attn_norm_c(cond),
                post_attention_mask=mask,
                attention_mask=cond_mask,
                audio_rotary_emb=rope,
                prompt_rotary_emb=cond_rope,
            )
            hidden_states = hidden_states + cross_output

        norm_hidden_states = F.layer_norm(hidden_states.float(), (hidden_states.shape[-1],), eps=1e-6).type_as(
            hidden_states
        )
        norm_hidden_states = norm_hidden_states * (1 + scale_ffn[:, None]) + shift_ffn[:, None]
        ff_output = self.ffn(norm_hidden_states)
        hidden_states = hidden_states + gate_ffn.unsqueeze(1) * ff_output
        return hidden_states


class AudioDiTAdaLayerNormZeroFinal(nn.Module):
    def __init__(self, dim: int, bias: bool = True, eps: float = 1e-6):
        super().__init__()
        self.silu = nn.SiLU()
        self.linear = nn.Linear(dim, dim * 2, bias=bias)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        embedding = self.linear(self.silu(embedding))
        scale, shift = torch.chunk(embedding, 2, dim=-1)
        hidden_states = self.norm(hidden_states.float()).type_as(hidden_states)
        if scale.ndim == 2:
            hidden_states = hidden_states * (1 + scale)[:, None, :] + shift[:, None, :]
        else:
            hidden_states = hidden_states * (1 + scale) + shift
        return hidden_states


class LongCatAudioDiTTransformer(nn.Module):
    _repeated_blocks = ["AudioDiTBlock"]
    _layerwise_offload_blocks_attrs = ["blocks"]
    _hsdp_shard_conditions = [lambda name, module: name.startswith(("blocks.",)) and name.rpartition(".")[2].isdigit()]
    stacked_params_mapping = [
        (".to_qkv", ".to_q", "q"),
        (".to_qkv", ".to_k", "k"),
        (".to_qkv", ".to_v", "v"),
        (".to_kv", ".to_k", 0),
        (".to_kv", ".to_v", 1),
    ]
    packed_modules_mapping = {"to_qkv": ["to_q", "to_k", "to_v"], "to_kv": ["to_k", "to_v"]}
    _sp_plan = {
        "shard_attention_mask": {"input": SequenceParallelInput(split_dim=-1, auto_pad=True)},
        "shard_rope": {
            "input": [
                SequenceParallelInput(split_dim=-2, auto_pad=True),
                SequenceParallelInput(split_dim=-2, auto_pad=True),
            ]
        },
        "shard_timestep_embed": {"input": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True)},
        "shard_hidden_states": {
            0: SequenceParallelInput(
                split_dim=1, expected_dims=3, split_output=True, auto_pad=True, shard_group="hidden_states"
            )
        },
        "shard_residual": {
            "input": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True, shard_group="residual")
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, shard_group="hidden_states"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        dit_dim: int = 1536,
        dit_depth: int = 24,
        dit_heads: int = 24,
        dit_text_dim: int = 768,
        latent_dim: int = 64,
        dropout: float = 0.0,
        bias: bool = True,
        cross_attn: bool = True,
        adaln_type: str = "global",
        adaln_use_text_cond: bool = True,
        long_skip: bool = True,
        text_conv: bool = True,
        qk_norm: bool = True,
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
        use_latent_condition: bool = True,
        ff_mult: float = 4.0,
    ):
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            dit_dim=dit_dim,
            dit_depth=dit_depth,
            dit_heads=dit_heads,
            dit_text_dim=dit_text_dim,
            latent_dim=latent_dim,
            dropout=dropout,
            bias=bias,
            cross_attn=cross_attn,
            adaln_type=adaln_type,
            adaln_use_text_cond=adaln_use_text_cond,
            long_skip=long_skip,
            text_conv=text_conv,
            qk_norm=qk_norm,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            use_latent_condition=use_latent_condition,
            ff_mult=ff_mult,
        )
        dim_head = dit_dim // dit_heads
        self.time_embed = AudioDiTTimestepEmbedding(
            dit_dim, quant_config=quant_config, prefix=maybe_prefix(prefix, "time_embed")
        )
        self.input_embed = AudioDiTEmbedder(
            latent_dim, dit_dim, quant_config=quant_config, prefix=maybe_prefix(prefix, "input_embed")
        )
        self.text_embed = AudioDiTEmbedder(
            dit_text_dim, dit_dim, quant_config=quant_config, prefix=maybe_prefix(prefix, "text_embed")
        )
        self.rotary_embed = AudioDiTRotaryEmbedding(dim_head, 2048, base=100000.0)
        self.blocks = nn.ModuleList(
            [
                AudioDiTBlock(
                    dim=dit_dim,
                    cond_dim=dit_dim,
                    heads=dit_heads,
                    dim_head=dim_head,
                    dropout=dropout,
                    bias=bias,
                    qk_norm=qk_norm,
                    eps=eps,
                    cross_attn=cross_attn,
                    cross_attn_norm=cross_attn_norm,
                    adaln_type=adaln_type,
                    adaln_use_text_cond=adaln_use_text_cond,
                    ff_mult=ff_mult,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"blocks.{i}"),
                )
                for i in range(dit_depth)
            ]
        )
        self.norm_out = AudioDiTAdaLayerNormZeroFinal(dit_dim, bias=bias, eps=eps)
        self.proj_out = nn.Linear(dit_dim, latent_dim)
        if adaln_type == "global":
            self.adaln_global_mlp = AudioDiTAdaLNMLP(
                dit_dim,
                dit_dim * 6,
                bias=True,
                quant_config=quant_config,
                prefix=maybe_prefix(prefix, "adaln_global_mlp"),
            )
        self.text_conv = text_conv
        if text_conv:
            self.text_conv_layer = nn.Sequential(
                *[AudioDiTConvNeXtV2Block(dit_dim, dit_dim * 2, bias=bias, eps=eps) for _ in range(4)]
            )
        self.use_latent_condition = use_latent_condition
        if use_latent_condition:
            self.latent_embed = AudioDiTEmbedder(
                latent_dim, dit_dim, quant_config=quant_config, prefix=maybe_prefix(prefix, "latent_embed")
            )
            self.latent_cond_embedder = AudioDiTEmbedder(
                dit_dim * 2, dit_dim, quant_config=quant_config, prefix=maybe_prefix(prefix, "latent_cond_embedder")
            )
        if self.config.adaln_type == "local":
            for block in self.blocks:
                torch.nn.init.constant_(block.adaln_mlp.mlp[-1].weight, 0)
                if bias:
                    torch.nn.init.constant_(block.adaln_mlp.mlp[-1].bias, 0)
        elif self.config.adaln_type == "global":
            torch.nn.init.constant_(self.adaln_global_mlp.mlp[-1].weight, 0)
            if bias:
                torch.nn.init.constant_(self.adaln_global_mlp.mlp[-1].bias, 0)
        torch.nn.init.constant_(self.norm_out.linear.weight, 0)
        torch.nn.init.constant_(self.proj_out.weight, 0)
        if bias:
            torch.nn.init.constant_(self.norm_out.linear.bias, 0)
            torch.nn.init.constant_(self.proj_out.bias, 0)
        self.shard_timestep_embed = nn.Identity()
        self.shard_attention_mask = nn.Identity()
        self.shard_rope = nn.Identity()
        self.shard_hidden_states = nn.Identity()
        self.shard_residual = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.BoolTensor,
        timestep: torch.Tensor,
        attention_mask: torch.BoolTensor | None = None,
        latent_cond: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LongCatAudioDiTTransformerOutput | tuple[torch.Tensor]:
        """
        The [`LongCatAudioDiTTransformer`] forward method.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, in_channels)`):
                Input `hidden_states`.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_len, embed_dims)`):
                Conditional embeddings (embeddings computed from the input conditions such as prompts) to use.
            encoder_attention_mask (`torch.BoolTensor`):
                Mask applied to `encoder_hidden_states` during attention.
            timestep (`torch.LongTensor`):
                Used to indicate denoising step.
            attention_mask (`torch.BoolTensor`, *optional*):
                Mask applied to `hidden_states` during self-attention.
            latent_cond (`torch.Tensor`, *optional*):
                Latent conditioning concatenated to `hidden_states`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`LongCatAudioDiTTransformerOutput`] instead of a plain tuple.

        Returns:
            [`LongCatAudioDiTTransformerOutput`] or `tuple`:
                If `return_dict` is True, a [`LongCatAudioDiTTransformerOutput`] is returned, otherwise a plain `tuple`
                is returned.
        """
        dtype = hidden_states.dtype
        encoder_hidden_states = encoder_hidden_states.to(dtype)
        timestep = timestep.to(dtype)
        batch_size = hidden_states.shape[0]
        if timestep.ndim == 0:
            timestep = timestep.repeat(batch_size)
        timestep_embed = self.time_embed(timestep)
        text_mask = encoder_attention_mask.bool()
        encoder_hidden_states = self.text_embed(encoder_hidden_states, text_mask)
        if self.text_conv:
            encoder_hidden_states = self.text_conv_layer(encoder_hidden_states)
            encoder_hidden_states = encoder_hidden_states.masked_fill(text_mask.logical_not().unsqueeze(-1), 0.0)
        hidden_states = self.input_embed(hidden_states, attention_mask)
        if self.use_latent_condition and latent_cond is not None:
            latent_cond = self.latent_embed(latent_cond.to(hidden_states.dtype), attention_mask)
            hidden_states = self.latent_cond_embedder(torch.cat([hidden_states, latent_cond], dim=-1))
        residual = hidden_states.clone() if self.config.long_skip else None
        rope = self.rotary_embed(hidden_states, hidden_states.shape[1])
        cond_rope = self.rotary_embed(encoder_hidden_states, encoder_hidden_states.shape[1])
        whole_attention_mask = attention_mask
        if timestep_embed.ndim == 3 and timestep_embed.shape[1] > 1:
            timestep_embed = self.shard_timestep_embed(timestep_embed)
        if attention_mask is not None:
            attention_mask = self.shard_attention_mask(attention_mask)
        rope = self.shard_rope(rope)
        hidden_states = self.shard_hidden_states(hidden_states)
        residual = self.shard_residual(residual)
        if self.config.adaln_type == "global":
            if self.config.adaln_use_text_cond:
                text_len = text_mask.sum(1).clamp(min=1).to(encoder_hidden_states.dtype)
                text_mean = encoder_hidden_states.sum(1) / text_len.unsqueeze(1)
                norm_cond = timestep_embed + text_mean
            else:
                norm_cond = timestep_embed
            adaln_global_out = self.adaln_global_mlp(norm_cond)
            for block in self.blocks:
                hidden_states = block(
                    hidden_states=hidden_states,
                    timestep_embed=timestep_embed,
                    cond=encoder_hidden_states,
                    mask=attention_mask,
                    cond_mask=text_mask,
                    rope=rope,
                    cond_rope=cond_rope,
                    adaln_global_out=adaln_global_out,
                )
        else:
            norm_cond = timestep_embed
            for block in self.blocks:
                hidden_states = block(
                    hidden_states=hidden_states,
                    timestep_embed=timestep_embed,
                    cond=encoder_hidden_states,
                    mask=attention_mask,
                    cond_mask=text_mask,
                    rope=rope,
                    cond_rope=cond_rope,
                )
        if self.config.long_skip:
            hidden_states = hidden_states + residual
        hidden_states = self.norm_out(hidden_states, norm_cond)
        hidden_states = self.proj_out(hidden_states)
        attention_mask = whole_attention_mask
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        if not return_dict:
            return (hidden_states,)
        return LongCatAudioDiTTransformerOutput(sample=hidden_states)

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
