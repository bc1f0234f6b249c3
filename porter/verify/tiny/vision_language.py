"""Encoders of pictures and of text with pictures. Common options: hidden_size, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import builds, tokenizer_of


@builds("SiglipImageProcessor")
def siglip_image_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import SiglipImageProcessor

    edge = options.get("image_size", 32)
    return SiglipImageProcessor(size={"height": edge, "width": edge})


@builds("SiglipVisionModel")
def siglip_vision(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=options.get("hidden_size", 40), intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=options.get("image_size", 32), patch_size=16,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


@builds("Siglip2ImageProcessorFast")
def siglip2_image_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Siglip2ImageProcessorFast

    return Siglip2ImageProcessorFast(patch_size=16, max_num_patches=options.get("patches", 16))


@builds("Siglip2VisionModel")
def siglip2_vision(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=options.get("hidden_size", 40), intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_patches=16, patch_size=16,
    )  # fmt: skip
    return Siglip2VisionModel(config).eval()


@builds("Qwen2_5_VLTextModel")
def qwen2_5_vl_text(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    tokenizer = tokenizer_of(options, built)
    config = Qwen2_5_VLTextConfig(
        hidden_size=options.get("hidden_size", 48), intermediate_size=64, num_hidden_layers=options.get("layers", 3),
        num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=4096,
        rope_theta=10000.0, rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]},
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )  # fmt: skip
    return Qwen2_5_VLTextModel(config).eval()


@builds("LlavaForConditionalGeneration")
def llava(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Llama behind a CLIP vision tower; `image_token_id` is what pictures are put in place of."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tokenizer_of(options, built)
    hidden, edge = options.get("hidden_size", 48), options.get("image_size", 32)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=64, head_dim=hidden // 4,
        num_hidden_layers=options.get("layers", 3), num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=edge,
        patch_size=16, projection_dim=40,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=options.get("image_token_id", len(tokenizer) - 1),
        image_seq_length=(edge // 16) ** 2, vision_feature_layer=-2, projector_hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


@builds("T5GemmaEncoderModel")
def t5gemma(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    hidden = options.get("hidden_size", 48)
    module = {
        "vocab_size": len(tokenizer_of(options, built)), "hidden_size": hidden, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    config = T5GemmaConfig(
        encoder=dict(module), decoder=dict(module), is_encoder_decoder=False, vocab_size=module["vocab_size"]
    )
    return T5GemmaEncoderModel(config).eval()


@builds("T5Gemma2Encoder")
def t5gemma2(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2EncoderConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    hidden = options.get("hidden_size", 48)
    text = {
        "vocab_size": len(tokenizer_of(options, built)), "hidden_size": hidden, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        "dropout_rate": 0.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision)).eval()


@builds("Gemma3ForConditionalGeneration")
def gemma3(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    hidden = options.get("hidden_size", 40)
    text = {
        "vocab_size": len(tokenizer_of(options, built)), "hidden_size": hidden, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


@builds("Qwen2VLForConditionalGeneration")
def qwen2_vl(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = tokenizer_of(options, built)
    hidden, token = options.get("hidden_size", 48), tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": options.get("layers", 3),
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096, "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]},
            "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).eval()
