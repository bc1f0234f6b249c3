# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.ZImageTransformer2DModel (models/transformers/transformer_z_image.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm, LpNorm, RMSNorm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
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
from vllm_omni.diffusion.distributed.sp_sharding import sp_gather
from vllm_omni.diffusion.forward_context import get_sp_shard_original_seq_len
from vllm_omni.platforms import current_omni_platform

ADALN_EMBED_DIM = 256


SEQ_MULTI_OF = 32


X_PAD_DIM = 64


def select_per_token(
    value_noisy: torch.Tensor,
    value_clean: torch.Tensor,
    noise_mask: torch.Tensor,
    seq_len: int,
) -> torch.Tensor:
    noise_mask_expanded = noise_mask.unsqueeze(-1)  # (batch, seq_len, 1)
    return torch.where(
        noise_mask_expanded == 1,
        value_noisy.unsqueeze(1).expand(-1, seq_len, -1),
        value_clean.unsqueeze(1).expand(-1, seq_len, -1),
    )


class RopeEmbedder:
    def __init__(
        self,
        theta: float = 256.0,
        axes_dims: list[int] = (16, 56, 56),
        axes_lens: list[int] = (64, 128, 128),
    ):
        self.theta = theta
        self.axes_dims = axes_dims
        self.axes_lens = axes_lens
        assert len(axes_dims) == len(axes_lens), "axes_dims and axes_lens must have the same length"
        self.freqs_cis = None

    @staticmethod
    def precompute_freqs_cis(dim: list[int], end: list[int], theta: float = 256.0):
        with torch.device("cpu"):
            freqs_cis = []
            for i, (d, e) in enumerate(zip(dim, end)):
                freqs = 1.0 / (theta ** (torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d))
                timestep = torch.arange(e, device=freqs.device, dtype=torch.float64)
                freqs = torch.outer(timestep, freqs).float()
                freqs_cis_i = torch.polar(torch.ones_like(freqs), freqs).to(torch.complex64)  # complex64
                freqs_cis.append(freqs_cis_i)

            return freqs_cis

    def __call__(self, ids: torch.Tensor):
        assert ids.ndim == 2
        assert ids.shape[-1] == len(self.axes_dims)
        device = ids.device

        if self.freqs_cis is None:
            self.freqs_cis = self.precompute_freqs_cis(self.axes_dims, self.axes_lens, theta=self.theta)
            self.freqs_cis = [freqs_cis.to(device) for freqs_cis in self.freqs_cis]
        else:
            # Ensure freqs_cis are on the same device as ids
            if self.freqs_cis[0].device != device:
                self.freqs_cis = [freqs_cis.to(device) for freqs_cis in self.freqs_cis]

        result = []
        for i in range(len(self.axes_dims)):
            index = ids[:, i]
            result.append(self.freqs_cis[i][index])
        return torch.cat(result, dim=-1)


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


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_channels, bias=True)

        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(),
            nn.Linear(min(hidden_size, ADALN_EMBED_DIM), hidden_size, bias=True),
        )

    def forward(self, x, c=None, noise_mask=None, c_noisy=None, c_clean=None):
        seq_len = x.shape[1]

        if noise_mask is not None:
            # Per-token modulation
            scale_noisy = 1.0 + self.adaLN_modulation(c_noisy)
            scale_clean = 1.0 + self.adaLN_modulation(c_clean)
            scale = select_per_token(scale_noisy, scale_clean, noise_mask, seq_len)
        else:
            # Original global modulation
            assert c is not None, "Either c or (c_noisy, c_clean) must be provided"
            scale = 1.0 + self.adaLN_modulation(c)
            scale = scale.unsqueeze(1)

        x = self.norm_final(x) * scale
        x = self.linear(x)
        return x


class ZImageAttention(nn.Module):
    """`Attention` of Diffusers as this model uses it, with `ZSingleStreamAttnProcessor`."""

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        qk_norm: str | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        skip_sequence_parallel: bool = False,
    ):
        super().__init__()

        self.inner_dim = dim_head * heads

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
            self.norm_k = nn.LayerNorm(dim_head * None, eps=1e-5)
        elif qk_norm == "rms_norm":
            self.norm_q = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
            self.norm_k = RMSNorm(dim_head, eps=1e-5, elementwise_affine=True)
        elif qk_norm == "rms_norm_across_heads":
            # LTX applies qk norm across all heads
            self.norm_q = RMSNorm(dim_head * heads, eps=1e-5)
            self.norm_k = RMSNorm(dim_head * None, eps=1e-5)
        elif qk_norm == "l2":
            self.norm_q = LpNorm(p=2, dim=-1, eps=1e-5)
            self.norm_k = LpNorm(p=2, dim=-1, eps=1e-5)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
            )

        self.to_qkv = QKVParallelLinear(
            query_dim,
            dim_head,
            self.heads,
            bias=False,
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
                bias=False,
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
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            skip_sequence_parallel=skip_sequence_parallel,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)

        query = query.unflatten(-1, (self.heads, -1))
        key = key.unflatten(-1, (self.heads, -1))
        value = value.unflatten(-1, (self.heads, -1))

        # Apply Norms
        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)

        # Apply RoPE
        def apply_rotary_emb(x_in: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
            with torch.amp.autocast("cuda", enabled=False):
                x = x_in.float().reshape(*x_in.shape[:-1], -1, 2)
                freqs_cis = freqs_cis.unsqueeze(2)
                real, imag = x.unbind(-1)
                cos, sin = torch.view_as_real(freqs_cis).unbind(-1)
                x_out = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(3)
                return x_out.type_as(x_in)  # todo

        query = apply_rotary_emb(query, freqs_cis)
        key = apply_rotary_emb(key, freqs_cis)

        # Cast to correct dtype
        dtype = query.dtype
        query, key = query.to(dtype), key.to(dtype)

        # From [batch, seq_len] to [batch, 1, 1, seq_len] -> broadcast to [batch, heads, seq_len, seq_len]
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]

        # Compute joint attention
        hidden_states = self.attn(query, key, value, attn_metadata=sequence_metadata(query, attention_mask, "unified"))

        # Reshape back
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(dtype)

        output = self.to_out[0](hidden_states)

        return output


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.w1 = ColumnParallelLinear(
            dim,
            hidden_dim,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w1",
        )
        self.w2 = RowParallelLinear(
            hidden_dim,
            dim,
            input_is_parallel=True,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w2",
        )
        self.w3 = ColumnParallelLinear(
            dim,
            hidden_dim,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w3",
        )

    def _forward_silu_gating(self, x1, x3):
        return F.silu(x1) * x3

    def forward(self, x):
        return self.w2(self._forward_silu_gating(self.w1(x), self.w3(x)))


class ZImageTransformerBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        n_heads: int,
        norm_eps: float,
        qk_norm: bool,
        modulation=True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        skip_sequence_parallel: bool = False,
    ):
        super().__init__()

        # Refactored to use diffusers Attention with custom processor
        # Original Z-Image params: dim, n_heads, n_kv_heads, qk_norm
        self.attention = ZImageAttention(
            query_dim=dim,
            dim_head=dim // n_heads,
            heads=n_heads,
            qk_norm="rms_norm" if qk_norm else None,
            quant_config=quant_config,
            prefix=f"{prefix}.attention",
            skip_sequence_parallel=skip_sequence_parallel,
        )

        self.feed_forward = FeedForward(
            dim=dim, hidden_dim=int(dim / 3 * 8), quant_config=quant_config, prefix=f"{prefix}.feed_forward"
        )

        self.attention_norm1 = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm1 = RMSNorm(dim, eps=norm_eps)

        self.attention_norm2 = RMSNorm(dim, eps=norm_eps)
        self.ffn_norm2 = RMSNorm(dim, eps=norm_eps)

        self.modulation = modulation
        if modulation:
            self.adaLN_modulation = nn.Sequential(
                ColumnParallelLinear(
                    min(dim, ADALN_EMBED_DIM),
                    4 * dim,
                    gather_output=True,
                    bias=True,
                    return_bias=False,
                    quant_config=quant_config,
                    prefix=f"{prefix}.adaLN_modulation.0",
                )
            )

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        adaln_noisy: torch.Tensor | None = None,
        adaln_clean: torch.Tensor | None = None,
    ):
        if self.modulation:
            seq_len = x.shape[1]

            if noise_mask is not None:
                # Per-token modulation: different modulation for noisy/clean tokens
                mod_noisy = self.adaLN_modulation(adaln_noisy)
                mod_clean = self.adaLN_modulation(adaln_clean)

                scale_msa_noisy, gate_msa_noisy, scale_mlp_noisy, gate_mlp_noisy = mod_noisy.chunk(4, dim=1)
                scale_msa_clean, gate_msa_clean, scale_mlp_clean, gate_mlp_clean = mod_clean.chunk(4, dim=1)

                gate_msa_noisy, gate_mlp_noisy = gate_msa_noisy.tanh(), gate_mlp_noisy.tanh()
                gate_msa_clean, gate_mlp_clean = gate_msa_clean.tanh(), gate_mlp_clean.tanh()

                scale_msa_noisy, scale_mlp_noisy = 1.0 + scale_msa_noisy, 1.0 + scale_mlp_noisy
                scale_msa_clean, scale_mlp_clean = 1.0 + scale_msa_clean, 1.0 + scale_mlp_clean

                scale_msa = select_per_token(scale_msa_noisy, scale_msa_clean, noise_mask, seq_len)
                scale_mlp = select_per_token(scale_mlp_noisy, scale_mlp_clean, noise_mask, seq_len)
                gate_msa = select_per_token(gate_msa_noisy, gate_msa_clean, noise_mask, seq_len)
                gate_mlp = select_per_token(gate_mlp_noisy, gate_mlp_clean, noise_mask, seq_len)
            else:
                # Global modulation: same modulation for all tokens (avoid double select)
                mod = self.adaLN_modulation(adaln_input)
                scale_msa, gate_msa, scale_mlp, gate_mlp = mod.unsqueeze(1).chunk(4, dim=2)
                gate_msa, gate_mlp = gate_msa.tanh(), gate_mlp.tanh()
                scale_msa, scale_mlp = 1.0 + scale_msa, 1.0 + scale_mlp

            # Attention block
            attn_out = self.attention(
                self.attention_norm1(x) * scale_msa, attention_mask=attn_mask, freqs_cis=freqs_cis
            )
            x = x + gate_msa * self.attention_norm2(attn_out)

            # FFN block
            x = x + gate_mlp * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_mlp))
        else:
            # Attention block
            attn_out = self.attention(self.attention_norm1(x), attention_mask=attn_mask, freqs_cis=freqs_cis)
            x = x + self.attention_norm2(attn_out)

            # FFN block
            x = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))

        return x


