# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.ErnieImageTransformer2DModel (models/transformers/transformer_ernie_image.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Tuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import RMSNorm
from diffusers.utils.outputs import BaseOutput
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


@dataclass
class ErnieImageTransformer2DModelOutput(BaseOutput):
    sample: torch.Tensor


def rope(pos: torch.Tensor, dim: int, theta: int) -> torch.Tensor:
    assert dim % 2 == 0
    scale = torch.arange(0, dim, 2, dtype=torch.float32, device=pos.device) / dim
    omega = 1.0 / (theta**scale)
    # Disable autocast so the position-id einsum runs in float32: under an ambient autocast it would run in
    # bfloat16, which cannot represent consecutive integers past 256, so position ids beyond that point would
    # collapse onto the same frequency and degrade the rotary embedding.
    with torch.autocast(device_type=pos.device.type, enabled=False):
        out = torch.einsum("...n,d->...nd", pos, omega)
    return out.float()


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


class ErnieImagePatchEmbedDynamic(nn.Module):
    def __init__(self, in_channels: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        batch_size, dim, height, width = x.shape
        return x.reshape(batch_size, dim, height * width).transpose(1, 2).contiguous()


class ErnieImageEmbedND3(nn.Module):
    def __init__(self, theta: int, axes_dim: Tuple[int, int, int]):
        super().__init__()
        self.theta = theta
        self.axes_dim = list(axes_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        emb = torch.cat([rope(ids[..., i], self.axes_dim[i], self.theta) for i in range(3)], dim=-1)
        emb = emb.unsqueeze(2)  # [B, S, 1, head_dim//2]
        return torch.stack([emb, emb], dim=-1).reshape(*emb.shape[:-1], -1)  # [B, S, 1, head_dim]


class ErnieImageAttention(nn.Module):
    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        bias: bool = False,
        qk_norm: str = "rms_norm",
        out_bias: bool = True,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.inner_dim = dim_head * heads
        self.heads = heads

        self.to_qkv = QKVParallelLinear(
            query_dim,
            dim_head,
            self.heads,
            bias=bias,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.to_qkv",
        )

        # QK Norm
        if qk_norm == "layer_norm":
            self.norm_q = nn.LayerNorm(dim_head, eps=eps, elementwise_affine=elementwise_affine)
            self.norm_k = nn.LayerNorm(dim_head, eps=eps, elementwise_affine=elementwise_affine)
        elif qk_norm == "rms_norm":
            self.norm_q = nn.RMSNorm(dim_head, eps=eps, elementwise_affine=elementwise_affine)
            self.norm_k = nn.RMSNorm(dim_head, eps=eps, elementwise_affine=elementwise_affine)
        else:
            raise ValueError(
                f"unknown qk_norm: {qk_norm}. Should be one of None, 'layer_norm', 'fp32_layer_norm', 'layer_norm_across_heads', 'rms_norm', 'rms_norm_across_heads', 'l2'."
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

        query = query.unflatten(-1, (self.heads, -1))
        key = key.unflatten(-1, (self.heads, -1))
        value = value.unflatten(-1, (self.heads, -1))

        # Apply Norms
        query = self.norm_q(query)
        key = self.norm_k(key)

        # Apply RoPE: same rotate_half logic as Megatron _apply_rotary_pos_emb_bshd (rotary_interleaved=False)
        # x_in: [B, S, heads, head_dim], freqs_cis: [B, S, 1, head_dim] with angles [θ0,θ0,θ1,θ1,...]
        def apply_rotary_emb(x_in: torch.Tensor, image_rotary_emb: torch.Tensor) -> torch.Tensor:
            rot_dim = image_rotary_emb.shape[-1]
            x, x_pass = x_in[..., :rot_dim], x_in[..., rot_dim:]
            cos_ = torch.cos(image_rotary_emb).to(x.dtype)
            sin_ = torch.sin(image_rotary_emb).to(x.dtype)
            # Non-interleaved rotate_half: [-x2, x1]
            x1, x2 = x.chunk(2, dim=-1)
            x_rotated = torch.cat((-x2, x1), dim=-1)
            return torch.cat((x * cos_ + x_rotated * sin_, x_pass), dim=-1)

        query = apply_rotary_emb(query, image_rotary_emb)
        key = apply_rotary_emb(key, image_rotary_emb)

        # Cast to correct dtype
        dtype = query.dtype
        query, key = query.to(dtype), key.to(dtype)

        # From [batch, seq_len] to [batch, 1, 1, seq_len] -> broadcast to [batch, heads, seq_len, seq_len]
        if attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]

        # Compute joint attention
        hidden_states = self.attn(query, key, value, attn_metadata=sequence_metadata(query, attention_mask, "x"))

        # Reshape back
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(dtype)
        output = self.to_out[0](hidden_states)

        return output


class ErnieImageFeedForward(nn.Module):
    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        # Separate gate and up projections (matches converted weights)
        self.gate_proj = ColumnParallelLinear(
            hidden_size,
            ffn_hidden_size,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_proj",
        )
        self.up_proj = ColumnParallelLinear(
            hidden_size,
            ffn_hidden_size,
            gather_output=False,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.up_proj",
        )
        self.linear_fc2 = RowParallelLinear(
            ffn_hidden_size,
            hidden_size,
            input_is_parallel=True,
            bias=False,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.linear_fc2",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.up_proj(x) * F.gelu(self.gate_proj(x)))


class ErnieImageSharedAdaLNBlock(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_hidden_size: int,
        eps: float = 1e-6,
        qk_layernorm: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.adaLN_sa_ln = RMSNorm(hidden_size, eps=eps)
        self.self_attention = ErnieImageAttention(
            query_dim=hidden_size,
            dim_head=hidden_size // num_heads,
            heads=num_heads,
            qk_norm="rms_norm" if qk_layernorm else None,
            eps=eps,
            bias=False,
            out_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.self_attention",
        )
        self.adaLN_mlp_ln = RMSNorm(hidden_size, eps=eps)
        self.mlp = ErnieImageFeedForward(
            hidden_size, ffn_hidden_size, quant_config=quant_config, prefix=f"{prefix}.mlp"
        )

    def forward(
        self,
        x,
        rotary_pos_emb,
        temb: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb
        residual = x
        x = self.adaLN_sa_ln(x)
        x = (x.float() * (1 + scale_msa.float()) + shift_msa.float()).to(x.dtype)
        x_bsh = x.permute(1, 0, 2)  # [S, B, H] → [B, S, H] for diffusers Attention (batch-first)
        attn_out = self.self_attention(x_bsh, attention_mask=attention_mask, image_rotary_emb=rotary_pos_emb)
        attn_out = attn_out.permute(1, 0, 2)  # [B, S, H] → [S, B, H]
        x = residual + (gate_msa.float() * attn_out.float()).to(x.dtype)
        residual = x
        x = self.adaLN_mlp_ln(x)
        x = (x.float() * (1 + scale_mlp.float()) + shift_mlp.float()).to(x.dtype)
        return residual + (gate_mlp.float() * self.mlp(x).float()).to(x.dtype)


class ErnieImageAdaLNContinuous(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=eps)
        self.linear = nn.Linear(hidden_size, hidden_size * 2)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(conditioning).chunk(2, dim=-1)
        x = self.norm(x)
        # Broadcast conditioning to sequence dimension
        x = x * (1 + scale.unsqueeze(0)) + shift.unsqueeze(0)
        return x


class ErnieImageTransformer2DModel(nn.Module):
    _repeated_blocks = ["ErnieImageSharedAdaLNBlock"]
    _layerwise_offload_blocks_attrs = ["layers"]
    _hsdp_shard_conditions = [lambda name, module: name.startswith(("layers.",)) and name.rpartition(".")[2].isdigit()]
    stacked_params_mapping = [(".to_qkv", ".to_q", "q"), (".to_qkv", ".to_k", "k"), (".to_qkv", ".to_v", "v")]
    packed_modules_mapping = {"to_qkv": ["to_q", "to_k", "to_v"]}
    _sp_plan = {
        "shard_gate_mlp": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_gate_msa": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_rotary_pos_emb": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_scale_mlp": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_scale_msa": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_shift_mlp": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_shift_msa": {"input": SequenceParallelInput(split_dim=-3, auto_pad=True)},
        "shard_x": {
            0: SequenceParallelInput(split_dim=0, expected_dims=3, split_output=True, auto_pad=True, shard_group="x")
        },
        "gather_x": SequenceParallelOutput(gather_dim=0, expected_dims=3, shard_group="x"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        hidden_size: int = 3072,
        num_attention_heads: int = 24,
        num_layers: int = 24,
        ffn_hidden_size: int = 8192,
        in_channels: int = 128,
        out_channels: int = 128,
        patch_size: int = 1,
        text_in_dim: int = 2560,
        rope_theta: int = 256,
        rope_axes_dim: Tuple[int, int, int] = (32, 48, 48),
        eps: float = 1e-6,
        qk_layernorm: bool = True,
    ):
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_layers=num_layers,
            ffn_hidden_size=ffn_hidden_size,
            in_channels=in_channels,
            out_channels=out_channels,
            patch_size=patch_size,
            text_in_dim=text_in_dim,
            rope_theta=rope_theta,
            rope_axes_dim=rope_axes_dim,
            eps=eps,
            qk_layernorm=qk_layernorm,
        )
        self.hidden_size = hidden_size
        self.num_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.num_layers = num_layers
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.text_in_dim = text_in_dim

        self.x_embedder = ErnieImagePatchEmbedDynamic(in_channels, hidden_size, patch_size)
        self.text_proj = nn.Linear(text_in_dim, hidden_size, bias=False) if text_in_dim != hidden_size else None
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=False, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(hidden_size, hidden_size)
        self.pos_embed = ErnieImageEmbedND3(theta=rope_theta, axes_dim=rope_axes_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        torch.nn.init.zeros_(self.adaLN_modulation[-1].weight)
        torch.nn.init.zeros_(self.adaLN_modulation[-1].bias)
        self.layers = nn.ModuleList(
            [
                ErnieImageSharedAdaLNBlock(
                    hidden_size,
                    num_attention_heads,
                    ffn_hidden_size,
                    eps,
                    qk_layernorm=qk_layernorm,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"layers.{i}"),
                )
                for i in range(num_layers)
            ]
        )
        self.final_norm = ErnieImageAdaLNContinuous(hidden_size, eps)
        self.final_linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        torch.nn.init.zeros_(self.final_linear.weight)
        torch.nn.init.zeros_(self.final_linear.bias)
        self.shard_gate_mlp = nn.Identity()
        self.shard_gate_msa = nn.Identity()
        self.shard_rotary_pos_emb = nn.Identity()
        self.shard_scale_mlp = nn.Identity()
        self.shard_scale_msa = nn.Identity()
        self.shard_shift_mlp = nn.Identity()
        self.shard_shift_msa = nn.Identity()
        self.shard_x = nn.Identity()
        self.gather_x = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        # encoder_hidden_states: List[torch.Tensor],
        text_bth: torch.Tensor,
        text_lens: torch.Tensor,
        return_dict: bool = True,
    ):
        """
        The [`ErnieImageTransformer2DModel`] forward method.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Input `hidden_states`.
            timestep (`torch.LongTensor`):
                Used to indicate denoising step.
            text_bth (`torch.Tensor`):
                Conditional text embeddings (embeddings computed from the input conditions such as prompts) to use,
                shaped `(batch_size, text_length, embed_dims)`.
            text_lens (`torch.Tensor`):
                Per-sample text sequence lengths used to build the attention mask.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~models.transformer_2d.Transformer2DModelOutput`] instead of a plain
                tuple.
        """
        device, dtype = hidden_states.device, hidden_states.dtype
        B, C, H, W = hidden_states.shape
        p, Hp, Wp = self.patch_size, H // self.patch_size, W // self.patch_size
        N_img = Hp * Wp

        img_sbh = self.x_embedder(hidden_states).transpose(0, 1).contiguous()
        # text_bth, text_lens = self._pad_text(encoder_hidden_states, device, dtype)
        if self.text_proj is not None and text_bth.numel() > 0:
            text_bth = self.text_proj(text_bth)
        Tmax = text_bth.shape[1]
        text_sbh = text_bth.transpose(0, 1).contiguous()

        x = torch.cat([img_sbh, text_sbh], dim=0)
        S = x.shape[0]

        # Position IDs
        text_ids = (
            torch.cat(
                [
                    torch.arange(Tmax, device=device, dtype=torch.float32).view(1, Tmax, 1).expand(B, -1, -1),
                    torch.zeros((B, Tmax, 2), device=device),
                ],
                dim=-1,
            )
            if Tmax > 0
            else torch.zeros((B, 0, 3), device=device)
        )
        grid_yx = torch.stack(
            torch.meshgrid(
                torch.arange(Hp, device=device, dtype=torch.float32),
                torch.arange(Wp, device=device, dtype=torch.float32),
                indexing="ij",
            ),
            dim=-1,
        ).reshape(-1, 2)
        image_ids = torch.cat(
            [text_lens.float().view(B, 1, 1).expand(-1, N_img, -1), grid_yx.view(1, N_img, 2).expand(B, -1, -1)],
            dim=-1,
        )
        rotary_pos_emb = self.pos_embed(torch.cat([image_ids, text_ids], dim=1))

        # Attention mask: True = valid (attend), False = padding (mask out), matches sdpa bool convention
        valid_text = (
            torch.arange(Tmax, device=device).view(1, Tmax) < text_lens.view(B, 1)
            if Tmax > 0
            else torch.zeros((B, 0), device=device, dtype=torch.bool)
        )
        attention_mask = torch.cat([torch.ones((B, N_img), device=device, dtype=torch.bool), valid_text], dim=1)[
            :, None, None, :
        ]

        # AdaLN
        sample = self.time_proj(timestep)
        sample = sample.to(dtype=dtype)
        c = self.time_embedding(sample)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = [
            t.unsqueeze(0).expand(S, -1, -1).contiguous() for t in self.adaLN_modulation(c).chunk(6, dim=-1)
        ]
        gate_mlp = self.shard_gate_mlp(gate_mlp)
        gate_msa = self.shard_gate_msa(gate_msa)
        rotary_pos_emb = self.shard_rotary_pos_emb(rotary_pos_emb)
        scale_mlp = self.shard_scale_mlp(scale_mlp)
        scale_msa = self.shard_scale_msa(scale_msa)
        shift_mlp = self.shard_shift_mlp(shift_mlp)
        shift_msa = self.shard_shift_msa(shift_msa)
        x = self.shard_x(x)
        for layer in self.layers:
            temb = [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp]
            x = layer(x, rotary_pos_emb, temb, attention_mask)
        x = self.gather_x(x)
        x = self.final_norm(x, c).type_as(x)
        patches = self.final_linear(x)[:N_img].transpose(0, 1).contiguous()
        output = (
            patches.view(B, Hp, Wp, p, p, self.out_channels)
            .permute(0, 5, 1, 3, 2, 4)
            .contiguous()
            .view(B, self.out_channels, H, W)
        )

        return ErnieImageTransformer2DModelOutput(sample=output) if return_dict else (output,)

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
