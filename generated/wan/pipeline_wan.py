# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.WanPipeline (pipelines/wan/pipeline_wan.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import html
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from cache_dit import DBCacheConfig, refresh_context
from diffusers.utils.import_utils import is_ftfy_available
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from regex import sub
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig, TransformerConfig
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_wan import DistributedAutoencoderKLWan
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
)
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.media import (
    DiffusionMediaOutput,
    VideoMediaOutput,
    VideoTensorEncoding,
    VideoTensorLayout,
    VideoTensorSpec,
    VideoValueRange,
)
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.hub_prefetch import from_pretrained_with_prefetch
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.profiler.diffusion_pipeline_profiler import DiffusionPipelineProfilerMixin
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.diffusion.worker.utils import StepRequestState
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType
from vllm_omni.platforms import current_omni_platform

from .wan_transformer import WanTransformer3DModel

logger = init_logger(__name__)  # pylint: disable=invalid-name


def whitespace_clean(text):
    text = sub(r"\s+", " ", text)
    text = text.strip()
    return text


def basic_clean(text):
    if is_ftfy_available():
        from ftfy import fix_text

        text = fix_text(text)
    text = html.unescape(html.unescape(text))
    return text.strip()


def prompt_clean(text):
    text = whitespace_clean(basic_clean(text))
    return text


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
    component_class = {"AutoencoderKLWan": DistributedAutoencoderKLWan}.get(class_name) or getattr(
        importlib.import_module(library), class_name
    )
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