class TimestepEmbedder(nn.Module):
    def __init__(
        self,
        out_size,
        mid_size=None,
        frequency_embedding_size=256,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            ColumnParallelLinear(
                frequency_embedding_size,
                mid_size,
                gather_output=False,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp.0",
            ),
            nn.SiLU(),
            RowParallelLinear(
                mid_size,
                out_size,
                input_is_parallel=True,
                bias=True,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp.2",
            ),
        )

    @staticmethod
    def timestep_embedding(
        t,
    ):
        with torch.amp.autocast("cuda", enabled=False):
            half = 256 // 2
            freqs = torch.exp(
                -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32, device=t.device) / half
            )
            args = t[:, None].float() * freqs[None]
            embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
            return embedding

    def forward(self, t):
        t_freq = self.timestep_embedding(t)
        weight_dtype = self.mlp[0].weight.dtype
        compute_dtype = getattr(self.mlp[0], "compute_dtype", None)
        if weight_dtype.is_floating_point:
            t_freq = t_freq.to(weight_dtype)
        elif compute_dtype is not None:
            t_freq = t_freq.to(compute_dtype)
        t_emb = self.mlp(t_freq)
        return t_emb


class ZImageTransformer2DModel(nn.Module):
    _repeated_blocks = ["ZImageTransformerBlock"]
    _layerwise_offload_blocks_attrs = ["noise_refiner", "context_refiner", "siglip_refiner", "layers"]
    _hsdp_shard_conditions = [
        lambda name, module: (
            name.startswith(("noise_refiner.", "context_refiner.", "siglip_refiner.", "layers."))
            and name.rpartition(".")[2].isdigit()
        )
    ]
    stacked_params_mapping = [(".to_qkv", ".to_q", "q"), (".to_qkv", ".to_k", "k"), (".to_qkv", ".to_v", "v")]
    packed_modules_mapping = {"to_qkv": ["to_q", "to_k", "to_v"]}
    _sp_plan = {
        "shard_noise_mask_tensor": {"input": SequenceParallelInput(split_dim=-1, auto_pad=True)},
        "shard_unified_freqs": {"input": SequenceParallelInput(split_dim=-2, auto_pad=True)},
        "shard_unified": {
            0: SequenceParallelInput(
                split_dim=1, expected_dims=3, split_output=True, auto_pad=True, shard_group="unified"
            )
        },
        "gather_unified": SequenceParallelOutput(gather_dim=1, expected_dims=3, shard_group="unified"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=3840,
        n_layers=30,
        n_refiner_layers=2,
        n_heads=30,
        n_kv_heads=30,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=2560,
        siglip_feat_dim=None,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[32, 48, 48],
        axes_lens=[1024, 512, 512],
    ) -> None:
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            all_patch_size=all_patch_size,
            all_f_patch_size=all_f_patch_size,
            in_channels=in_channels,
            dim=dim,
            n_layers=n_layers,
            n_refiner_layers=n_refiner_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            norm_eps=norm_eps,
            qk_norm=qk_norm,
            cap_feat_dim=cap_feat_dim,
            siglip_feat_dim=siglip_feat_dim,
            rope_theta=rope_theta,
            t_scale=t_scale,
            axes_dims=axes_dims,
            axes_lens=axes_lens,
        )
        self.in_channels = in_channels
        self.out_channels = in_channels
        self.all_patch_size = all_patch_size
        self.all_f_patch_size = all_f_patch_size
        self.dim = dim
        self.n_heads = n_heads

        self.rope_theta = rope_theta
        self.t_scale = t_scale

        assert len(all_patch_size) == len(all_f_patch_size)

        all_x_embedder = {}
        all_final_layer = {}
        for patch_idx, (patch_size, f_patch_size) in enumerate(zip(all_patch_size, all_f_patch_size)):
            x_embedder = nn.Linear(f_patch_size * patch_size * patch_size * in_channels, dim, bias=True)
            all_x_embedder[f"{patch_size}-{f_patch_size}"] = x_embedder

            final_layer = FinalLayer(dim, patch_size * patch_size * f_patch_size * self.out_channels)
            all_final_layer[f"{patch_size}-{f_patch_size}"] = final_layer

        self.all_x_embedder = nn.ModuleDict(all_x_embedder)
        self.all_final_layer = nn.ModuleDict(all_final_layer)
        self.noise_refiner = nn.ModuleList(
            [
                ZImageTransformerBlock(
                    dim=dim,
                    n_heads=n_heads,
                    norm_eps=norm_eps,
                    qk_norm=qk_norm,
                    modulation=True,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"noise_refiner.{layer_id}"),
                    skip_sequence_parallel=True,
                )
                for layer_id in range(n_refiner_layers)
            ]
        )
        self.context_refiner = nn.ModuleList(
            [
                ZImageTransformerBlock(
                    dim=dim,
                    n_heads=n_heads,
                    norm_eps=norm_eps,
                    qk_norm=qk_norm,
                    modulation=False,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"context_refiner.{layer_id}"),
                    skip_sequence_parallel=True,
                )
                for layer_id in range(n_refiner_layers)
            ]
        )
        self.t_embedder = TimestepEmbedder(
            min(dim, ADALN_EMBED_DIM),
            mid_size=1024,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "t_embedder"),
        )
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim, bias=True))

        # Optional SigLIP components (for Omni variant)
        if siglip_feat_dim is not None:
            self.siglip_embedder = nn.Sequential(
                RMSNorm(siglip_feat_dim, eps=norm_eps), nn.Linear(siglip_feat_dim, dim, bias=True)
            )
            self.siglip_refiner = nn.ModuleList(
                [
                    ZImageTransformerBlock(
                        dim=dim,
                        n_heads=n_heads,
                        norm_eps=norm_eps,
                        qk_norm=qk_norm,
                        modulation=False,
                        quant_config=quant_config,
                        prefix=maybe_prefix(prefix, f"siglip_refiner.{layer_id}"),
                        skip_sequence_parallel=True,
                    )
                    for layer_id in range(n_refiner_layers)
                ]
            )
            self.siglip_pad_token = nn.Parameter(torch.zeros((1, dim)))
        else:
            self.siglip_embedder = None
            self.siglip_refiner = None
            self.siglip_pad_token = None

        self.x_pad_token = nn.Parameter(torch.zeros((1, dim)))
        self.cap_pad_token = nn.Parameter(torch.zeros((1, dim)))

        self.layers = nn.ModuleList(
            [
                ZImageTransformerBlock(
                    dim=dim,
                    n_heads=n_heads,
                    norm_eps=norm_eps,
                    qk_norm=qk_norm,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"layers.{layer_id}"),
                )
                for layer_id in range(n_layers)
            ]
        )
        head_dim = dim // n_heads
        assert head_dim == sum(axes_dims)
        self.axes_dims = axes_dims
        self.axes_lens = axes_lens

        self.rope_embedder = RopeEmbedder(theta=rope_theta, axes_dims=axes_dims, axes_lens=axes_lens)
        self.shard_noise_mask_tensor = nn.Identity()
        self.shard_unified_freqs = nn.Identity()
        self.shard_unified = nn.Identity()
        self.gather_unified = nn.Identity()

    def unpatchify(
        self,
        x: list[torch.Tensor],
        size: list[tuple],
        patch_size,
        f_patch_size,
        x_pos_offsets: list[tuple[int, int]] | None = None,
    ) -> list[torch.Tensor]:
        pH = pW = patch_size
        bsz = len(x)
        assert len(size) == bsz

        if x_pos_offsets is not None:
            # Omni: extract target image from unified sequence (cond_images + target)
            result = []
            for i in range(bsz):
                unified_x = x[i][x_pos_offsets[i][0] : x_pos_offsets[i][1]]
                cu_len = 0
                x_item = None
                for j in range(len(size[i])):
                    if size[i][j] is None:
                        ori_len = 0
                        pad_len = SEQ_MULTI_OF
                        cu_len += pad_len + ori_len
                    else:
                        F, H, W = size[i][j]
                        ori_len = (F // f_patch_size) * (H // pH) * (W // pW)
                        pad_len = (-ori_len) % SEQ_MULTI_OF
                        x_item = (
                            unified_x[cu_len : cu_len + ori_len]
                            .view(F // f_patch_size, H // pH, W // pW, f_patch_size, pH, pW, self.out_channels)
                            .permute(6, 0, 3, 1, 4, 2, 5)
                            .reshape(self.out_channels, F, H, W)
                        )
                        cu_len += ori_len + pad_len
                result.append(x_item)  # Return only the last (target) image
            return result
        else:
            # Original mode: simple unpatchify
            for i in range(bsz):
                F, H, W = size[i]
                ori_len = (F // f_patch_size) * (H // pH) * (W // pW)
                # "f h w pf ph pw c -> c (f pf) (h ph) (w pw)"
                x[i] = (
                    x[i][:ori_len]
                    .view(F // f_patch_size, H // pH, W // pW, f_patch_size, pH, pW, self.out_channels)
                    .permute(6, 0, 3, 1, 4, 2, 5)
                    .reshape(self.out_channels, F, H, W)
                )
            return x

    @staticmethod
    def create_coordinate_grid(size, start=None, device=None):
        axes = [torch.arange(x0, x0 + span, dtype=torch.int32, device=device) for x0, span in zip(start, size)]
        grids = torch.meshgrid(axes, indexing="ij")
        return torch.stack(grids, dim=-1)

    def _patchify_image(self, image: torch.Tensor, patch_size: int, f_patch_size: int):
        """Patchify a single image tensor: (C, F, H, W) -> (num_patches, patch_dim)."""
        pH, pW, pF = patch_size, patch_size, f_patch_size
        C, F, H, W = image.size()
        F_tokens, H_tokens, W_tokens = F // pF, H // pH, W // pW
        image = image.view(C, F_tokens, pF, H_tokens, pH, W_tokens, pW)
        image = image.permute(1, 3, 5, 2, 4, 6, 0).reshape(F_tokens * H_tokens * W_tokens, pF * pH * pW * C)
        return image, (F, H, W), (F_tokens, H_tokens, W_tokens)

    def _pad_with_ids(
        self,
        feat: torch.Tensor,
        pos_grid_size: tuple,
        pos_start: tuple,
        device: torch.device,
        noise_mask_val: int | None = None,
    ):
        """Pad feature to SEQ_MULTI_OF, create position IDs and pad mask."""
        ori_len = len(feat)
        pad_len = (-ori_len) % SEQ_MULTI_OF
        total_len = ori_len + pad_len

        # Pos IDs
        ori_pos_ids = self.create_coordinate_grid(size=pos_grid_size, start=pos_start, device=device).flatten(0, 2)
        if pad_len > 0:
            pad_pos_ids = (
                self.create_coordinate_grid(size=(1, 1, 1), start=(0, 0, 0), device=device)
                .flatten(0, 2)
                .repeat(pad_len, 1)
            )
            pos_ids = torch.cat([ori_pos_ids, pad_pos_ids], dim=0)
            padded_feat = torch.cat([feat, feat[-1:].repeat(pad_len, 1)], dim=0)
            pad_mask = torch.cat(
                [
                    torch.zeros(ori_len, dtype=torch.bool, device=device),
                    torch.ones(pad_len, dtype=torch.bool, device=device),
                ]
            )
        else:
            pos_ids = ori_pos_ids
            padded_feat = feat
            pad_mask = torch.zeros(ori_len, dtype=torch.bool, device=device)

        noise_mask = [noise_mask_val] * total_len if noise_mask_val is not None else None  # token level
        return padded_feat, pos_ids, pad_mask, total_len, noise_mask

    def _prepare_sequence(
        self,
        feats: list[torch.Tensor],
        pos_ids: list[torch.Tensor],
        inner_pad_mask: list[torch.Tensor],
        pad_token: nn.Parameter,
        noise_mask: list[list[int]] | None = None,
        device: torch.device = None,
    ):
        """Prepare sequence: apply pad token, RoPE embed, pad to batch, create attention mask."""
        item_seqlens = [len(f) for f in feats]
        max_seqlen = max(item_seqlens)
        bsz = len(feats)

        # Pad token
        feats_cat = torch.cat(feats, dim=0)
        mask = torch.cat(inner_pad_mask).unsqueeze(-1)
        feats_cat = torch.where(mask, pad_token, feats_cat)
        feats = list(feats_cat.split(item_seqlens, dim=0))

        # RoPE
        freqs_cis = list(self.rope_embedder(torch.cat(pos_ids, dim=0)).split([len(p) for p in pos_ids], dim=0))

        # Pad to batch
        feats = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True, padding_value=0.0)
        freqs_cis = torch.nn.utils.rnn.pad_sequence(freqs_cis, batch_first=True, padding_value=0.0)[:, : feats.shape[1]]

        # Attention mask
        if all(seq == max_seqlen for seq in item_seqlens):
            attn_mask = None
        else:
            attn_mask = torch.zeros((bsz, max_seqlen), dtype=torch.bool, device=device)
            for i, seq_len in enumerate(item_seqlens):
                attn_mask[i, :seq_len] = 1

        # Noise mask
        noise_mask_tensor = None
        if noise_mask is not None:
            noise_mask_tensor = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(m, dtype=torch.long, device=device) for m in noise_mask],
                batch_first=True,
                padding_value=0,
            )[:, : feats.shape[1]]

        return feats, freqs_cis, attn_mask, item_seqlens, noise_mask_tensor

    def forward(
        self,
        x: list[torch.Tensor, list[list[torch.Tensor]]],
        t,
        cap_feats: list[torch.Tensor, list[list[torch.Tensor]]],
        return_dict: bool = True,
        controlnet_block_samples: dict[int, torch.Tensor] | None = None,
        siglip_feats: list[list[torch.Tensor]] | None = None,
        image_noise_mask: list[list[int]] | None = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
    ):
        """
        The [`ZImageTransformer2DModel`] forward method.

        Flow: patchify -> t_embed -> x_embed -> x_refine -> cap_embed -> cap_refine
              -> [siglip_embed -> siglip_refine] -> build_unified -> main_layers -> final_layer -> unpatchify

        Args:
            x (`list` of `torch.Tensor` or nested `list` of `torch.Tensor`):
                Input latents. A flat list when running in standard mode, or a nested list when running in omni mode.
            t (`torch.Tensor`):
                Used to indicate denoising step.
            cap_feats (`list` of `torch.Tensor` or nested `list` of `torch.Tensor`):
                Conditional caption embeddings (embeddings computed from the input conditions such as prompts) to use.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.
            controlnet_block_samples (`dict` of `int` to `torch.Tensor`, *optional*):
                A mapping from block index to tensor that if specified are added to the residuals of transformer
                blocks.
            siglip_feats (`list` of `list` of `torch.Tensor`, *optional*):
                Optional SigLIP image features used as additional conditioning.
            image_noise_mask (`list` of `list` of `int`, *optional*):
                Per-image noise masks indicating noisy vs. clean tokens in omni mode.
            patch_size (`int`, *optional*, defaults to 2):
                Spatial patch size used to patchify the input latents.
            f_patch_size (`int`, *optional*, defaults to 1):
                Temporal patch size used to patchify the input latents.
        """
        assert patch_size in self.all_patch_size and f_patch_size in self.all_f_patch_size
        omni_mode = isinstance(x[0], list)
        device = x[0][-1].device if omni_mode else x[0].device

        if omni_mode:
            # Dual embeddings: noisy (t) and clean (t=1)
            t_noisy = self.t_embedder(t * self.t_scale).type_as(x[0][-1])
            t_clean = self.t_embedder(torch.ones_like(t) * self.t_scale).type_as(x[0][-1])
            adaln_input = None
        else:
            # Single embedding for all tokens
            adaln_input = self.t_embedder(t * self.t_scale).type_as(x[0])
            t_noisy = t_clean = None

        # Patchify
        if omni_mode:
            bsz = len(x)
            patchify_and_embed_omni_device = x[0][-1].device
            dtype = x[0][-1].dtype

            all_x_out, all_x_size, all_x_pos_ids, all_x_pad_mask, all_x_len, all_x_noise_mask = [], [], [], [], [], []
            (
                patchify_and_embed_omni_all_cap_out,
                patchify_and_embed_omni_all_cap_pos_ids,
                patchify_and_embed_omni_all_cap_pad_mask,
                all_cap_len,
                all_cap_noise_mask,
            ) = [], [], [], [], []
            all_sig_out, all_sig_pos_ids, all_sig_pad_mask, all_sig_len, all_sig_noise_mask = [], [], [], [], []

            for i in range(bsz):
                num_images = len(x[i])
                cap_feats_list, cap_pos_list, cap_mask_list, cap_lens, cap_noise = [], [], [], [], []
                cap_end_pos = []
                cap_cu_len = 1

                # Process captions
                for j, cap_item in enumerate(cap_feats[i]):
                    noise_val = image_noise_mask[i][j] if j < len(image_noise_mask[i]) else 1
                    (
                        patchify_and_embed_omni_cap_out,
                        cap_pos,
                        patchify_and_embed_omni_cap_mask,
                        patchify_and_embed_omni_cap_len,
                        cap_nm,
                    ) = self._pad_with_ids(
                        cap_item,
                        (len(cap_item) + (-len(cap_item)) % SEQ_MULTI_OF, 1, 1),
                        (cap_cu_len, 0, 0),
                        patchify_and_embed_omni_device,
                        noise_val,
                    )
                    cap_feats_list.append(patchify_and_embed_omni_cap_out)
                    cap_pos_list.append(cap_pos)
                    cap_mask_list.append(patchify_and_embed_omni_cap_mask)
                    cap_lens.append(patchify_and_embed_omni_cap_len)
                    cap_noise.extend(cap_nm)
                    cap_cu_len += len(cap_item)
                    cap_end_pos.append(cap_cu_len)
                    cap_cu_len += 2  # for image vae and siglip tokens

                patchify_and_embed_omni_all_cap_out.append(torch.cat(cap_feats_list, dim=0))
                patchify_and_embed_omni_all_cap_pos_ids.append(torch.cat(cap_pos_list, dim=0))
                patchify_and_embed_omni_all_cap_pad_mask.append(torch.cat(cap_mask_list, dim=0))
                all_cap_len.append(cap_lens)
                all_cap_noise_mask.append(cap_noise)

                # Process images
                x_feats_list, x_pos_list, x_mask_list, x_lens, x_size, x_noise = [], [], [], [], [], []
                for j, x_item in enumerate(x[i]):
                    noise_val = image_noise_mask[i][j]
                    if x_item is not None:
                        (
                            x_patches,
                            patchify_and_embed_omni_size,
                            (patchify_and_embed_omni_F_t, patchify_and_embed_omni_H_t, patchify_and_embed_omni_W_t),
                        ) = self._patchify_image(x_item, patch_size, f_patch_size)
                        x_out, x_pos, patchify_and_embed_omni_x_mask, x_len, x_nm = self._pad_with_ids(
                            x_patches,
                            (patchify_and_embed_omni_F_t, patchify_and_embed_omni_H_t, patchify_and_embed_omni_W_t),
                            (cap_end_pos[j], 0, 0),
                            patchify_and_embed_omni_device,
                            noise_val,
                        )
                        x_size.append(patchify_and_embed_omni_size)
                    else:
                        x_len = SEQ_MULTI_OF
                        x_out = torch.zeros((x_len, X_PAD_DIM), dtype=dtype, device=patchify_and_embed_omni_device)
                        x_pos = (
                            self.create_coordinate_grid((1, 1, 1), (0, 0, 0), patchify_and_embed_omni_device)
                            .flatten(0, 2)
                            .repeat(x_len, 1)
                        )
                        patchify_and_embed_omni_x_mask = torch.ones(
                            x_len, dtype=torch.bool, device=patchify_and_embed_omni_device
                        )
                        x_nm = [noise_val] * x_len
                        x_size.append(None)
                    x_feats_list.append(x_out)
                    x_pos_list.append(x_pos)
                    x_mask_list.append(patchify_and_embed_omni_x_mask)
                    x_lens.append(x_len)
                    x_noise.extend(x_nm)

                all_x_out.append(torch.cat(x_feats_list, dim=0))
                all_x_pos_ids.append(torch.cat(x_pos_list, dim=0))
                all_x_pad_mask.append(torch.cat(x_mask_list, dim=0))
                all_x_size.append(x_size)
                all_x_len.append(x_lens)
                all_x_noise_mask.append(x_noise)

                # Process siglip
                if siglip_feats[i] is None:
                    all_sig_len.append([0] * num_images)
                    all_sig_out.append(None)
                else:
                    sig_feats_list, sig_pos_list, sig_mask_list, sig_lens, sig_noise = [], [], [], [], []
                    for j, sig_item in enumerate(siglip_feats[i]):
                        noise_val = image_noise_mask[i][j]
                        if sig_item is not None:
                            sig_H, sig_W, sig_C = sig_item.size()
                            sig_flat = sig_item.permute(2, 0, 1).reshape(sig_H * sig_W, sig_C)
                            sig_out, sig_pos, sig_mask, sig_len, sig_nm = self._pad_with_ids(
                                sig_flat,
                                (1, sig_H, sig_W),
                                (cap_end_pos[j] + 1, 0, 0),
                                patchify_and_embed_omni_device,
                                noise_val,
                            )
                            # Scale position IDs to match x resolution
                            if x_size[j] is not None:
                                sig_pos = sig_pos.float()
                                sig_pos[..., 1] = sig_pos[..., 1] / max(sig_H - 1, 1) * (x_size[j][1] - 1)
                                sig_pos[..., 2] = sig_pos[..., 2] / max(sig_W - 1, 1) * (x_size[j][2] - 1)
                                sig_pos = sig_pos.to(torch.int32)
                        else:
                            sig_len = SEQ_MULTI_OF
                            sig_out = torch.zeros(
                                (sig_len, self.config.siglip_feat_dim),
                                dtype=dtype,
                                device=patchify_and_embed_omni_device,
                            )
                            sig_pos = (
                                self.create_coordinate_grid((1, 1, 1), (0, 0, 0), patchify_and_embed_omni_device)
                                .flatten(0, 2)
                                .repeat(sig_len, 1)
                            )
                            sig_mask = torch.ones(sig_len, dtype=torch.bool, device=patchify_and_embed_omni_device)
                            sig_nm = [noise_val] * sig_len
                        sig_feats_list.append(sig_out)
                        sig_pos_list.append(sig_pos)
                        sig_mask_list.append(sig_mask)
                        sig_lens.append(sig_len)
                        sig_noise.extend(sig_nm)

                    all_sig_out.append(torch.cat(sig_feats_list, dim=0))
                    all_sig_pos_ids.append(torch.cat(sig_pos_list, dim=0))
                    all_sig_pad_mask.append(torch.cat(sig_mask_list, dim=0))
                    all_sig_len.append(sig_lens)
                    all_sig_noise_mask.append(sig_noise)

            # Compute x position offsets
            all_x_pos_offsets = [(sum(all_cap_len[i]), sum(all_cap_len[i]) + sum(all_x_len[i])) for i in range(bsz)]
            x = all_x_out
            cap_feats = patchify_and_embed_omni_all_cap_out
            siglip_feats = all_sig_out
            x_size = all_x_size
            x_pos_ids = all_x_pos_ids
            cap_pos_ids = patchify_and_embed_omni_all_cap_pos_ids
            siglip_pos_ids = all_sig_pos_ids
            x_pad_mask = all_x_pad_mask
            cap_pad_mask = patchify_and_embed_omni_all_cap_pad_mask
            siglip_pad_mask = all_sig_pad_mask
            x_pos_offsets = all_x_pos_offsets
            x_noise_mask = all_x_noise_mask
            cap_noise_mask = all_cap_noise_mask
            siglip_noise_mask = all_sig_noise_mask
        else:
            patchify_and_embed_device = x[0].device
            all_img_out, all_img_size, all_img_pos_ids, all_img_pad_mask = [], [], [], []
            all_cap_out, all_cap_pos_ids, all_cap_pad_mask = [], [], []

            for image, cap_feat in zip(x, cap_feats):
                # Caption
                cap_out, cap_pos_ids, cap_pad_mask, cap_len, patchify_and_embed__ = self._pad_with_ids(
                    cap_feat,
                    (len(cap_feat) + (-len(cap_feat)) % SEQ_MULTI_OF, 1, 1),
                    (1, 0, 0),
                    patchify_and_embed_device,
                )
                all_cap_out.append(cap_out)
                all_cap_pos_ids.append(cap_pos_ids)
                all_cap_pad_mask.append(cap_pad_mask)

                # Image
                img_patches, size, (F_t, H_t, W_t) = self._patchify_image(image, patch_size, f_patch_size)
                img_out, img_pos_ids, img_pad_mask, patchify_and_embed__, patchify_and_embed__ = self._pad_with_ids(
                    img_patches, (F_t, H_t, W_t), (cap_len + 1, 0, 0), patchify_and_embed_device
                )
                all_img_out.append(img_out)
                all_img_size.append(size)
                all_img_pos_ids.append(img_pos_ids)
                all_img_pad_mask.append(img_pad_mask)
            x = all_img_out
            cap_feats = all_cap_out
            x_size = all_img_size
            x_pos_ids = all_img_pos_ids
            cap_pos_ids = all_cap_pos_ids
            x_pad_mask = all_img_pad_mask
            cap_pad_mask = all_cap_pad_mask
            x_pos_offsets = x_noise_mask = cap_noise_mask = siglip_noise_mask = None

        # X embed & refine
        x_seqlens = [len(xi) for xi in x]
        x = self.all_x_embedder[f"{patch_size}-{f_patch_size}"](torch.cat(x, dim=0))  # embed
        x, x_freqs, x_mask, _, x_noise_tensor = self._prepare_sequence(
            list(x.split(x_seqlens, dim=0)), x_pos_ids, x_pad_mask, self.x_pad_token, x_noise_mask, device
        )

        for layer in self.noise_refiner:
            x = layer(x, x_mask, x_freqs, adaln_input, x_noise_tensor, t_noisy, t_clean)

        # Cap embed & refine
        cap_seqlens = [len(ci) for ci in cap_feats]
        cap_feats = self.cap_embedder(torch.cat(cap_feats, dim=0))  # embed
        cap_feats, cap_freqs, cap_mask, _, _ = self._prepare_sequence(
            list(cap_feats.split(cap_seqlens, dim=0)), cap_pos_ids, cap_pad_mask, self.cap_pad_token, None, device
        )

        for layer in self.context_refiner:
            cap_feats = layer(cap_feats, cap_mask, cap_freqs)

        # Siglip embed & refine
        siglip_seqlens = siglip_freqs = None
        if omni_mode and siglip_feats[0] is not None and self.siglip_embedder is not None:
            siglip_seqlens = [len(si) for si in siglip_feats]
            siglip_feats = self.siglip_embedder(torch.cat(siglip_feats, dim=0))  # embed
            siglip_feats, siglip_freqs, siglip_mask, _, _ = self._prepare_sequence(
                list(siglip_feats.split(siglip_seqlens, dim=0)),
                siglip_pos_ids,
                siglip_pad_mask,
                self.siglip_pad_token,
                None,
                device,
            )

            for layer in self.siglip_refiner:
                siglip_feats = layer(siglip_feats, siglip_mask, siglip_freqs)

        # Unified sequence
        build_unified_sequence_bsz = len(x_seqlens)
        unified = []
        unified_freqs = []
        unified_noise_mask = []

        for i in range(build_unified_sequence_bsz):
            build_unified_sequence_x_len, build_unified_sequence_cap_len = x_seqlens[i], cap_seqlens[i]

            if omni_mode:
                # Omni: [cap, x, siglip]
                if siglip_feats is not None and siglip_seqlens is not None:
                    build_unified_sequence_sig_len = siglip_seqlens[i]
                    unified.append(
                        torch.cat(
                            [
                                cap_feats[i][:build_unified_sequence_cap_len],
                                x[i][:build_unified_sequence_x_len],
                                siglip_feats[i][:build_unified_sequence_sig_len],
                            ]
                        )
                    )
                    unified_freqs.append(
                        torch.cat(
                            [
                                cap_freqs[i][:build_unified_sequence_cap_len],
                                x_freqs[i][:build_unified_sequence_x_len],
                                siglip_freqs[i][:build_unified_sequence_sig_len],
                            ]
                        )
                    )
                    unified_noise_mask.append(
                        torch.tensor(
                            cap_noise_mask[i] + x_noise_mask[i] + siglip_noise_mask[i], dtype=torch.long, device=device
                        )
                    )
                else:
                    unified.append(
                        torch.cat([cap_feats[i][:build_unified_sequence_cap_len], x[i][:build_unified_sequence_x_len]])
                    )
                    unified_freqs.append(
                        torch.cat(
                            [cap_freqs[i][:build_unified_sequence_cap_len], x_freqs[i][:build_unified_sequence_x_len]]
                        )
                    )
                    unified_noise_mask.append(
                        torch.tensor(cap_noise_mask[i] + x_noise_mask[i], dtype=torch.long, device=device)
                    )
            else:
                # Basic: [x, cap]
                unified.append(
                    torch.cat([x[i][:build_unified_sequence_x_len], cap_feats[i][:build_unified_sequence_cap_len]])
                )
                unified_freqs.append(
                    torch.cat(
                        [x_freqs[i][:build_unified_sequence_x_len], cap_freqs[i][:build_unified_sequence_cap_len]]
                    )
                )

        # Compute unified seqlens
        if omni_mode:
            if siglip_feats is not None and siglip_seqlens is not None:
                unified_seqlens = [a + b + c for a, b, c in zip(cap_seqlens, x_seqlens, siglip_seqlens)]
            else:
                unified_seqlens = [a + b for a, b in zip(cap_seqlens, x_seqlens)]
        else:
            unified_seqlens = [a + b for a, b in zip(x_seqlens, cap_seqlens)]

        max_seqlen = max(unified_seqlens)

        # Pad to batch
        unified = torch.nn.utils.rnn.pad_sequence(unified, batch_first=True, padding_value=0.0)
        unified_freqs = torch.nn.utils.rnn.pad_sequence(unified_freqs, batch_first=True, padding_value=0.0)

        # Attention mask
        if all(seq == max_seqlen for seq in unified_seqlens):
            attn_mask = None
        else:
            attn_mask = torch.zeros((build_unified_sequence_bsz, max_seqlen), dtype=torch.bool, device=device)
            for i, seq_len in enumerate(unified_seqlens):
                attn_mask[i, :seq_len] = 1

        # Noise mask
        noise_mask_tensor = None
        if omni_mode:
            noise_mask_tensor = torch.nn.utils.rnn.pad_sequence(unified_noise_mask, batch_first=True, padding_value=0)[
                :, : unified.shape[1]
            ]
        refuse_cache_dit(self, controlnet_block_samples)
        whole_noise_mask_tensor = noise_mask_tensor
        if noise_mask_tensor is not None:
            noise_mask_tensor = self.shard_noise_mask_tensor(noise_mask_tensor)
        unified_freqs = self.shard_unified_freqs(unified_freqs)
        unified = self.shard_unified(unified)

        # Main transformer layers
        for layer_idx, layer in enumerate(self.layers):
            unified = layer(unified, attn_mask, unified_freqs, adaln_input, noise_mask_tensor, t_noisy, t_clean)
            if controlnet_block_samples is not None and layer_idx in controlnet_block_samples:
                unified = unified + controlnet_block_samples[layer_idx]
        unified = self.gather_unified(unified)
        noise_mask_tensor = whole_noise_mask_tensor

        unified = (
            self.all_final_layer[f"{patch_size}-{f_patch_size}"](
                unified, noise_mask=noise_mask_tensor, c_noisy=t_noisy, c_clean=t_clean
            )
            if omni_mode
            else self.all_final_layer[f"{patch_size}-{f_patch_size}"](unified, c=adaln_input)
        )

        # Unpatchify
        x = self.unpatchify(list(unified.unbind(dim=0)), x_size, patch_size, f_patch_size, x_pos_offsets)

        return (x,) if not return_dict else Transformer2DModelOutput(sample=x)

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
