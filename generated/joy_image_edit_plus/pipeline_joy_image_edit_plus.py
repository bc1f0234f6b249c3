# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.JoyImageEditPlusPipeline (pipelines/joyimage/pipeline_joyimage_edit_plus.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from cache_dit import refresh_context
from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_wan import DistributedAutoencoderKLWan
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.hub_prefetch import from_pretrained_with_prefetch
from vllm_omni.diffusion.models.interface import SupportImageInput, SupportsComponentDiscovery
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.profiler.diffusion_pipeline_profiler import DiffusionPipelineProfilerMixin
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.diffusion.worker.utils import StepRequestState
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType
from vllm_omni.platforms import current_omni_platform

from .joy_image_edit_plus_transformer import JoyImageEditPlusTransformer3DModel


# Copied from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.retrieve_timesteps
def retrieve_timesteps(
    scheduler,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    **kwargs,
):
    r"""
    Calls the scheduler's `set_timesteps` method and retrieves timesteps from the scheduler after the call. Handles
    custom timesteps. Any kwargs will be supplied to `scheduler.set_timesteps`.

    Args:
        scheduler (`SchedulerMixin`):
            The scheduler to get timesteps from.
        num_inference_steps (`int`):
            The number of diffusion steps used when generating samples with a pre-trained model. If used, `timesteps`
            must be `None`.
        device (`str` or `torch.device`, *optional*):
            The device to which the timesteps should be moved to. If `None`, the timesteps are not moved.
        timesteps (`list[int]`, *optional*):
            Custom timesteps used to override the timestep spacing strategy of the scheduler. If `timesteps` is passed,
            `num_inference_steps` and `sigmas` must be `None`.
        sigmas (`list[float]`, *optional*):
            Custom sigmas used to override the timestep spacing strategy of the scheduler. If `sigmas` is passed,
            `num_inference_steps` and `timesteps` must be `None`.

    Returns:
        `tuple[torch.Tensor, int]`: A tuple where the first element is the timestep schedule from the scheduler and the
        second element is the number of inference steps.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Only one of `timesteps` or `sigmas` can be passed. Please choose one to set custom values")
    if timesteps is not None:
        accepts_timesteps = "timesteps" in set(inspect.signature(scheduler.set_timesteps).parameters.keys())
        if not accepts_timesteps:
            raise ValueError(
                f"The current scheduler class {scheduler.__class__}'s `set_timesteps` does not support custom"
                f" timestep schedules. Please check whether you are using the correct scheduler."
            )
        scheduler.set_timesteps(timesteps=timesteps, device=device, **kwargs)
        timesteps = scheduler.timesteps
        num_inference_steps = len(timesteps)
    elif sigmas is not None:
        accept_sigmas = "sigmas" in set(inspect.signature(scheduler.set_timesteps).parameters.keys())
        if not accept_sigmas:
            raise ValueError(
                f"The current scheduler class {scheduler.__class__}'s `set_timesteps` does not support custom"
                f" sigmas schedules. Please check whether you are using the correct scheduler."
            )
        scheduler.set_timesteps(sigmas=sigmas, device=device, **kwargs)
        timesteps = scheduler.timesteps
        num_inference_steps = len(timesteps)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device, **kwargs)
        timesteps = scheduler.timesteps
    return timesteps, num_inference_steps


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


def get_joy_image_edit_plus_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """Pre-processing of `JoyImageEditPlusPipeline`: what its media need before a model; it runs in the engine process."""
    vae_config = read_json(od_config, "vae/config.json")
    vae_scale_factor_spatial = vae_config.get("scale_factor_spatial", 8)
    image_processor = JoyImageEditImageProcessor(vae_scale_factor=vae_scale_factor_spatial)

    def prepare_media(
        *,
        images: list[Image.Image] | list[list[Image.Image]] | None = None,
        height: int | None = None,
        width: int | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The values that `prepare_generation` has no need to compute then."""
        prepared = {}
        # Normalize images input to List[List[Image]]
        if images is not None:
            if isinstance(images[0], Image.Image):
                images = [images]  # single sample

        # Determine output resolution from last reference image if not specified
        if height is None or width is None:
            if images is not None and len(images[0]) > 0:
                last_img = images[0][-1]
                height, width = image_processor.get_default_height_width(last_img)
            else:
                height = height or 1024
                width = width or 1024
            prepared["height"] = height
            prepared["width"] = width

        # Pre-process images: bucket-resize each reference image (matching original pipeline)
        if images is not None:
            processed_images = []
            for sample_imgs in images:
                processed_sample = []
                for img in sample_imgs:
                    ref_h, ref_w = image_processor.get_default_height_width(img)
                    resize_img = image_processor.resize_center_crop(img, (ref_h, ref_w))
                    processed_sample.append(resize_img)
                processed_images.append(processed_sample)
            prepared["images"] = processed_images
        return prepared

    def shape_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(shape_of(each) for each in value)
        return tuple(value.shape) if isinstance(value, torch.Tensor) else getattr(value, "size", None)

    def pre_process_func(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        prompt = request.prompt
        if isinstance(prompt, str) or not prompt.get("multi_modal_data"):
            return request
        try:
            arguments = JoyImageEditPlusPipeline.request_arguments(prompt, request.sampling_params)
            prepared = prepare_media(**arguments)
        except Exception:  # what is wrong with a request, the pipeline itself says, after Diffusers' own checks
            return request
        information = prompt.get("additional_information") or {}
        # Requests take their steps together only where their tensors have equal shapes.
        request.batch_compatibility_key = tuple((name, shape_of(value)) for name, value in prepared.items())
        request.prompt = {**prompt, "additional_information": {**information, "prepared_media": prepared}}
        return request

    return pre_process_func


def get_joy_image_edit_plus_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Post-processing of `JoyImageEditPlusPipeline`; it runs in the engine process, where no model is loaded."""
    processor = JoyImageEditImageProcessor()

    def post_process_func(image: torch.Tensor, sampling_params: OmniDiffusionSamplingParams | None = None) -> Any:
        output_type = sampling_params.output_type if sampling_params is not None else None
        if output_type is None:
            output_type = "pil"
        if output_type == "latent":
            return image
        return processor.postprocess(image, output_type=output_type)

    return post_process_func


class JoyImageEditPlusPipeline(
    nn.Module,
    SupportImageInput,
    CFGParallelMixin,
    ProgressBarMixin,
    DiffusionPipelineProfilerMixin,
    SupportsComponentDiscovery,
):
    """Diffusion pipeline for multi-image instruction-guided editing using JoyImage Edit Plus."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 30
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
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
        "prompt_embeds_mask",
        "negative_prompt_embeds",
        "negative_prompt_embeds_mask",
    )
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "images",
        "prompt",
        "negative_prompt",
        "generator",
        "latents",
        "prompt_embeds",
        "prompt_embeds_mask",
        "negative_prompt_embeds",
        "negative_prompt_embeds_mask",
        "prepared_media",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "latents",
        "target_mask",
        "clean_reference_backup",
        "shape_list",
        "prompt_embeds",
        "prompt_embeds_mask",
    )
    _branch_rows: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "prompt_embeds_mask",
    )
    _row_counts: ClassVar[tuple[str, ...]] = ("batch_size",)
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
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.processor = load_component(od_config, model_index, "processor")
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
        self.transformer = JoyImageEditPlusTransformer3DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, JoyImageEditPlusTransformer3DModel),
        )
        self.vae_scale_factor_spatial = self.vae.config.scale_factor_spatial
        self.image_processor = JoyImageEditImageProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

        self.prompt_template_encode = {
            "multiple_images": (
                "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, "
                "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
                "{}<|im_start|>assistant\n"
            ),
        }
        self.prompt_template_encode_start_idx = {
            "multiple_images": 34,
        }
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    # ------------------------------------------------------------------
    # Internal helpers
    # ------------------------------------------------------------------

    def _get_last_decoder_hidden_states(self, forward_fn, **kwargs):
        """
        Run ``forward_fn(**kwargs)`` while capturing the **pre-norm** output of the last decoder layer via a forward
        hook.

        This model was trained on transformers 4.57, where ``Qwen3VLForConditionalGeneration``'s
        ``@check_model_inputs`` decorator monkey-patched each decoder layer to collect ``hidden_states``. Because
        ``Qwen3VLCausalLMOutputWithPast`` has no ``last_hidden_state`` field, ``tie_last_hidden_states`` had no effect
        and ``hidden_states[-1]`` was the **pre-norm** output of the last decoder layer.

        Starting from https://github.com/huggingface/transformers/pull/42609 the CausalLM forward explicitly returns
        ``hidden_states=outputs.hidden_states`` from the inner model. Combined with the subsequent
        ``@check_model_inputs`` → ``@capture_outputs`` migration (transformers 5.x), ``hidden_states`` is now captured
        at the ``Qwen3VLTextModel`` level where ``tie_last_hidden_states=True`` replaces ``hidden_states[-1]`` with the
        **post-norm** ``last_hidden_state``. The CausalLM simply passes this through, so ``hidden_states[-1]`` becomes
        post-norm – a ~10x scale difference (std ~2 vs ~21) that breaks inference.

        This helper bypasses both mechanisms by hooking the last decoder layer directly, returning the raw pre-norm
        output regardless of the transformers version.
        """
        captured = {}

        def _hook(_module, _input, output):
            captured["hidden_states"] = output[0] if isinstance(output, tuple) else output

        handle = self.text_encoder.model.language_model.layers[-1].register_forward_hook(_hook)
        try:
            forward_fn(**kwargs)
        finally:
            handle.remove()
        return captured["hidden_states"]

    def encode_prompt_multiple_images(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        images: list[Image.Image] | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts with inline <image> tokens via the Qwen3-VL processor."""
        device = device or self.device
        template = self.prompt_template_encode["multiple_images"]
        drop_idx = self.prompt_template_encode_start_idx["multiple_images"]

        prompt = [prompt] if isinstance(prompt, str) else prompt
        prompt = [p.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>") for p in prompt]
        prompt = [template.format(p) for p in prompt]

        inputs = self.processor(
            text=prompt,
            images=images,
            padding=True,
            return_tensors="pt",
        ).to(device)

        last_hidden_states = self._get_last_decoder_hidden_states(self.text_encoder, **inputs)

        prompt_embeds = last_hidden_states[:, drop_idx:]
        prompt_embeds_mask = inputs["attention_mask"][:, drop_idx:]

        if max_sequence_length is not None and prompt_embeds.shape[1] > max_sequence_length:
            prompt_embeds = prompt_embeds[:, -max_sequence_length:, :]
            prompt_embeds_mask = prompt_embeds_mask[:, -max_sequence_length:]

        return prompt_embeds, prompt_embeds_mask

    def _pad_sequence(self, x: torch.Tensor, target_length: int) -> torch.Tensor:
        current_length = x.shape[1]
        if current_length >= target_length:
            return x[:, -target_length:]
        padding_length = target_length - current_length
        if x.ndim >= 3:
            padding = torch.zeros((x.shape[0], padding_length, *x.shape[2:]), dtype=x.dtype, device=x.device)
        else:
            padding = torch.zeros((x.shape[0], padding_length), dtype=x.dtype, device=x.device)
        return torch.cat([x, padding], dim=1)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        reference_images: list[list[Image.Image]] | None = None,
        latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[int, int, int]]]]:
        """Prepare 6D padded latent tensor with target noise + reference image latents.

        Args:
            latents: Optional pre-computed noise for the target slot. Shape ``(B, C, 1, H', W')`` where
                ``H'`` and ``W'`` are the latent-space dimensions. When ``None``, random noise is sampled.

        Returns:
            padded_latents: [B, max_patches, C, pt, ph, pw] target_mask: [B, max_patches] (True for target patches)
            shape_list: per-sample list of (t, h, w) tuples for each component
        """
        pt, ph, pw = self.transformer.config.patch_size

        all_patches = []
        all_target_masks = []
        all_shape_lists = []
        max_patches = 0

        for i in range(batch_size):
            sample_gen = generator[i] if isinstance(generator, list) else generator

            # Target noise
            t_target = 1
            h_target = int(height) // self.vae_scale_factor_spatial
            w_target = int(width) // self.vae_scale_factor_spatial
            if latents is None:
                noise_shape = (num_channels_latents, t_target, h_target, w_target)
                noise_block = randn_tensor(noise_shape, generator=sample_gen, device=device, dtype=dtype)
            else:
                noise_block = latents[i].to(device=device, dtype=dtype)

            sample_items = [noise_block]

            # Reference images
            if reference_images is not None and reference_images[i]:
                for ref_img_pil in reference_images[i]:
                    ref_tensor = self.image_processor.preprocess(ref_img_pil).to(device=device, dtype=dtype)
                    ref_tensor = ref_tensor.unsqueeze(2)  # [B, C, H, W] -> [B, C, 1, H, W]

                    ref_latent = self.vae.encode(ref_tensor.to(self.vae.dtype)).latent_dist.mode()
                    ref_latent = ref_latent.to(dtype)
                    latents_mean = (
                        torch.tensor(self.vae.config.latents_mean)
                        .view(1, -1, 1, 1, 1)
                        .to(ref_latent.device, ref_latent.dtype)
                    )
                    latents_std = (
                        torch.tensor(self.vae.config.latents_std)
                        .view(1, -1, 1, 1, 1)
                        .to(ref_latent.device, ref_latent.dtype)
                    )
                    ref_latent = (ref_latent - latents_mean) / latents_std
                    ref_latent = ref_latent.squeeze(0)  # [C, 1, H', W']
                    sample_items.append(ref_latent)

            # Patchify each item and build shape_list
            sample_patches = []
            sample_masks = []
            sample_shapes = []

            for j, item in enumerate(sample_items):
                c, t, h, w = item.shape
                l_t, l_h, l_w = t // pt, h // ph, w // pw
                sample_shapes.append((l_t, l_h, l_w))

                patches = item.reshape(c, l_t, pt, l_h, ph, l_w, pw)
                patches = patches.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c, pt, ph, pw)
                sample_patches.append(patches)
                sample_masks.append(torch.full((patches.shape[0],), j == 0, device=device, dtype=torch.bool))

            combined_patches = torch.cat(sample_patches, dim=0)
            combined_masks = torch.cat(sample_masks, dim=0)

            all_patches.append(combined_patches)
            all_target_masks.append(combined_masks)
            all_shape_lists.append(sample_shapes)
            max_patches = max(max_patches, combined_patches.shape[0])

        # Pad to uniform size
        padded_latents = torch.zeros(
            (batch_size, max_patches, num_channels_latents, pt, ph, pw), device=device, dtype=dtype
        )
        target_mask = torch.zeros((batch_size, max_patches), device=device, dtype=torch.bool)

        for i in range(batch_size):
            n = all_patches[i].shape[0]
            padded_latents[i, :n] = all_patches[i]
            target_mask[i, :n] = all_target_masks[i]

        return padded_latents, target_mask, all_shape_lists

    # ------------------------------------------------------------------
    # Forward pass
    # ------------------------------------------------------------------

    def check_inputs(
        self,
        prompt,
        height,
        width,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
    ):
        if height is not None and height % self.vae_scale_factor_spatial != 0:
            raise ValueError(f"`height` must be divisible by {self.vae_scale_factor_spatial} but is {height}.")
        if width is not None and width % self.vae_scale_factor_spatial != 0:
            raise ValueError(f"`width` must be divisible by {self.vae_scale_factor_spatial} but is {width}.")

        if prompt is not None and prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `prompt`: {prompt} and `prompt_embeds`: {prompt_embeds}. Please make sure to"
                " only forward one of the two."
            )
        elif prompt is None and prompt_embeds is None:
            raise ValueError(
                "Provide either `prompt` or `prompt_embeds`. Cannot leave both `prompt` and `prompt_embeds` undefined."
            )
        elif prompt is not None and (not isinstance(prompt, str) and not isinstance(prompt, list)):
            raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}")

        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `negative_prompt`: {negative_prompt} and `negative_prompt_embeds`:"
                f" {negative_prompt_embeds}. Please make sure to only forward one of the two."
            )

    @classmethod
    def request_arguments(cls, prompt: OmniPromptType, sampling: OmniDiffusionSamplingParams) -> dict[str, Any]:
        """Arguments that a request gives; what it omits keeps the default of `prepare_generation`."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        media = fields.get("multi_modal_data") or {}
        for name, reason in cls._refused_arguments.items():
            if any(place.get(name) is not None for place in (fields, media, sampling.extra_args)):
                raise ValueError(f"`{name}` can't be set: {reason}.")
        # A sampling field holds None where the request gave nothing; in a dictionary the key tells.
        arguments = {
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "timesteps": sampling.timesteps,
            "sigmas": sampling.sigmas,
            "generator": sampling.generator,
            "latents": sampling.latents,
            "output_type": sampling.output_type,
            "max_sequence_length": sampling.max_sequence_length,
            "guidance_scale": sampling.guidance_scale if sampling.guidance_scale_provided else None,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in (
            "prompt",
            "negative_prompt",
            "prompt_embeds",
            "prompt_embeds_mask",
            "negative_prompt_embeds",
            "negative_prompt_embeds_mask",
        ):
            if name in fields:
                arguments[name] = fields[name]
        for name in ("images",):
            if name in media:
                arguments[name] = media[name]
        for name, key in (("images", "image"),):  # what the engine calls them
            if key in media and name not in arguments:
                arguments[name] = media[key]
        information = fields.get("additional_information") or {}
        if "prepared_media" in information:
            arguments["prepared_media"] = information["prepared_media"]
        return arguments

    def prepare_generation(
        self,
        images: list[Image.Image] | list[list[Image.Image]] | None = None,
        prompt: str | list[str] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 4.0,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str | None = "pil",
        max_sequence_length: int = 4096,
        prepared_media: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""
        # Normalize images input to List[List[Image]]
        if images is not None:
            if isinstance(images[0], Image.Image):
                images = [images]  # single sample

        self.check_inputs(
            prompt=prompt,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        do_classifier_free_guidance = guidance_scale > 1

        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        # Determine output resolution from last reference image if not specified
        if "height" in prepared_media:
            height = prepared_media["height"]
            width = prepared_media["width"]
        elif height is None or width is None:
            if images is not None and len(images[0]) > 0:
                last_img = images[0][-1]
                height, width = self.image_processor.get_default_height_width(last_img)
            else:
                height = height or 1024
                width = width or 1024

        device = self.device

        # Pre-process images: bucket-resize each reference image (matching original pipeline)
        if "images" in prepared_media:
            images = prepared_media["images"]
        elif images is not None:
            processed_images = []
            for sample_imgs in images:
                processed_sample = []
                for img in sample_imgs:
                    ref_h, ref_w = self.image_processor.get_default_height_width(img)
                    resize_img = self.image_processor.resize_center_crop(img, (ref_h, ref_w))
                    processed_sample.append(resize_img)
                processed_images.append(processed_sample)
            images = processed_images

        # Construct prompts with <image> tokens
        prompt = [prompt] if isinstance(prompt, str) else prompt
        if images is not None:
            formatted_prompts = []
            for i in range(batch_size):
                num_refs = len(images[i]) if i < len(images) else 0
                image_tags = "".join(["<image>\n" for _ in range(num_refs)])
                p = prompt[i] if i < len(prompt) else prompt[0]
                formatted_prompts.append(f"<|im_start|>user\n{image_tags}{p}<|im_end|>\n")
        else:
            formatted_prompts = [f"<|im_start|>user\n{p}<|im_end|>\n" for p in prompt]

        # Flatten all images for the processor
        flattened_images = None
        if images is not None:
            flattened_images = [img for sublist in images for img in sublist]

        # Encode prompt
        if prompt_embeds is None:
            prompt_embeds, prompt_embeds_mask = self.encode_prompt_multiple_images(
                prompt=formatted_prompts,
                images=flattened_images,
                device=device,
                max_sequence_length=max_sequence_length,
            )

        # Encode negative prompt for CFG
        if do_classifier_free_guidance:
            if negative_prompt is None and negative_prompt_embeds is None:
                neg_prompts = []
                for i in range(batch_size):
                    num_refs = len(images[i]) if images is not None and i < len(images) else 0
                    image_tags = "".join(["<image>\n" for _ in range(num_refs)])
                    neg_prompts.append(f"<|im_start|>user\n{image_tags} <|im_end|>\n")
                negative_prompt = neg_prompts
            elif negative_prompt is not None and negative_prompt_embeds is None:
                neg_list = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
                neg_prompts = []
                for i in range(batch_size):
                    num_refs = len(images[i]) if images is not None and i < len(images) else 0
                    image_tags = "".join(["<image>\n" for _ in range(num_refs)])
                    n = neg_list[i] if i < len(neg_list) else neg_list[0]
                    neg_prompts.append(f"<|im_start|>user\n{image_tags}{n}<|im_end|>\n")
                negative_prompt = neg_prompts

            if negative_prompt_embeds is None:
                neg_prompt_list = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
                negative_prompt_embeds, negative_prompt_embeds_mask = self.encode_prompt_multiple_images(
                    prompt=neg_prompt_list,
                    images=flattened_images,
                    device=device,
                    max_sequence_length=max_sequence_length,
                )

            # Pad and concatenate [negative, positive]
            max_seq_len = max(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])
            prompt_embeds = torch.cat(
                [
                    self._pad_sequence(negative_prompt_embeds, max_seq_len),
                    self._pad_sequence(prompt_embeds, max_seq_len),
                ]
            )
            if prompt_embeds_mask is not None and negative_prompt_embeds_mask is not None:
                prompt_embeds_mask = torch.cat(
                    [
                        self._pad_sequence(negative_prompt_embeds_mask, max_seq_len),
                        self._pad_sequence(prompt_embeds_mask, max_seq_len),
                    ]
                )

        # Prepare timesteps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )

        # Prepare latents (patchified)
        num_channels_latents = self.transformer.config.in_channels
        latents, target_mask, shape_list = self.prepare_latents(
            batch_size=batch_size,
            num_channels_latents=num_channels_latents,
            height=height,
            width=width,
            dtype=prompt_embeds.dtype,
            device=device,
            generator=generator,
            reference_images=images,
            latents=latents,
        )
        # Denoising loop
        clean_reference_backup = latents.clone()
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "target_mask": target_mask,
                "clean_reference_backup": clean_reference_backup,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "shape_list": shape_list,
                "batch_size": batch_size,
                "prompt_embeds": prompt_embeds,
                "prompt_embeds_mask": prompt_embeds_mask,
                "guidance_scale": guidance_scale,
            },
            {
                "output_type": output_type,
                "target_mask": target_mask,
                "clean_reference_backup": clean_reference_backup,
                "batch_size": batch_size,
                "shape_list": shape_list,
            },
        )

    def predict_guided_noise(
        self,
        latents,
        target_mask,
        clean_reference_backup,
        do_classifier_free_guidance,
        t,
        shape_list,
        batch_size,
        prompt_embeds,
        prompt_embeds_mask,
        guidance_scale,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""

        # Restore reference patches
        latents[~target_mask] = clean_reference_backup[~target_mask]

        model_input = latents

        # CFG expansion
        if do_classifier_free_guidance:
            model_input_cfg = torch.cat([model_input] * 2)
            t_expand = t.repeat(model_input_cfg.shape[0])
            cfg_shape_list = shape_list * 2
        else:
            model_input_cfg = model_input
            t_expand = t.repeat(batch_size)
            cfg_shape_list = shape_list

        # Transformer forward
        noise_pred = self.transformer(
            hidden_states=model_input_cfg,
            timestep=t_expand,
            encoder_hidden_states=prompt_embeds,
            encoder_hidden_states_mask=prompt_embeds_mask,
            shape_list=cfg_shape_list,
            return_dict=False,
        )[0]

        # CFG combination with norm rescaling
        if do_classifier_free_guidance:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            comb_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
            cond_norm = torch.norm(noise_pred_text, dim=2, keepdim=True)
            noise_norm = torch.norm(comb_pred, dim=2, keepdim=True)
            noise_pred = comb_pred * (cond_norm / noise_norm.clamp_min(1e-6))
        return noise_pred

    def step_latents(self, scheduler, noise_pred, t, latents, prompt_embeds):

        # Scheduler step
        latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0].to(dtype=prompt_embeds.dtype)
        return latents

    def diffuse(
        self,
        latents,
        timesteps,
        target_mask,
        clean_reference_backup,
        do_classifier_free_guidance,
        shape_list,
        batch_size,
        prompt_embeds,
        prompt_embeds_mask,
        guidance_scale,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            for t in timesteps:
                noise_pred = self.predict_guided_noise(
                    latents=latents,
                    target_mask=target_mask,
                    clean_reference_backup=clean_reference_backup,
                    do_classifier_free_guidance=do_classifier_free_guidance,
                    t=t,
                    shape_list=shape_list,
                    batch_size=batch_size,
                    prompt_embeds=prompt_embeds,
                    prompt_embeds_mask=prompt_embeds_mask,
                    guidance_scale=guidance_scale,
                )
                latents = self.step_latents(
                    self.scheduler, noise_pred=noise_pred, t=t, latents=latents, prompt_embeds=prompt_embeds
                )
                progress_bar.update()
        return latents

    def decode(
        self,
        latents,
        output_type,
        target_mask,
        clean_reference_backup,
        batch_size,
        shape_list,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        # Post-processing: decode target latents
        if output_type != "latent":
            latents[~target_mask] = clean_reference_backup[~target_mask]
            pt, ph, pw = self.transformer.config.patch_size

            image_list = []
            for b_idx in range(batch_size):
                l_t, l_h, l_w = shape_list[b_idx][0]
                target_len = l_t * l_h * l_w

                target_patches = latents[b_idx, :target_len]
                c_lat = target_patches.shape[1]
                video_latent = target_patches.reshape(l_t, l_h, l_w, c_lat, pt, ph, pw)
                video_latent = video_latent.permute(3, 0, 4, 1, 5, 2, 6).reshape(1, c_lat, l_t * pt, l_h * ph, l_w * pw)

                latents_mean = (
                    torch.tensor(self.vae.config.latents_mean)
                    .view(1, -1, 1, 1, 1)
                    .to(video_latent.device, video_latent.dtype)
                )
                latents_std = (
                    torch.tensor(self.vae.config.latents_std)
                    .view(1, -1, 1, 1, 1)
                    .to(video_latent.device, video_latent.dtype)
                )
                video_latent = video_latent * latents_std + latents_mean

                sample_image = self.vae.decode(video_latent.to(self.vae.dtype), return_dict=False)[0]
                # [1, C, T=1, H, W] -> [C, H, W]
                sample_image = sample_image.float().squeeze(0).squeeze(1)
                image_list.append(sample_image)

            image = torch.stack(image_list)  # [B, C, H, W]
        else:
            image = latents
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
            if arguments.keys() != first.keys():
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
                elif name in self._row_counts:
                    joined[name] = sum(values)
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
                    target_mask=inputs["target_mask"],
                    clean_reference_backup=inputs["clean_reference_backup"],
                    do_classifier_free_guidance=inputs["do_classifier_free_guidance"],
                    t=state.current_timestep,
                    shape_list=inputs["shape_list"],
                    batch_size=inputs["batch_size"],
                    prompt_embeds=inputs["prompt_embeds"],
                    prompt_embeds_mask=inputs["prompt_embeds_mask"],
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
            prompt_embeds=inputs["prompt_embeds"],
        )
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **kwargs: Any) -> DiffusionOutput:
        """Step execution: decode a finished request."""
        return self.finish(latents=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
