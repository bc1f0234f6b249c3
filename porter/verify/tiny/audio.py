"""What makes and reads sound: autoencoders, vocoders, embedders of durations. Options are constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds, random_model

DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderOobleck": {
        "encoder_hidden_size": 16, "downsampling_ratios": [2, 4, 4], "channel_multiples": [1, 2, 4],
        "decoder_channels": 8, "decoder_input_channels": 8, "audio_channels": 2, "sampling_rate": 1600,
    },
    "AutoencoderSAME": {
        "patch_size": 8, "encoder_channels": 16, "encoder_c_mults": [2], "encoder_strides": [4],
        "encoder_transformer_depths": [1], "latent_dim": 8, "dim_heads": 8, "sampling_rate": 1600,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 16, "output_channels": 2, "ch_mult": (1,), "num_res_blocks": 1, "in_channels": 2,
        "resolution": 32, "latent_channels": 2, "mel_bins": 16,
    },
    "LongCatAudioDiTVae": {
        "channels": 8, "c_mults": [1, 2], "strides": [2, 2], "latent_dim": 8, "encoder_latent_dim": 16,
        "downsampling_ratio": 4, "sample_rate": 1600,
    },
}  # fmt: skip


@builds("StableAudioProjectionModel")
def stable_audio_projection(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from diffusers import StableAudioProjectionModel

    return StableAudioProjectionModel(**options).eval()


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        return random_model(name, {**DEFAULTS[name], **options}, 102)

    return build


for _name in DEFAULTS:
    _builder(_name)
