"""What makes and reads sound: autoencoders, vocoders, embedders of durations. Options are constructor arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds, random_model, random_weights

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


BESIDE_PIPELINES: dict[str, dict[str, Any]] = {
    "StableAudioProjectionModel": {},
    "StableAudio3DurationEmbedder": {"fourier_dim": 16},
    "AceStepConditionEncoder": {
        "hidden_size": 64, "intermediate_size": 96, "text_hidden_dim": 48, "timbre_hidden_dim": 8,
        "num_lyric_encoder_hidden_layers": 2, "num_timbre_encoder_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    },
    "AceStepAudioTokenizer": {
        "hidden_size": 64, "intermediate_size": 96, "audio_acoustic_hidden_dim": 8, "fsq_dim": 64,
        "num_attention_pooler_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": 8, "fsq_input_levels": [4, 4, 4],
    },
    "AceStepAudioTokenDetokenizer": {
        "hidden_size": 64, "intermediate_size": 96, "audio_acoustic_hidden_dim": 8,
        "num_attention_pooler_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": 8,
    },
    "LTX2TextConnectors": {
        "caption_channels": 40, "text_proj_in_factor": 3, "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 10, "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None, "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 10, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None, "connector_rope_base_seq_len": 32,
        "rope_double_precision": False,
    },
    "LTX2Vocoder": {
        "in_channels": 32, "hidden_channels": 16, "out_channels": 2, "upsample_kernel_sizes": [4, 4],
        "upsample_factors": [2, 2], "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3]],
        "output_sampling_rate": 1600,
    },
}  # fmt: skip
"""Classes that live in the file of a pipeline or beside it."""


def _beside_pipeline(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        loaded = [m for n, m in list(sys.modules.items()) if n.startswith("diffusers.pipelines.") and name in vars(m)]
        return random_weights(vars(loaded[0])[name](**{**BESIDE_PIPELINES[name], **options}), 103)

    return build


for _name in BESIDE_PIPELINES:
    _beside_pipeline(_name)


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        return random_model(name, {**DEFAULTS[name], **options}, 102)

    return build


for _name in DEFAULTS:
    _builder(_name)
