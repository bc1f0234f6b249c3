"""Autoencoders of videos. Options are constructor arguments; the defaults are the smallest that work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds

DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "scaling_factor": 0.48,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4, "downsample_match_channel": False, "upsample_match_channel": False,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": (32, 32, 32), "layers_per_block": 1, "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4, "scaling_factor": 0.7,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1), "patch_size": 1,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 8, "block_out_channels": (8,), "decoder_block_out_channels": (8,), "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,), "patch_size": 1,
        "decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False),
        "down_block_types": ("LTX2VideoDownBlock3D",), "downsample_type": ("spatiotemporal",),
        "upsample_type": ("spatiotemporal",), "upsample_residual": (False,), "upsample_factor": (1,),
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
        "scaling_factor": 1.15,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "patch_type": "haar", "patch_size": 4,
        "spatial_compression_ratio": 4, "temporal_compression_ratio": 4, "latents_mean": [0.1] * 80,
        "latents_std": [1.1] * 80,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
        "spatial_group_norm": False,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 12, "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32), "layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLAllegro": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    },
}  # fmt: skip


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        import diffusers

        return getattr(diffusers, name)(**{**DEFAULTS[name], **options}).eval()

    return build


for _name in DEFAULTS:
    _builder(_name)