class WanPipeline(
    nn.Module, CFGParallelMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin, SupportsComponentDiscovery
):
    """Pipeline for text-to-video generation using Wan."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 50
    _dit_modules: ClassVar[list[str]] = ["transformer", "transformer_2"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "attention_kwargs": "attention processors take no per-call arguments here; LoRA scale is the engine's lora_scale",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
    }
    _text_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
    )
    _tensor_arguments: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    )
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "generator",
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "latents",
        "mask",
        "prompt_embeds",
        "negative_prompt_embeds",
    )
    _branch_rows: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "negative_prompt_embeds",
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
        self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.scheduler = load_component(od_config, model_index, "scheduler")
        self.boundary_ratio = model_index.get("boundary_ratio", None)
        self.expand_timesteps = model_index.get("expand_timesteps", False)
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder=name,
                revision=od_config.revision,
                prefix=f"{name}.",
                fall_back_to_pt=True,
            )
            for name in self._dit_modules
            if model_index.get(name, [None])[0] is not None
        ]
        self.transformer = None
        if model_index.get("transformer", [None])[0] is not None:
            self.transformer = WanTransformer3DModel(
                od_config=od_config,
                quant_config=od_config.quantization_config,
                prefix=maybe_prefix(prefix, "transformer"),
                **get_transformer_config_kwargs(od_config.tf_model_config, WanTransformer3DModel),
            )
        self.transformer_2 = None
        if model_index.get("transformer_2", [None])[0] is not None:
            self.transformer_2 = WanTransformer3DModel(
                od_config=od_config,
                quant_config=od_config.quantization_config,
                prefix=maybe_prefix(prefix, "transformer_2"),
                **get_transformer_config_kwargs(
                    TransformerConfig.from_dict(read_json(od_config, "transformer_2/config.json")),
                    WanTransformer3DModel,
                ),
            )
        self.vae_scale_factor_temporal = self.vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = self.vae.config.scale_factor_spatial
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            if getattr(self, name) is not None:
                compile_denoiser(getattr(self, name), self.od_config)

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        device = device or self.device
        dtype = dtype or self.text_encoder.dtype

        prompt = [prompt] if isinstance(prompt, str) else prompt
        prompt = [prompt_clean(u) for u in prompt]
        batch_size = len(prompt)

        text_inputs = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        text_input_ids, mask = text_inputs.input_ids, text_inputs.attention_mask
        seq_lens = mask.gt(0).sum(dim=1).long()

        prompt_embeds = self.text_encoder(text_input_ids.to(device), mask.to(device)).last_hidden_state
        prompt_embeds = prompt_embeds.to(dtype=dtype, device=device)
        prompt_embeds = [u[:v] for u, v in zip(prompt_embeds, seq_lens)]
        prompt_embeds = torch.stack(
            [torch.cat([u, u.new_zeros(max_sequence_length - u.size(0), u.size(1))]) for u in prompt_embeds], dim=0
        )

        # duplicate text embeddings for each generation per prompt, using mps friendly method
        _, seq_len, _ = prompt_embeds.shape
        prompt_embeds = prompt_embeds.repeat(1, num_videos_per_prompt, 1)
        prompt_embeds = prompt_embeds.view(batch_size * num_videos_per_prompt, seq_len, -1)

        return prompt_embeds

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        r"""
        Encodes the prompt into text encoder hidden states.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                prompt to be encoded
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts not to guide the image generation. If not defined, one has to pass
                `negative_prompt_embeds` instead. Ignored when not using guidance (i.e., ignored if `guidance_scale` is
                less than `1`).
            do_classifier_free_guidance (`bool`, *optional*, defaults to `True`):
                Whether to use classifier free guidance or not.
            num_videos_per_prompt (`int`, *optional*, defaults to 1):
                Number of videos that should be generated per prompt. torch device to place the resulting embeddings on
            prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated text embeddings. Can be used to easily tweak text inputs, *e.g.* prompt weighting. If not
                provided, text embeddings will be generated from `prompt` input argument.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Pre-generated negative text embeddings. Can be used to easily tweak text inputs, *e.g.* prompt
                weighting. If not provided, negative_prompt_embeds will be generated from `negative_prompt` input
                argument.
            device: (`torch.device`, *optional*):
                torch device
            dtype: (`torch.dtype`, *optional*):
                torch dtype
        """
        device = device or self.device

        prompt = [prompt] if isinstance(prompt, str) else prompt
        if prompt is not None:
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        if prompt_embeds is None:
            prompt_embeds = self._get_t5_prompt_embeds(
                prompt=prompt,
                num_videos_per_prompt=num_videos_per_prompt,
                max_sequence_length=max_sequence_length,
                device=device,
                dtype=dtype,
            )

        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt = negative_prompt or ""
            negative_prompt = batch_size * [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt

            if prompt is not None and type(prompt) is not type(negative_prompt):
                raise TypeError(
                    f"`negative_prompt` should be the same type to `prompt`, but got {type(negative_prompt)} !="
                    f" {type(prompt)}."
                )
            elif batch_size != len(negative_prompt):
                raise ValueError(
                    f"`negative_prompt`: {negative_prompt} has batch size {len(negative_prompt)}, but `prompt`:"
                    f" {prompt} has batch size {batch_size}. Please make sure that passed `negative_prompt` matches"
                    " the batch size of `prompt`."
                )

            negative_prompt_embeds = self._get_t5_prompt_embeds(
                prompt=negative_prompt,
                num_videos_per_prompt=num_videos_per_prompt,
                max_sequence_length=max_sequence_length,
                device=device,
                dtype=dtype,
            )

        return prompt_embeds, negative_prompt_embeds

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        height,
        width,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        guidance_scale_2=None,
    ):
        if height % 16 != 0 or width % 16 != 0:
            raise ValueError(f"`height` and `width` have to be divisible by 16 but are {height} and {width}.")

        if prompt is not None and prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `prompt`: {prompt} and `prompt_embeds`: {prompt_embeds}. Please make sure to"
                " only forward one of the two."
            )
        elif negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `negative_prompt`: {negative_prompt} and `negative_prompt_embeds`: {negative_prompt_embeds}. Please make sure to"
                " only forward one of the two."
            )
        elif prompt is None and prompt_embeds is None:
            raise ValueError(
                "Provide either `prompt` or `prompt_embeds`. Cannot leave both `prompt` and `prompt_embeds` undefined."
            )
        elif prompt is not None and (not isinstance(prompt, str) and not isinstance(prompt, list)):
            raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}")
        elif negative_prompt is not None and (
            not isinstance(negative_prompt, str) and not isinstance(negative_prompt, list)
        ):
            raise ValueError(f"`negative_prompt` has to be of type `str` or `list` but is {type(negative_prompt)}")

        if self.boundary_ratio is None and guidance_scale_2 is not None:
            raise ValueError("`guidance_scale_2` is only supported when the pipeline's `boundary_ratio` is not None.")

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if latents is not None:
            return latents.to(device=device, dtype=dtype)

        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        shape = (
            batch_size,
            num_channels_latents,
            num_latent_frames,
            int(height) // self.vae_scale_factor_spatial,
            int(width) // self.vae_scale_factor_spatial,
        )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )

        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents

    def request_arguments(
        self, prompt: OmniPromptType, sampling: OmniDiffusionSamplingParams, is_dummy_run: bool
    ) -> dict[str, Any]:
        """Arguments that a request gives; what it omits keeps the default of `prepare_generation`."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        media = fields.get("multi_modal_data") or {}
        for name, reason in self._refused_arguments.items():
            if any(place.get(name) is not None for place in (fields, media, sampling.extra_args)):
                raise ValueError(f"`{name}` can't be set: {reason}.")
        # A sampling field holds None where the request gave nothing; in a dictionary the key tells.
        arguments = {
            "num_videos_per_prompt": sampling.num_outputs_per_prompt,
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "generator": sampling.generator,
            "latents": sampling.latents,
            "output_type": sampling.output_type,
            "max_sequence_length": sampling.max_sequence_length,
            "num_frames": sampling.num_frames if is_dummy_run or sampling.num_frames != 1 else None,
            "guidance_scale": sampling.guidance_scale if sampling.guidance_scale_provided else None,
            "guidance_scale_2": sampling.guidance_scale_2 if sampling.guidance_scale_2_provided else None,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in (
            "prompt",
            "negative_prompt",
            "prompt_embeds",
            "negative_prompt_embeds",
        ):
            if name in fields:
                arguments[name] = fields[name]
        return arguments

    def prepare_generation(
        self,
        prompt: str | list[str] = None,
        negative_prompt: str | list[str] = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str | None = "np",
        max_sequence_length: int = 512,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_scale_2,
        )

        if num_frames % self.vae_scale_factor_temporal != 1:
            logger.warning(
                f"`num_frames - 1` has to be divisible by {self.vae_scale_factor_temporal}. Rounding to the nearest number."
            )
            num_frames = num_frames // self.vae_scale_factor_temporal * self.vae_scale_factor_temporal + 1
        num_frames = max(num_frames, 1)

        patch_size = (
            self.transformer.config.patch_size if self.transformer is not None else self.transformer_2.config.patch_size
        )
        h_multiple_of = self.vae_scale_factor_spatial * patch_size[1]
        w_multiple_of = self.vae_scale_factor_spatial * patch_size[2]
        calc_height = height // h_multiple_of * h_multiple_of
        calc_width = width // w_multiple_of * w_multiple_of
        if height != calc_height or width != calc_width:
            logger.warning(
                f"`height` and `width` must be multiples of ({h_multiple_of}, {w_multiple_of}) for proper patchification. "
                f"Adjusting ({height}, {width}) -> ({calc_height}, {calc_width})."
            )
            height, width = calc_height, calc_width

        if self.boundary_ratio is not None and guidance_scale_2 is None:
            guidance_scale_2 = guidance_scale
        do_classifier_free_guidance = guidance_scale > 1.0

        device = self.device

        # 2. Define call parameters
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        # 3. Encode input prompt
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )

        transformer_dtype = self.dtype if self.transformer is not None else self.dtype
        prompt_embeds = prompt_embeds.to(transformer_dtype)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(transformer_dtype)

        # 4. Prepare timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps

        # 5. Prepare latent variables
        num_channels_latents = (
            self.transformer.config.in_channels
            if self.transformer is not None
            else self.transformer_2.config.in_channels
        )
        latents = self.prepare_latents(
            batch_size * num_videos_per_prompt,
            num_channels_latents,
            height,
            width,
            num_frames,
            torch.float32,
            device,
            generator,
            latents,
        )

        mask = torch.ones(latents.shape, dtype=torch.float32, device=device)
        # 6. Denoising loop

        # We set the index here to remove DtoH sync, helpful especially during compilation.
        # Check out more details here: https://github.com/huggingface/diffusers/pull/11696
        self.scheduler.set_begin_index(0)

        if self.boundary_ratio is not None:
            boundary_timestep = self.boundary_ratio * self.scheduler.config.num_train_timesteps
        else:
            boundary_timestep = None
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "boundary_timestep": boundary_timestep,
                "guidance_scale": guidance_scale,
                "guidance_scale_2": guidance_scale_2,
                "transformer_dtype": transformer_dtype,
                "mask": mask,
                "prompt_embeds": prompt_embeds,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "negative_prompt_embeds": negative_prompt_embeds,
            },
            {
                "output_type": output_type,
            },
        )

    def predict_guided_noise(
        self,
        boundary_timestep,
        t,
        guidance_scale,
        guidance_scale_2,
        latents,
        transformer_dtype,
        mask,
        prompt_embeds,
        do_classifier_free_guidance,
        negative_prompt_embeds,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""

        if boundary_timestep is None or t >= boundary_timestep:
            # wan2.1 or high-noise stage in wan2.2
            current_model = self.transformer
            current_guidance_scale = guidance_scale
        else:
            # low-noise stage in wan2.2
            current_model = self.transformer_2
            current_guidance_scale = guidance_scale_2

        latent_model_input = latents.to(transformer_dtype)
        if self.expand_timesteps:
            # seq_len: num_latent_frames * latent_height//2 * latent_width//2
            temp_ts = (mask[0][0][:, ::2, ::2] * t).flatten()
            # batch_size, seq_len
            timestep = temp_ts.unsqueeze(0).expand(latents.shape[0], -1)
        else:
            timestep = t.expand(latents.shape[0])
        positive_kwargs = {
            "current_model": current_model,
            "hidden_states": latent_model_input,
            "timestep": timestep,
            "encoder_hidden_states": prompt_embeds,
        }
        negative_kwargs = positive_kwargs | {
            "encoder_hidden_states": negative_prompt_embeds,
        }
        return self.predict_noise_maybe_with_cfg(
            do_classifier_free_guidance, current_guidance_scale, positive_kwargs, negative_kwargs, cfg_normalize=False
        )

    def predict_noise(self, current_model, **kwargs):
        """The prediction of one guidance branch."""
        return current_model(**kwargs)[0]

    def predict_noise_maybe_with_cfg(self, do_true_cfg: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the engine's, and Cache-DiT knows the branches."""
        for name in self._dit_modules:
            keep_branches_apart(getattr(self, name), 2 if do_true_cfg else 1)
        return super().predict_noise_maybe_with_cfg(do_true_cfg, *args, **kwargs)

    def diffuse(
        self,
        latents,
        timesteps,
        boundary_timestep,
        guidance_scale,
        guidance_scale_2,
        transformer_dtype,
        mask,
        prompt_embeds,
        do_classifier_free_guidance,
        negative_prompt_embeds,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            begin_anew(self.transformer_2)
            for t in timesteps:
                noise_pred = self.predict_guided_noise(
                    boundary_timestep=boundary_timestep,
                    t=t,
                    guidance_scale=guidance_scale,
                    guidance_scale_2=guidance_scale_2,
                    latents=latents,
                    transformer_dtype=transformer_dtype,
                    mask=mask,
                    prompt_embeds=prompt_embeds,
                    do_classifier_free_guidance=do_classifier_free_guidance,
                    negative_prompt_embeds=negative_prompt_embeds,
                )

                # compute the previous noisy sample x_t -> x_t-1
                latents = self.scheduler_step_maybe_with_cfg(
                    noise_pred, t, latents, do_true_cfg=do_classifier_free_guidance
                )
                progress_bar.update()
        return latents

    def decode(
        self,
        latents,
        output_type,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        if not output_type == "latent":
            latents = latents.to(self.vae.dtype)
            latents_mean = (
                torch.tensor(self.vae.config.latents_mean)
                .view(1, self.vae.config.z_dim, 1, 1, 1)
                .to(latents.device, latents.dtype)
            )
            latents_std = 1.0 / torch.tensor(self.vae.config.latents_std).view(1, self.vae.config.z_dim, 1, 1, 1).to(
                latents.device, latents.dtype
            )
            latents = latents / latents_std + latents_mean
            video = self.vae.decode(latents, return_dict=False)[0]
        else:
            video = latents
        return video

    def generate(self, inputs: dict[str, Any], decode_inputs: dict[str, Any]) -> DiffusionOutput:
        """Denoise what was prepared, and decode it."""
        return self.finish(latents=self.diffuse(**inputs), **decode_inputs)

    def finish(self, **inputs: Any) -> DiffusionOutput:
        """Decode, and wrap for the engine."""
        video = self.decode(**inputs)
        # A rank that does not own the decoded video has a placeholder of another shape.
        if inputs["output_type"] == "latent" or video.ndim != 5:
            output = DiffusionOutput(output=video)
        else:
            spec = VideoTensorSpec(
                layout=VideoTensorLayout.BCTHW,
                encoding=VideoTensorEncoding.NORMALIZED_FLOAT,
                value_range=VideoValueRange.NEGATIVE_ONE_TO_ONE,
            )
            output = DiffusionOutput(media=DiffusionMediaOutput(video=VideoMediaOutput(tensor=video, spec=spec)))
        if self.enable_diffusion_pipeline_profiler:
            output.stage_durations = self.stage_durations
        return output

    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        requests = [
            self.request_arguments(p, s, req.is_dummy_run())
            for p, s in zip(req.prompts, req.sampling_params_list, strict=True)
        ]
        if len(requests) > 1 and self.share_settings(requests):
            return self.generate_together(requests)
        return [self.generate(*self.prepare_generation(**arguments)) for arguments in requests]

    def share_settings(self, requests: list[dict[str, Any]]) -> bool:
        """Whether requests differ in nothing but what each of them brings, which is one row."""
        first = requests[0]
        for arguments in requests:
            if arguments["num_videos_per_prompt"] != 1 or arguments.keys() != first.keys():
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
        inputs, state.extra["decode"] = self.prepare_generation(
            **self.request_arguments(
                state.prompt, state.sampling, OmniDiffusionRequest.is_dummy_run_request_id(state.request_id)
            )
        )
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
                    boundary_timestep=inputs["boundary_timestep"],
                    t=state.current_timestep,
                    guidance_scale=inputs["guidance_scale"],
                    guidance_scale_2=inputs["guidance_scale_2"],
                    latents=state.latents,
                    transformer_dtype=inputs["transformer_dtype"],
                    mask=inputs["mask"],
                    prompt_embeds=inputs["prompt_embeds"],
                    do_classifier_free_guidance=inputs["do_classifier_free_guidance"],
                    negative_prompt_embeds=inputs["negative_prompt_embeds"],
                )
            )
        return torch.cat(predictions)

    def step_scheduler(self, state: StepRequestState, noise_pred: torch.Tensor, **kwargs: Any) -> None:
        """Step execution: one step of the request's own scheduler."""
        state.latents = self.scheduler_step_maybe_with_cfg(
            noise_pred, state.current_timestep, state.latents, do_true_cfg=False, per_request_scheduler=state.scheduler
        )
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **kwargs: Any) -> DiffusionOutput:
        """Step execution: decode a finished request."""
        return self.finish(latents=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
