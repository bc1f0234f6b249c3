"""Autoencoders. Options are constructor arguments; the defaults are the smallest that work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds

DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
        "layers_per_block": 1,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True],
        "latents_mean": [0.1, -0.2, 0.3, -0.1], "latents_std": [1.2, 0.9, 1.1, 0.8],
    },
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True],
        "latents_mean": [0.1, -0.2, 0.3, -0.1], "latents_std": [1.2, 0.9, 1.1, 0.8],
    },
    "AutoencoderKLFlux2": {
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
        "layers_per_block": 1,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 32, "scaling_factor": 0.7,
    },
    "AutoencoderDC": {
        "in_channels": 3, "latent_channels": 4, "attention_head_dim": 8, "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
        "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()), "downsample_block_type": "conv", "upsample_block_type": "interpolate",
    },
}  # fmt: skip


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        import diffusers
        import torch

        vae = getattr(diffusers, name)(**{**DEFAULTS[name], **options}).eval()
        for norm in (m for m in vae.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(0.1, 0.1)  # a trained model's statistics are not 0 and 1
            norm.running_var.uniform_(0.5, 1.5)
        return vae

    return build


for _name in DEFAULTS:
    _builder(_name)
