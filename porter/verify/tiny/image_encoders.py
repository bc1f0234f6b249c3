"""Vision encoders and processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import build_component, builds
from porter.verify.tiny.tokenizers import CHAT_TEMPLATE


@builds("CLIPImageProcessor")
def clip_image_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import CLIPImageProcessor

    edge = options.get("image_size", 32)
    return CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


@builds("CLIPVisionModel", "CLIPVisionModelWithProjection")
def clip_vision(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=options.get("hidden_size", 40), intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=options.get("image_size", 32), patch_size=16, projection_dim=options.get("projection_dim", 40),
    )  # fmt: skip
    return getattr(transformers, options.get("class", "CLIPVisionModel"))(config).eval()


@builds("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
def qwen2_vl_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    pixels = {"min_pixels": 56 * 56, "max_pixels": options.get("max_pixels", 56 * 56 * 4)}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=_tokenizer(built),
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(built: Mapping[str, Any]) -> Any:
    return built["tokenizer"] if "tokenizer" in built else build_component("Qwen2Tokenizer", {}, built)


@builds("Qwen3VLProcessor")
def qwen3_vl_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = {"min_pixels": 64 * 64, "max_pixels": options.get("max_pixels", 64 * 64 * 4)}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, **pixels),
        tokenizer=_tokenizer(built),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


@builds("PixtralProcessor")
def pixtral_processor(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokens = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 64}, patch_size=16),
        tokenizer=build_component("PreTrainedTokenizerFast", {"specials": tokens}, built),
        chat_template=CHAT_TEMPLATE,
    )
