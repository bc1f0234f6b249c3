# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.JoyImageEditPlusTransformer3DModel (models/transformers/transformer_joyimage_edit_plus.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from cache_dit import ForwardPattern
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
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


def _apply_rotary_emb_batched(
    xq: torch.Tensor,
    xk: torch.Tensor,
    freqs_cis: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE for batched [B, S, D] freqs."""
    cos, sin = freqs_cis[0].to(xq.device), freqs_cis[1].to(xq.device)

    # batched: [B, S, D] -> [B, S, 1, D]
    cos = cos.unsqueeze(2)
    sin = sin.unsqueeze(2)

    def _rotate_half(x):
        x_real, x_imag = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack([-x_imag, x_real], dim=-1).flatten(3)

    xq_out = (xq.float() * cos + _rotate_half(xq) * sin).type_as(xq)
    xk_out = (xk.float() * cos + _rotate_half(xk) * sin).type_as(xk)
    return xq_out, xk_out


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


def mask_if_padded(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask, or None where it masks nothing: asked once for all layers. One that is added to scores stays."""
    return None if mask is not None and not mask.is_floating_point() and mask.all() else mask


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


# Copied from diffusers.models.transformers.transformer_joyimage.JoyImageTimeTextImageEmbedding with JoyImage->JoyImageEditPlus
class JoyImageEditPlusTimeTextImageEmbedding(nn.Module):
    def __init__(
        self,
        dim: int,
        time_freq_dim: int,
        time_proj_dim: int,
        text_embed_dim: int,
    ):
        super().__init__()

        self.timesteps_proj = Timesteps(num_channels=time_freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(in_channels=time_freq_dim, time_embed_dim=dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, time_proj_dim)
        self.text_embedder = PixArtAlphaTextProjection(text_embed_dim, dim, act_fn="gelu_tanh")

    def forward(
        self,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ):
        timestep = self.timesteps_proj(timestep)

        time_embedder_dtype = next(iter(self.time_embedder.parameters())).dtype
        if timestep.dtype != time_embedder_dtype and time_embedder_dtype != torch.int8:
            timestep = timestep.to(time_embedder_dtype)
        temb = self.time_embedder(timestep).type_as(encoder_hidden_states)
        timestep_proj = self.time_proj(self.act_fn(temb))

        encoder_hidden_states = self.text_embedder(encoder_hidden_states)

        return temb, timestep_proj, encoder_hidden_states


# Copied from diffusers.models.transformers.transformer_joyimage.JoyImageModulate with JoyImage->JoyImageEditPlus
class JoyImageEditPlusModulate(nn.Module):
    """Wan-style learnable modulation table.

    Produces `factor` modulation vectors by adding the conditioning signal to a learnable parameter table.
    """

    def __init__(
        self,
        hidden_size: int,
        factor: int,
    ):
        super().__init__()
        self.factor = factor
        self.modulate_table = nn.Parameter(
            torch.zeros(1, factor, hidden_size, dtype=None, device=None) / hidden_size**0.5,
            requires_grad=True,
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.ndim != 3:
            x = x.unsqueeze(1)
        return [o.squeeze(1) for o in (self.modulate_table + x).chunk(self.factor, dim=1)]


class JoyImageEditPlusGELU(nn.Module):
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


class JoyImageEditPlusFeedForward(nn.Module):
    """`FeedForward` of Diffusers as this model uses it."""

    def __init__(self, dim: int, inner_dim=None, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        act_fn = JoyImageEditPlusGELU(dim, inner_dim, quant_config=quant_config, prefix=f"{prefix}.net.0")

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


class JoyImageEditPlusAttention(nn.Module):
    """Joint attention module for JoyImage Edit Plus double-stream blocks."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        eps: float = 1e-6,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()

        self.heads = num_attention_heads
        inner_dim = num_attention_heads * attention_head_dim

        self.img_attn_qkv = MergedColumnParallelLinear(
            dim,
            [inner_dim] * 3,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.img_attn_qkv",
        )
        self.img_attn_q_norm = nn.RMSNorm(attention_head_dim, eps=eps)
        self.img_attn_k_norm = nn.RMSNorm(attention_head_dim, eps=eps)
        self.img_attn_proj = RowParallelLinear(
            inner_dim,
            dim,
            input_is_parallel=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.img_attn_proj",
        )

        self.txt_attn_qkv = MergedColumnParallelLinear(
            dim,
            [inner_dim] * 3,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.txt_attn_qkv",
        )
        self.txt_attn_q_norm = nn.RMSNorm(attention_head_dim, eps=eps)
        self.txt_attn_k_norm = nn.RMSNorm(attention_head_dim, eps=eps)
        self.txt_attn_proj = RowParallelLinear(
            inner_dim,
            dim,
            input_is_parallel=True,
            bias=True,
            return_bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.txt_attn_proj",
        )
        self.heads = divide(self.heads, get_tensor_model_parallel_world_size())
        self.attn = Attention(
            num_heads=self.heads,
            head_size=attention_head_dim,
            softmax_scale=attention_head_dim**-0.5,
            causal=False,
            role="cross",
            impl_overrides={"FLASH_ATTN": MaskedFlashAttention},
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:

        heads = self.heads

        img_qkv = self.img_attn_qkv(hidden_states)
        img_query, img_key, img_value = img_qkv.chunk(3, dim=-1)

        txt_qkv = self.txt_attn_qkv(encoder_hidden_states)
        txt_query, txt_key, txt_value = txt_qkv.chunk(3, dim=-1)

        img_query = img_query.unflatten(-1, (heads, -1))
        img_key = img_key.unflatten(-1, (heads, -1))
        img_value = img_value.unflatten(-1, (heads, -1))

        txt_query = txt_query.unflatten(-1, (heads, -1))
        txt_key = txt_key.unflatten(-1, (heads, -1))
        txt_value = txt_value.unflatten(-1, (heads, -1))

        img_query = self.img_attn_q_norm(img_query)
        img_key = self.img_attn_k_norm(img_key)
        txt_query = self.txt_attn_q_norm(txt_query)
        txt_key = self.txt_attn_k_norm(txt_key)

        img_query, img_key = _apply_rotary_emb_batched(img_query, img_key, image_rotary_emb)

        joint_query = torch.cat([img_query, txt_query], dim=1)
        joint_key = torch.cat([img_key, txt_key], dim=1)
        joint_value = torch.cat([img_value, txt_value], dim=1)

        joint_hidden_states = self.attn(
            joint_query,
            joint_key,
            joint_value,
            attn_metadata=sequence_metadata(joint_query, attention_mask, "img", "txt"),
        )

        joint_hidden_states = joint_hidden_states.flatten(2, 3)
        joint_hidden_states = joint_hidden_states.to(joint_query.dtype)

        img_attn_output = joint_hidden_states[:, : hidden_states.shape[1], :]
        txt_attn_output = joint_hidden_states[:, hidden_states.shape[1] :, :]

        img_attn_output = self.img_attn_proj(img_attn_output)
        txt_attn_output = self.txt_attn_proj(txt_attn_output)

        return img_attn_output, txt_attn_output


class JoyImageEditPlusTransformerBlock(nn.Module):
    """Double-stream transformer block for JoyImage Edit Plus."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_width_ratio: float = 4.0,
        eps: float = 1e-6,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        mlp_hidden_dim = int(dim * mlp_width_ratio)

        # image stream
        self.img_mod = JoyImageEditPlusModulate(dim, factor=6)
        self.img_norm1 = FP32LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.img_norm2 = FP32LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.img_mlp = JoyImageEditPlusFeedForward(
            dim, inner_dim=mlp_hidden_dim, quant_config=quant_config, prefix=f"{prefix}.img_mlp"
        )

        # text stream
        self.txt_mod = JoyImageEditPlusModulate(dim, factor=6)
        self.txt_norm1 = FP32LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.txt_norm2 = FP32LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.txt_mlp = JoyImageEditPlusFeedForward(
            dim, inner_dim=mlp_hidden_dim, quant_config=quant_config, prefix=f"{prefix}.txt_mlp"
        )

        # joint attention
        self.attn = JoyImageEditPlusAttention(
            dim, num_attention_heads, attention_head_dim, eps=eps, quant_config=quant_config, prefix=f"{prefix}.attn"
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # modulation
        (
            img_mod1_shift,
            img_mod1_scale,
            img_mod1_gate,
            img_mod2_shift,
            img_mod2_scale,
            img_mod2_gate,
        ) = self.img_mod(temb)
        (
            txt_mod1_shift,
            txt_mod1_scale,
            txt_mod1_gate,
            txt_mod2_shift,
            txt_mod2_scale,
            txt_mod2_gate,
        ) = self.txt_mod(temb)

        # --- attention ---
        img_normed = self.img_norm1(hidden_states)
        txt_normed = self.txt_norm1(encoder_hidden_states)
        img_modulated = img_normed * (1 + img_mod1_scale.unsqueeze(1)) + img_mod1_shift.unsqueeze(1)
        txt_modulated = txt_normed * (1 + txt_mod1_scale.unsqueeze(1)) + txt_mod1_shift.unsqueeze(1)

        img_attn, txt_attn = self.attn(
            hidden_states=img_modulated,
            encoder_hidden_states=txt_modulated,
            image_rotary_emb=image_rotary_emb,
            attention_mask=attention_mask,
        )

        hidden_states = hidden_states + img_attn * img_mod1_gate.unsqueeze(1)
        encoder_hidden_states = encoder_hidden_states + txt_attn * txt_mod1_gate.unsqueeze(1)

        # --- FFN ---
        img_ffn_normed = self.img_norm2(hidden_states)
        txt_ffn_normed = self.txt_norm2(encoder_hidden_states)
        img_ffn_input = img_ffn_normed * (1 + img_mod2_scale.unsqueeze(1)) + img_mod2_shift.unsqueeze(1)
        txt_ffn_input = txt_ffn_normed * (1 + txt_mod2_scale.unsqueeze(1)) + txt_mod2_shift.unsqueeze(1)
        img_ffn_output = self.img_mlp(img_ffn_input)
        txt_ffn_output = self.txt_mlp(txt_ffn_input)
        hidden_states = hidden_states + img_ffn_output * img_mod2_gate.unsqueeze(1)
        encoder_hidden_states = encoder_hidden_states + txt_ffn_output * txt_mod2_gate.unsqueeze(1)

        return hidden_states, encoder_hidden_states


class JoyImageEditPlusTransformer3DModel(nn.Module):
    r"""
    JoyImage Edit Plus Transformer for multi-image editing.

    Uses a patchify+padding approach where each reference image and the target noise are independently patchified and
    concatenated into a flat patch sequence. Supports variable-resolution reference images.

    Input format: `[B, max_patches, C, pt, ph, pw]` (6D padded patches).

    Args:
        patch_size (`list`, defaults to `[1, 2, 2]`):
            Patch size for patchifying the latent input along `(t, h, w)` dimensions.
        in_channels (`int`, defaults to `16`):
            The number of channels in the input latent.
        out_channels (`int`, *optional*, defaults to `None`):
            The number of channels in the output. If not specified, it defaults to `in_channels`.
        hidden_size (`int`, defaults to `3072`):
            The dimensionality of the hidden representations.
        num_attention_heads (`int`, defaults to `24`):
            The number of attention heads.
        text_dim (`int`, defaults to `4096`):
            The dimensionality of the text encoder output.
        mlp_width_ratio (`float`, defaults to `4.0`):
            The ratio of MLP hidden dimension to `hidden_size`.
        num_layers (`int`, defaults to `20`):
            The number of double-stream transformer blocks.
        rope_dim_list (`list[int]`, defaults to `[16, 56, 56]`):
            The dimensions for 3D rotary positional embeddings along `(t, h, w)`.
        rope_type (`str`, defaults to `"rope"`):
            The type of rotary positional embedding.
        theta (`int`, defaults to `256`):
            The base frequency for rotary embeddings.
    """

    _repeated_blocks = ["JoyImageEditPlusTransformerBlock"]
    _layerwise_offload_blocks_attrs = ["double_blocks"]
    _hsdp_shard_conditions = [
        lambda name, module: name.startswith(("double_blocks.",)) and name.rpartition(".")[2].isdigit()
    ]
    _cache_dit_adapter_config = CacheDiTAdapterConfig(
        block_forward_patterns={"double_blocks": ForwardPattern.Pattern_0}
    )
    _keep_in_fp32_modules = [
        "time_embedder",
        "norm1",
        "norm2",
        "norm_out",
    ]
    _sp_plan = {
        "shard_vis_freqs": {
            "input": [
                SequenceParallelInput(split_dim=-2, auto_pad=True),
                SequenceParallelInput(split_dim=-2, auto_pad=True),
            ]
        },
        "shard_img": {
            0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True, auto_pad=True, shard_group="img")
        },
        "shard_txt": {"input": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True, shard_group="txt")},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, shard_group="img"),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        patch_size: list[int] = [1, 2, 2],
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 3072,
        num_attention_heads: int = 24,
        text_dim: int = 4096,
        mlp_width_ratio: float = 4.0,
        num_layers: int = 20,
        rope_dim_list: list[int] = [16, 56, 56],
        rope_type: str = "rope",
        theta: int = 256,
    ):
        super().__init__()
        self.od_config = od_config
        self.config = SimpleNamespace(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            text_dim=text_dim,
            mlp_width_ratio=mlp_width_ratio,
            num_layers=num_layers,
            rope_dim_list=rope_dim_list,
            rope_type=rope_type,
            theta=theta,
        )

        self.out_channels = out_channels or in_channels

        attention_head_dim = hidden_size // num_attention_heads
        if hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be divisible by num_attention_heads ({num_attention_heads})"
            )

        self.img_in = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

        self.condition_embedder = JoyImageEditPlusTimeTextImageEmbedding(
            dim=hidden_size,
            time_freq_dim=256,
            time_proj_dim=hidden_size * 6,
            text_embed_dim=text_dim,
        )

        self.double_blocks = nn.ModuleList(
            [
                JoyImageEditPlusTransformerBlock(
                    dim=hidden_size,
                    num_attention_heads=num_attention_heads,
                    attention_head_dim=attention_head_dim,
                    mlp_width_ratio=mlp_width_ratio,
                    quant_config=quant_config,
                    prefix=maybe_prefix(prefix, f"double_blocks.{i}"),
                )
                for i in range(num_layers)
            ]
        )

        self.norm_out = FP32LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(hidden_size, self.out_channels * math.prod(patch_size))

        # Set batched-RoPE-aware attention processor on all blocks
        for block in self.double_blocks:
            pass
        self.shard_vis_freqs = nn.Identity()
        self.shard_img = nn.Identity()
        self.shard_txt = nn.Identity()
        # Sensitive modules stay in float32, whatever the model's dtype.
        for name, param in self.named_parameters():
            if any(part in self._keep_in_fp32_modules for part in name.split(".")):
                param.data = param.data.to(torch.float32)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        shape_list: list[list[tuple[int, int, int]]] = None,
        return_dict: bool = True,
    ) -> torch.Tensor | tuple:
        """
        Args:
            hidden_states: [B, max_patches, C, pt, ph, pw] - patchified latent input.
            timestep: [B] - diffusion timestep.
            encoder_hidden_states: [B, L, D] - text encoder outputs.
            encoder_hidden_states_mask: [B, L] - attention mask for text tokens.
            shape_list: Per-sample list of (t, h, w) tuples for each component (target + references).
            return_dict: Whether to return a dict or tuple.

        Returns:
            If `return_dict` is True, an [`~models.modeling_outputs.Transformer2DModelOutput`] is returned, otherwise a
            `tuple` where the first element is the sample tensor.
        """
        batch_size, max_num_patches, channels, pt, ph, pw = hidden_states.shape
        device = hidden_states.device

        # 1. Condition embeddings
        _, vec, txt = self.condition_embedder(timestep, encoder_hidden_states)
        vec = vec.unflatten(1, (6, -1))

        # 2. Patchify via Conv3d: flatten (B, N) -> apply conv -> reshape back
        x = hidden_states.reshape(batch_size * max_num_patches, channels, pt, ph, pw)
        x = self.img_in(x)  # (B*N, D, 1, 1, 1)
        img = x.reshape(batch_size, max_num_patches, -1)

        # 3. Build per-component RoPE with temporal offsets
        sample_cos_list, sample_sin_list = [], []

        for i in range(batch_size):
            s_cos_parts, s_sin_parts = [], []
            current_t_offset = 0

            for thw in shape_list[i]:
                t, h, w = thw
                start = (current_t_offset, 0, 0)
                stop = (current_t_offset + t, h, w)
                head_dim = self.config.hidden_size // self.config.num_attention_heads
                rope_dim_list = self.config.rope_dim_list
                if rope_dim_list is None:
                    rope_dim_list = [head_dim // 3] * 3

                grids = []
                for i in range(3):
                    grids.append(torch.arange(start[i], stop[i], dtype=torch.float32))

                mesh = torch.stack(torch.meshgrid(*grids, indexing="ij"), dim=0)

                cos_parts, sin_parts = [], []
                for i, dim in enumerate(rope_dim_list):
                    pos = mesh[i].reshape(-1)
                    freqs = 1.0 / (
                        self.config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32)[: (dim // 2)] / dim)
                    )
                    angles = torch.outer(pos, freqs)
                    cos_parts.append(angles.cos().repeat_interleave(2, dim=1))
                    sin_parts.append(angles.sin().repeat_interleave(2, dim=1))
                cos_emb = torch.cat(cos_parts, dim=1)
                sin_emb = torch.cat(sin_parts, dim=1)
                s_cos_parts.append(cos_emb)
                s_sin_parts.append(sin_emb)
                current_t_offset += t

            s_cos = torch.cat(s_cos_parts, dim=0).to(device)
            s_sin = torch.cat(s_sin_parts, dim=0).to(device)

            actual_len = s_cos.shape[0]
            pad_len = max_num_patches - actual_len
            if pad_len > 0:
                s_cos = F.pad(s_cos, (0, 0, 0, pad_len), value=1.0)
                s_sin = F.pad(s_sin, (0, 0, 0, pad_len), value=0.0)

            sample_cos_list.append(s_cos)
            sample_sin_list.append(s_sin)

        vis_freqs = (torch.stack(sample_cos_list), torch.stack(sample_sin_list))

        # 4. Build attention mask: [B, 1, 1, img_seq + txt_seq]
        attention_mask = None
        if encoder_hidden_states_mask is not None:
            img_mask = torch.zeros(batch_size, max_num_patches, device=device, dtype=encoder_hidden_states_mask.dtype)
            for i in range(batch_size):
                actual_len = sum(t * h * w for t, h, w in shape_list[i])
                img_mask[i, :actual_len] = 1.0
            full_mask = torch.cat([img_mask, encoder_hidden_states_mask], dim=1)
            attention_mask = full_mask.unsqueeze(1).unsqueeze(1).bool()
        attention_mask = mask_if_padded(attention_mask)
        vis_freqs = self.shard_vis_freqs(vis_freqs)
        img = self.shard_img(img)
        txt = self.shard_txt(txt)

        # 5. Run double blocks
        for block in self.double_blocks:
            img, txt = block(
                hidden_states=img,
                encoder_hidden_states=txt,
                temb=vec,
                image_rotary_emb=vis_freqs,
                attention_mask=attention_mask,
            )

        # 6. Output projection + reshape to 6D patches
        img = self.proj_out(self.norm_out(img))
        img = img.reshape(batch_size, max_num_patches, pt, ph, pw, self.out_channels).permute(
            0, 1, 5, 2, 3, 4
        )  # -> [B, N, C, pt, ph, pw]

        if not return_dict:
            return (img,)
        return Transformer2DModelOutput(sample=img)

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
