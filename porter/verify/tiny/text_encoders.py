"""Text encoders from tiny configurations. Common options: hidden_size, layers, tokenizer, and `config` for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import builds, tokenizer_of

HIDDEN = 48


@builds("Qwen2_5_VLForConditionalGeneration")
def qwen2_5_vl(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tokenizer_of(options, built)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    hidden = options.get("hidden_size", HIDDEN)
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": options.get("layers", 2),
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096, "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]},
            "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen3_vl(name: str, options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    import transformers

    processor = built.get("processor")
    tokenizer = processor.tokenizer if processor is not None else tokenizer_of(options, built)
    hidden = options.get("hidden_size", HIDDEN)
    token = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen3VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": options.get("layers", 2),
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4, "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096, "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
            "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip
    return getattr(transformers, name)(config).eval()


@builds("Qwen3VLModel")
def qwen3_vl(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _qwen3_vl("Qwen3VLModel", options, built)


@builds("Qwen3VLForConditionalGeneration")
def qwen3_vl_lm(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _qwen3_vl("Qwen3VLForConditionalGeneration", options, built)


def _clip_config(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = tokenizer_of(options, built)
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=options.get("hidden_size", HIDDEN), intermediate_size=64,
        num_hidden_layers=options.get("layers", 3), num_attention_heads=4, max_position_embeddings=77,
        projection_dim=options.get("projection_dim", options.get("hidden_size", HIDDEN)),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **options.get("config", {}),
    )  # fmt: skip


@builds("CLIPTextModel")
def clip_text(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(options, built)).eval()


@builds("CLIPTextModelWithProjection")
def clip_text_with_projection(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(options, built)).eval()


def _t5(config_class: str, model_class: str, options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    import transformers

    hidden = options.get("hidden_size", HIDDEN)
    config = getattr(transformers, config_class)(
        vocab_size=len(tokenizer_of(options, built)), d_model=hidden, d_kv=hidden // 4, d_ff=64,
        num_layers=options.get("layers", 2), num_heads=4, feed_forward_proj="gated-gelu", pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, **options.get("config", {}),
    )  # fmt: skip
    return getattr(transformers, model_class)(config).eval()


@builds("T5EncoderModel")
def t5(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _t5("T5Config", "T5EncoderModel", options, built)


@builds("UMT5EncoderModel")
def umt5(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _t5("UMT5Config", "UMT5EncoderModel", options, built)


def _decoder(name: str, options: Mapping[str, Any], built: Mapping[str, Any], head: str) -> Any:
    """A decoder-only language model used as a text encoder."""
    import transformers

    tokenizer = tokenizer_of(options, built)
    hidden = options.get("hidden_size", HIDDEN)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=64, head_dim=hidden // 4,
        num_hidden_layers=options.get("layers", 2), num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        **options.get("config", {}),
    )  # fmt: skip
    return getattr(transformers, name + head)(config).eval()


@builds("LlamaModel")
def llama(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Llama", options, built, "Model")


@builds("LlamaForCausalLM")
def llama_lm(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Llama", options, built, "ForCausalLM")


@builds("Gemma2Model", "Gemma2PreTrainedModel")
def gemma2(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Gemma2", options, built, "Model")


@builds("Qwen3Model")
def qwen3(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Qwen3", options, built, "Model")


@builds("Qwen3ForCausalLM")
def qwen3_lm(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Qwen3", options, built, "ForCausalLM")


@builds("GlmModel")
def glm(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Glm", options, built, "Model")


@builds("GemmaModel", "GemmaPreTrainedModel")
def gemma(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("Gemma", options, built, "Model")


@builds("SmolLM3ForCausalLM")
def smollm3(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    return _decoder("SmolLM3", options, built, "ForCausalLM")


@builds("BertModel")
def bert(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer_of(options, built)), hidden_size=options.get("hidden_size", HIDDEN),
        intermediate_size=64, num_hidden_layers=options.get("layers", 2), num_attention_heads=4, hidden_act="gelu",
    )  # fmt: skip
    return BertModel(config).eval()


@builds("Mistral3Model", "Mistral3ForConditionalGeneration")
def mistral3(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    import transformers

    tokenizer = tokenizer_of(options, built)
    hidden = options.get("hidden_size", HIDDEN)
    text = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=64, head_dim=hidden // 4,
        num_hidden_layers=options.get("layers", 2), num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return getattr(transformers, options.get("class", "Mistral3Model"))(config).eval()
