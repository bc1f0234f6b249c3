# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.PRXPixelPipeline (pipelines/prx/pipeline_prx_pixel.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import html
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from cache_dit import DBCacheConfig, refresh_context
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.prx.pipeline_prx_pixel import PRX_PIXEL_DEFAULT_MAX_TOKENS
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
)
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.hub_prefetch import from_pretrained_with_prefetch
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.profiler.diffusion_pipeline_profiler import DiffusionPipelineProfilerMixin
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.diffusion.worker.utils import StepRequestState
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType
from vllm_omni.platforms import current_omni_platform

from .prx_transformer import PRXTransformer2DModel

# PRXPixel is a 1024px model.
PRX_PIXEL_DEFAULT_RESOLUTION = 1024


# Predefined aspect-ratio bins for 1024px generation (mirrors ASPECT_RATIO_1024_BIN in pipeline_prx).
ASPECT_RATIO_1024_BIN = {
    "0.49": [704, 1440],
    "0.52": [736, 1408],
    "0.53": [736, 1376],
    "0.57": [768, 1344],
    "0.59": [768, 1312],
    "0.62": [800, 1280],
    "0.67": [832, 1248],
    "0.68": [832, 1216],
    "0.78": [896, 1152],
    "0.83": [928, 1120],
    "0.94": [992, 1056],
    "1.0": [1024, 1024],
    "1.06": [1056, 992],
    "1.13": [1088, 960],
    "1.21": [1120, 928],
    "1.29": [1152, 896],
    "1.37": [1184, 864],
    "1.46": [1216, 832],
    "1.5": [1248, 832],
    "1.71": [1312, 768],
    "1.75": [1344, 768],
    "1.87": [1376, 736],
    "1.91": [1408, 736],
    "2.05": [1440, 704],
}


ASPECT_RATIO_BINS = {
    1024: ASPECT_RATIO_1024_BIN,
}


def _basic_clean(text: str) -> str:
    from ftfy import fix_text

    text = fix_text(text)
    text = html.unescape(html.unescape(text))
    return text.strip()


def read_json(od_config: OmniDiffusionConfig, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint."""
    if os.path.isdir(od_config.model):
        path = os.path.join(od_config.model, name)
    else:
        path = hf_hub_download(od_config.model, name, revision=od_config.revision)
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def load_component(od_config: OmniDiffusionConfig, model_index: dict[str, Any], name: str, **kwargs: Any) -> Any:
    """Load one component from its subfolder, as the class that model_index.json names."""
    library, class_name = model_index[name]
    component_class = getattr(importlib.import_module(library), class_name)
    return from_pretrained_with_prefetch(
        component_class.from_pretrained,
        od_config.model,
        subfolder=name,
        prefetch_list=[
            key for key, value in model_index.items() if isinstance(value, list) and isinstance(value[0], str)
        ],
        local_files_only=os.path.isdir(od_config.model),
        revision=od_config.revision,
        **kwargs,
    )


def compile_denoiser(denoiser: nn.Module, od_config: OmniDiffusionConfig) -> None:
    """Compile a denoiser as the engine does. With `additional_config={"cuda_graphs": True}` blocks are compiled for each
    shape and replayed as CUDA graphs, so that a small model does not wait for launches."""
    graphs = od_config.additional_config.get("cuda_graphs", False)
    # A cache keeps results of blocks, ranks meet inside of them, and weights that move are not where they were recorded.
    hindered = (
        not current_omni_platform.is_cuda()
        or od_config.diffusion_compile_granularity == "full"
        or od_config.cache_backend not in (None, "none")
        or od_config.parallel_config.world_size > 1
        or od_config.enable_cpu_offload
        or od_config.enable_layerwise_offload
        or od_config.enable_distributed_layerwise_offload
        or od_config.enable_sleep_mode
    )
    if graphs and hindered:
        init_logger(__name__).warning(
            "No CUDA graphs: they need one card, regional compilation, no cache and no offloading."
        )
    if graphs and not hindered:
        regionally_compile(denoiser, mode="reduce-overhead", dynamic=False)
        # Results of blocks live until the next call of the denoiser.
        denoiser.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    elif od_config.diffusion_compile_granularity == "full":
        denoiser.compile(dynamic=od_config.diffusion_compile_dynamic)
    else:
        regionally_compile(denoiser, dynamic=od_config.diffusion_compile_dynamic)


def keep_branches_apart(denoiser: nn.Module | None, branches: int) -> None:
    """Tell Cache-DiT, where it is on, how many branches of guidance this rank computes in a step: what a call reuses must come
    from the same branch, and calls are all that it counts. It tells two branches apart."""
    manager = getattr(denoiser, "_context_manager", None)
    if manager is None:
        return
    calls = len(range(get_classifier_free_guidance_rank(), branches, get_classifier_free_guidance_world_size()))
    if calls > 2:
        raise NotImplementedError(f"Cache-DiT is on, and a step calls the denoiser for {calls} branches of guidance.")
    contexts = [manager.get_context(name) for name in denoiser._context_names]
    if any(bool(context.cache_config.enable_separate_cfg) != (calls == 2) for context in contexts):
        refresh_context(denoiser, cache_config=DBCacheConfig().reset(enable_separate_cfg=calls == 2))


def begin_anew(denoiser: nn.Module | None) -> None:
    """Make Cache-DiT, where it is on, forget the loop of steps before: another window, or another request of the batch."""
    if hasattr(denoiser, "_context_manager"):
        refresh_context(denoiser)


class SeparateRequests(ValueError):
    """Requests that one denoising loop can't serve."""


def same_value(left: Any, right: Any) -> bool:
    """Whether two values, perhaps with tensors in them, are equal."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_value, left, right))
    return np.array_equal(left, right)


def agreed(values: Sequence[Any]) -> Any:
    """The value that all requests have."""
    if any(not same_value(value, values[0]) for value in values):
        raise SeparateRequests
    return values[0]


def join_rows(values: Sequence[Any], branches: bool) -> Any:
    """What each request brings, one row behind the other; with both `branches` of guidance, one branch behind the other."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise SeparateRequests
    if isinstance(first, torch.Generator):
        return list(values)
    if isinstance(first, dict) and all(value.keys() == first.keys() for value in values):
        return {key: join_rows([value[key] for value in values], branches) for key in first}
    several = 3 if branches else 1  # rows of one request
    if isinstance(first, torch.Tensor) and first.ndim:
        if any(value.shape != first.shape for value in values):
            raise SeparateRequests
        if len(first) <= several:
            return torch.cat([row for rows in zip(*(value.split(1) for value in values)) for row in rows])
    if isinstance(first, (list, tuple)) and all(len(value) == len(first) for value in values):
        held = any(isinstance(entry, torch.Tensor) and entry.shape[:1] == (1,) for entry in first)
        if isinstance(first, list) and len(first) <= several and not held:  # an entry for each prompt
            return [entry for entries in zip(*values) for entry in entries]
        return type(first)(join_rows(entries, branches) for entries in zip(*values))
    return agreed(values)


def get_prx_pixel_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Post-processing of `PRXPixelPipeline`; it runs in the engine process, where no model is loaded."""
    processor = PixArtImageProcessor()

    def post_process_func(image: torch.Tensor, sampling_params: OmniDiffusionSamplingParams | None = None) -> Any:
        output_type = sampling_params.output_type if sampling_params is not None else None
        if output_type is None:
            output_type = "pil"
        if output_type == "latent":
            return image
        return processor.postprocess(image, output_type=output_type)

    return post_process_func


class PRXPixelPipeline(
    nn.Module, CFGParallelMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin, SupportsComponentDiscovery
):
    """Pipeline for text-to-image generation with the PRXPixel model."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 28
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = []
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
    }
    _text_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    _tensor_arguments: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    )
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "generator",
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_attention_mask",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "latents",
        "ca_embed",
        "ca_mask",
    )
    _branch_rows: ClassVar[tuple[str, ...]] = (
        "ca_embed",
        "ca_mask",
    )
    _agreed: ClassVar[tuple[str, ...]] = ("timesteps",)

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config
        self.device = get_local_device()
        self.dtype = od_config.dtype
        model_index = read_json(od_config, "model_index.json")

        # Offloaded components wait on the CPU until the engine moves them.
        device = torch.device("cpu") if od_config.enable_cpu_offload else self.device
        self.scheduler = load_component(od_config, model_index, "scheduler")
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.default_sample_size = model_index.get("default_sample_size", PRX_PIXEL_DEFAULT_RESOLUTION)
        self.prompt_max_tokens = model_index.get("prompt_max_tokens", PRX_PIXEL_DEFAULT_MAX_TOKENS)
        self.noise_scale = model_index.get("noise_scale", 2.0)
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder=name,
                revision=od_config.revision,
                prefix=f"{name}.",
                fall_back_to_pt=True,
            )
            for name in self._dit_modules
        ]
        self.transformer = PRXTransformer2DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, PRXTransformer2DModel),
        )

        # Pixel pipeline always has an image_processor (vae_scale_factor=1)
        # so that output_type="pil"/"np" work without a VAE.
        self.image_processor = PixArtImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    @property
    def vae_scale_factor(self):
        # PRXPixel operates directly in RGB pixel space: no VAE, no spatial compression.
        return 1

    def _tokenize_prompts(
        self,
        prompts: list[str],
        device: torch.device,
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize and (lightly) clean prompts.

        PRXPixel always uses light cleaning (`_basic_clean`) and the training-time token budget
        (`self.config.prompt_max_tokens`). The `tokenizer_max_length` and `skip_text_cleaning` arguments are accepted
        for API compatibility with the copied callers but are ignored.
        """
        cleaned = [_basic_clean(text) for text in prompts]
        tokens = self.tokenizer(
            cleaned,
            padding="max_length",
            max_length=self.prompt_max_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"].to(device), tokens["attention_mask"].bool().to(device)

    # Copied from diffusers.pipelines.prx.pipeline_prx.PRXPipeline._encode_prompt_standard
    def _encode_prompt_standard(
        self,
        prompt: list[str],
        device: torch.device,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str = "",
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool = False,
    ):
        """Encode prompt using standard text encoder and tokenizer with batch processing."""
        batch_size = len(prompt)

        if do_classifier_free_guidance:
            if isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * batch_size

            prompts_to_encode = negative_prompt + prompt
        else:
            prompts_to_encode = prompt

        input_ids, attention_mask = self._tokenize_prompts(
            prompts_to_encode, device, tokenizer_max_length=tokenizer_max_length, skip_text_cleaning=skip_text_cleaning
        )

        with torch.no_grad():
            embeddings = self.text_encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=True,
            )["last_hidden_state"]

        if do_classifier_free_guidance:
            uncond_text_embeddings, text_embeddings = embeddings.split(batch_size, dim=0)
            uncond_cross_attn_mask, cross_attn_mask = attention_mask.split(batch_size, dim=0)
        else:
            text_embeddings = embeddings
            cross_attn_mask = attention_mask
            uncond_text_embeddings = None
            uncond_cross_attn_mask = None

        return text_embeddings, cross_attn_mask, uncond_text_embeddings, uncond_cross_attn_mask

    # Copied from diffusers.pipelines.prx.pipeline_prx.PRXPipeline.encode_prompt
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        tokenizer_max_length: int | None = None,
        skip_text_cleaning: bool = False,
    ):
        """Encode text prompt using standard text encoder and tokenizer, or use precomputed embeddings."""
        if device is None:
            device = self.device

        if prompt_embeds is None:
            if isinstance(prompt, str):
                prompt = [prompt]
            # Encode the prompts
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
                self._encode_prompt_standard(
                    prompt,
                    device,
                    do_classifier_free_guidance,
                    negative_prompt,
                    tokenizer_max_length=tokenizer_max_length,
                    skip_text_cleaning=skip_text_cleaning,
                )
            )

        # Duplicate embeddings for each generation per prompt
        if num_images_per_prompt > 1:
            # Repeat prompt embeddings
            bs_embed, seq_len, _ = prompt_embeds.shape
            prompt_embeds = prompt_embeds.repeat(1, num_images_per_prompt, 1)
            prompt_embeds = prompt_embeds.view(bs_embed * num_images_per_prompt, seq_len, -1)

            if prompt_attention_mask is not None:
                prompt_attention_mask = prompt_attention_mask.view(bs_embed, -1)
                prompt_attention_mask = prompt_attention_mask.repeat(num_images_per_prompt, 1)

            # Repeat negative embeddings if using CFG
            if do_classifier_free_guidance and negative_prompt_embeds is not None:
                bs_embed, seq_len, _ = negative_prompt_embeds.shape
                negative_prompt_embeds = negative_prompt_embeds.repeat(1, num_images_per_prompt, 1)
                negative_prompt_embeds = negative_prompt_embeds.view(bs_embed * num_images_per_prompt, seq_len, -1)

                if negative_prompt_attention_mask is not None:
                    negative_prompt_attention_mask = negative_prompt_attention_mask.view(bs_embed, -1)
                    negative_prompt_attention_mask = negative_prompt_attention_mask.repeat(num_images_per_prompt, 1)

        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds if do_classifier_free_guidance else None,
            negative_prompt_attention_mask if do_classifier_free_guidance else None,
        )

    def check_inputs(
        self,
        prompt: str | list[str],
        height: int,
        width: int,
        guidance_scale: float,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
    ):
        """Check that all inputs are in correct format."""
        if prompt is not None and prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `prompt`: {prompt} and `prompt_embeds`: {prompt_embeds}. Please make sure to"
                " only forward one of the two."
            )

        if prompt is None and prompt_embeds is None:
            raise ValueError(
                "Provide either `prompt` or `prompt_embeds`. Cannot leave both `prompt` and `prompt_embeds` undefined."
            )

        if prompt is not None and (not isinstance(prompt, str) and not isinstance(prompt, list)):
            raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}")

        if prompt_embeds is not None and guidance_scale > 1.0 and negative_prompt_embeds is None:
            raise ValueError(
                "When `prompt_embeds` is provided and `guidance_scale > 1.0`, "
                "`negative_prompt_embeds` must also be provided for classifier-free guidance."
            )

        # The latents must be divisible by the transformer's patch size after VAE compression.
        dimension_multiple = self.vae_scale_factor * self.transformer.config.patch_size
        if height % dimension_multiple != 0 or width % dimension_multiple != 0:
            raise ValueError(
                f"`height` and `width` have to be divisible by {dimension_multiple} (vae_scale_factor *"
                f" transformer patch_size) but are {height} and {width}."
            )

        if guidance_scale < 1.0:
            raise ValueError(f"guidance_scale has to be >= 1.0 but is {guidance_scale}")

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
    ):
        """Prepare initial latents for the diffusion process.

        PRXPixel trains with a non-unit initial-noise scale, so the sampled noise is multiplied by
        `self.config.noise_scale`.
        """
        if latents is None:
            spatial_compression = self.vae_scale_factor
            latent_height, latent_width = (
                height // spatial_compression,
                width // spatial_compression,
            )
            shape = (batch_size, num_channels_latents, latent_height, latent_width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype) * self.noise_scale
        else:
            latents = latents.to(device)
        return latents

    def request_arguments(self, prompt: OmniPromptType, sampling: OmniDiffusionSamplingParams) -> dict[str, Any]:
        """Arguments that a request gives; what it omits keeps the default of `prepare_generation`."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        media = fields.get("multi_modal_data") or {}
        for name, reason in self._refused_arguments.items():
            if any(place.get(name) is not None for place in (fields, media, sampling.extra_args)):
                raise ValueError(f"`{name}` can't be set: {reason}.")
        # A sampling field holds None where the request gave nothing; in a dictionary the key tells.
        arguments = {
            "num_images_per_prompt": sampling.num_outputs_per_prompt,
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "timesteps": sampling.timesteps,
            "generator": sampling.generator,
            "latents": sampling.latents,
            "output_type": sampling.output_type,
            "guidance_scale": sampling.guidance_scale if sampling.guidance_scale_provided else None,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in (
            "prompt",
            "negative_prompt",
            "prompt_embeds",
            "negative_prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_attention_mask",
        ):
            if name in fields:
                arguments[name] = fields[name]
        for name in ("use_resolution_binning",):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        return arguments

    def prepare_generation(
        self,
        prompt: str | list[str] = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        timesteps: list[int] = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        prompt_attention_mask: torch.BoolTensor | None = None,
        negative_prompt_attention_mask: torch.BoolTensor | None = None,
        output_type: str | None = "pil",
        use_resolution_binning: bool = True,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""

        # 0. Set height and width
        default_resolution = self.default_sample_size or PRX_PIXEL_DEFAULT_RESOLUTION
        height = height or default_resolution
        width = width or default_resolution

        orig_width = None
        orig_height = None
        if use_resolution_binning:
            if self.default_sample_size not in ASPECT_RATIO_BINS:
                raise ValueError(
                    f"Resolution binning is only supported for default_sample_size in {list(ASPECT_RATIO_BINS.keys())}, "
                    f"but got {self.default_sample_size}. Set use_resolution_binning=False to disable aspect ratio binning."
                )
            aspect_ratio_bin = ASPECT_RATIO_BINS[self.default_sample_size]

            # Store original dimensions
            orig_height, orig_width = height, width
            # Map to closest resolution in the bin
            height, width = self.image_processor.classify_height_width_bin(height, width, ratios=aspect_ratio_bin)

        # 1. Check inputs
        self.check_inputs(
            prompt,
            height,
            width,
            guidance_scale,
            prompt_embeds,
            negative_prompt_embeds,
        )

        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        # Use execution device (handles offloading scenarios including group offloading)
        device = self.device
        do_classifier_free_guidance = guidance_scale > 1.0

        # 2. Encode input prompt
        text_embeddings, cross_attn_mask, uncond_text_embeddings, uncond_cross_attn_mask = self.encode_prompt(
            prompt,
            device,
            do_classifier_free_guidance=do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        # Expose standard names for callbacks parity

        # 3. Prepare timesteps
        if timesteps is not None:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            timesteps = self.scheduler.timesteps
            num_inference_steps = len(timesteps)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps = self.scheduler.timesteps

        # 4. Prepare latent variables (pixel space: in_channels RGB tensors, no VAE)
        num_channels_latents = self.transformer.config.in_channels
        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            num_channels_latents,
            height,
            width,
            text_embeddings.dtype,
            device,
            generator,
            latents,
        )

        # 5. Prepare extra step kwargs
        extra_step_kwargs = {}
        accepts_eta = "eta" in set(inspect.signature(self.scheduler.step).parameters.keys())
        if accepts_eta:
            extra_step_kwargs["eta"] = 0.0

        # 6. Prepare cross-attention embeddings and masks
        if do_classifier_free_guidance:
            ca_embed = torch.cat([uncond_text_embeddings, text_embeddings], dim=0)
            ca_mask = None
            if cross_attn_mask is not None and uncond_cross_attn_mask is not None:
                ca_mask = torch.cat([uncond_cross_attn_mask, cross_attn_mask], dim=0)
        else:
            ca_embed = text_embeddings
            ca_mask = cross_attn_mask
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "device": device,
                "ca_embed": ca_embed,
                "ca_mask": ca_mask,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "guidance_scale": guidance_scale,
                "extra_step_kwargs": extra_step_kwargs,
            },
            {
                "output_type": output_type,
                "use_resolution_binning": use_resolution_binning,
                "orig_width": orig_width,
                "orig_height": orig_height,
            },
        )

    def predict_guided_noise(
        self,
        latents,
        t,
        device,
        ca_embed,
        ca_mask,
        do_classifier_free_guidance,
        guidance_scale,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""
        # Duplicate latents if using classifier-free guidance
        latents_in = latents
        # Normalize timestep for the transformer
        t_cont = (t.float() / self.scheduler.config.num_train_timesteps).view(1).to(device)
        positive_kwargs = {
            "hidden_states": latents_in,
            "timestep": t_cont,
            "encoder_hidden_states": ca_embed,
            "attention_mask": ca_mask,
        }
        negative_kwargs = None
        if do_classifier_free_guidance:
            negative_ca_embed, ca_embed = ca_embed.chunk(2)
            negative_ca_mask, ca_mask = ca_mask.chunk(2)
            negative_kwargs = positive_kwargs | {
                "encoder_hidden_states": negative_ca_embed,
                "attention_mask": negative_ca_mask,
            }
            positive_kwargs = positive_kwargs | {
                "encoder_hidden_states": ca_embed,
                "attention_mask": ca_mask,
            }
        return self.predict_noise_maybe_with_cfg(
            do_classifier_free_guidance, guidance_scale, positive_kwargs, negative_kwargs, cfg_normalize=False
        )

    def step_latents(self, scheduler, noise_pred, t, latents, extra_step_kwargs):

        # PRXPixel predicts x0; convert to flow-matching velocity before the scheduler step.
        t_x = torch.clamp(t.float() / scheduler.config.num_train_timesteps, min=0.05)
        noise_pred = (latents - noise_pred) / t_x

        # Compute the previous noisy sample x_t -> x_t-1
        latents = scheduler.step(noise_pred, t, latents, **extra_step_kwargs).prev_sample
        return latents

    def predict_noise_maybe_with_cfg(self, do_true_cfg: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the engine's, and Cache-DiT knows the branches."""
        for name in self._dit_modules:
            keep_branches_apart(getattr(self, name), 2 if do_true_cfg else 1)
        return super().predict_noise_maybe_with_cfg(do_true_cfg, *args, **kwargs)

    def diffuse(
        self,
        latents,
        timesteps,
        device,
        ca_embed,
        ca_mask,
        do_classifier_free_guidance,
        guidance_scale,
        extra_step_kwargs,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            for t in timesteps:
                noise_pred = self.predict_guided_noise(
                    latents=latents,
                    t=t,
                    device=device,
                    ca_embed=ca_embed,
                    ca_mask=ca_mask,
                    do_classifier_free_guidance=do_classifier_free_guidance,
                    guidance_scale=guidance_scale,
                )
                latents = self.step_latents(
                    self.scheduler, noise_pred=noise_pred, t=t, latents=latents, extra_step_kwargs=extra_step_kwargs
                )
                progress_bar.update()
        return latents

    def decode(
        self,
        latents,
        output_type,
        use_resolution_binning,
        orig_width,
        orig_height,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        # 8. Post-processing (pixel space: the denoised output IS the image in [-1, 1]; no VAE decode).
        if output_type in ["latent", "pt"]:
            image = latents
        else:
            image = latents
            # Resize back to original resolution if using binning
            if use_resolution_binning:
                image = self.image_processor.resize_and_crop_tensor(image, orig_width, orig_height)
        return image

    def generate(self, inputs: dict[str, Any], decode_inputs: dict[str, Any]) -> DiffusionOutput:
        """Denoise what was prepared, and decode it."""
        return self.finish(latents=self.diffuse(**inputs), **decode_inputs)

    def finish(self, **inputs: Any) -> DiffusionOutput:
        """Decode, and wrap for the engine."""
        output = DiffusionOutput(output=self.decode(**inputs))
        if self.enable_diffusion_pipeline_profiler:
            output.stage_durations = self.stage_durations
        return output

    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        requests = [self.request_arguments(p, s) for p, s in zip(req.prompts, req.sampling_params_list, strict=True)]
        if len(requests) > 1 and self.share_settings(requests):
            return self.generate_together(requests)
        return [self.generate(*self.prepare_generation(**arguments)) for arguments in requests]

    def share_settings(self, requests: list[dict[str, Any]]) -> bool:
        """Whether requests differ in nothing but what each of them brings, which is one row."""
        first = requests[0]
        for arguments in requests:
            if arguments["num_images_per_prompt"] != 1 or arguments.keys() != first.keys():
                return False
            for name, value in arguments.items():
                if name in self._text_arguments and isinstance(value, list):
                    return False
                if name in self._tensor_arguments and isinstance(value, torch.Tensor) and len(value) != 1:
                    return False
                if name not in self._request_arguments and not same_value(value, first[name]):
                    return False
        return True

    def generate_together(self, requests: list[dict[str, Any]]) -> list[DiffusionOutput]:
        """Encode and decode each request alone, and denoise all at once where their inputs have equal shapes."""
        prepared = []
        for arguments in requests:
            prepared.append((*self.prepare_generation(**arguments), copy.deepcopy(self.scheduler)))
        joined = self.join_inputs([inputs for inputs, _, _ in prepared])
        outputs = []
        if joined is None:
            for inputs, decode_inputs, scheduler in prepared:
                self.scheduler = scheduler
                outputs.append(self.generate(inputs, decode_inputs))
            return outputs
        latents = self.diffuse(**joined)
        for index, (_, decode_inputs, _) in enumerate(prepared):
            outputs.append(self.finish(latents=latents[index : index + 1], **decode_inputs))
        return outputs

    def join_inputs(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Inputs of one loop for all requests; None where they have to stay apart."""
        joined = dict(requests[0])
        try:
            for name in joined:
                values = [inputs[name] for inputs in requests]
                if name in self._rows:
                    joined[name] = join_rows(values, branches=name in self._branch_rows)
                elif name in self._agreed:
                    joined[name] = agreed(values)
        except SeparateRequests:
            return None
        return joined

    def prepare_encode(self, state: StepRequestState, **kwargs: Any) -> StepRequestState:
        """Step execution: encode one request and give it a scheduler of its own."""
        inputs, state.extra["decode"] = self.prepare_generation(**self.request_arguments(state.prompt, state.sampling))
        state.latents = inputs.pop("latents")
        state.timesteps = inputs.pop("timesteps")
        state.step_index = 0
        state.scheduler = copy.deepcopy(self.scheduler)
        state.extra["denoise"] = inputs
        return state

    def denoise_step(
        self, input_batch: InputBatch, *, states: Sequence[StepRequestState] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Step execution: predict for each request at its own timestep."""
        predictions = []
        for state in states if states is not None else input_batch.states:
            inputs = state.extra["denoise"]
            predictions.append(
                self.predict_guided_noise(
                    latents=state.latents,
                    t=state.current_timestep,
                    device=inputs["device"],
                    ca_embed=inputs["ca_embed"],
                    ca_mask=inputs["ca_mask"],
                    do_classifier_free_guidance=inputs["do_classifier_free_guidance"],
                    guidance_scale=inputs["guidance_scale"],
                )
            )
        return torch.cat(predictions)

    def step_scheduler(self, state: StepRequestState, noise_pred: torch.Tensor, **kwargs: Any) -> None:
        """Step execution: one step of the request's own scheduler."""
        inputs = state.extra["denoise"]
        state.latents = self.step_latents(
            state.scheduler,
            noise_pred=noise_pred,
            t=state.current_timestep,
            latents=state.latents,
            extra_step_kwargs=inputs["extra_step_kwargs"],
        )
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **kwargs: Any) -> DiffusionOutput:
        """Step execution: decode a finished request."""
        return self.finish(latents=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
