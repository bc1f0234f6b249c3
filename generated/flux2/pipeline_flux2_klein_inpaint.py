# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.Flux2KleinInpaintPipeline (pipelines/flux2/pipeline_flux2_klein_inpaint.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from cache_dit import DBCacheConfig, refresh_context
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import nn
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_flux2 import DistributedAutoencoderKLFlux2
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.parallel_state import (
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
)
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

from .flux2_transformer import Flux2Transformer2DModel


# Copied from diffusers.pipelines.flux2.pipeline_flux2.compute_empirical_mu
def compute_empirical_mu(image_seq_len: int, num_steps: int) -> float:
    a1, b1 = 8.73809524e-05, 1.89833333
    a2, b2 = 0.00016927, 0.45666666

    if image_seq_len > 4300:
        mu = a2 * image_seq_len + b2
        return float(mu)

    m_200 = a2 * image_seq_len + b2
    m_10 = a1 * image_seq_len + b1

    a = (m_200 - m_10) / 190.0
    b = m_200 - 200.0 * a
    mu = a * num_steps + b

    return float(mu)


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


# Copied from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.retrieve_latents
def retrieve_latents(
    encoder_output: torch.Tensor, generator: torch.Generator | None = None, sample_mode: str = "sample"
):
    if hasattr(encoder_output, "latent_dist") and sample_mode == "sample":
        return encoder_output.latent_dist.sample(generator)
    elif hasattr(encoder_output, "latent_dist") and sample_mode == "argmax":
        return encoder_output.latent_dist.mode()
    elif hasattr(encoder_output, "latents"):
        return encoder_output.latents
    else:
        raise AttributeError("Could not access latents of provided encoder_output")


logger = init_logger(__name__)  # pylint: disable=invalid-name


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
    component_class = {"AutoencoderKLFlux2": DistributedAutoencoderKLFlux2}.get(class_name) or getattr(
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


def join_rows(values: Sequence[Any]) -> Any:
    """What each request brings, one row behind the other."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise SeparateRequests
    if isinstance(first, torch.Generator):
        return list(values)
    if isinstance(first, dict) and all(value.keys() == first.keys() for value in values):
        return {key: join_rows([value[key] for value in values]) for key in first}
    if isinstance(first, torch.Tensor) and first.ndim:
        if any(value.shape != first.shape for value in values):
            raise SeparateRequests
        if len(first) == 1:
            return torch.cat(list(values))
    if isinstance(first, (list, tuple)) and all(len(value) == len(first) for value in values):
        held = any(isinstance(entry, torch.Tensor) and entry.shape[:1] == (1,) for entry in first)
        if isinstance(first, list) and len(first) == 1 and not held:  # an entry for each prompt
            return [value[0] for value in values]
        return type(first)(join_rows(entries) for entries in zip(*values))
    return agreed(values)


def get_flux2_klein_inpaint_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """Pre-processing of `Flux2KleinInpaintPipeline`: what its media need before a model; it runs in the engine process."""
    vae_config = read_json(od_config, "vae/config.json")

    vae_scale_factor = 2 ** (len(vae_config.get("block_out_channels", (128, 256, 512, 512))) - 1)
    # Flux latents are turned into 2x2 patches and packed. This means the latent width and height has to be divisible
    # by the patch size. So the vae scale factor is multiplied by the patch size to account for this
    latent_channels = vae_config.get("latent_channels", 32)
    image_processor = Flux2ImageProcessor(vae_scale_factor=vae_scale_factor * 2, vae_latent_channels=latent_channels)
    mask_processor = Flux2ImageProcessor(
        vae_scale_factor=vae_scale_factor * 2,
        vae_latent_channels=latent_channels,
        do_normalize=False,
        do_binarize=True,
        do_convert_rgb=False,
        do_convert_grayscale=True,
    )
    default_sample_size = 128

    def prepare_media(
        *,
        image: PipelineImageInput | None = None,
        image_reference: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The values that `prepare_generation` has no need to compute then."""
        prepared = {}

        height = height or default_sample_size * vae_scale_factor
        width = width or default_sample_size * vae_scale_factor

        # 2. Preprocess image
        multiple_of = vae_scale_factor * 2
        crops_coords = None
        if isinstance(image, torch.Tensor) and image.ndim == 4 and image.size(1) == latent_channels * 4:
            crops_coords = None
            resize_mode = "default"
            height = image.shape[2] * vae_scale_factor * 2
            width = image.shape[3] * vae_scale_factor * 2
        elif image is not None:
            if isinstance(image, list) and isinstance(image[0], torch.Tensor) and image[0].ndim == 4:
                image = torch.cat(image, dim=0)
            img = image[0] if isinstance(image, list) else image
            raw_h, raw_w = Flux2KleinInpaintPipeline._get_raw_image_size(img)

            if raw_h * raw_w > 1024 * 1024:
                scale = math.sqrt(1024 * 1024 / (raw_h * raw_w))
                image = image_processor.resize(image, int(raw_h * scale), int(raw_w * scale))
                img = image[0] if isinstance(image, list) else image
                raw_h, raw_w = Flux2KleinInpaintPipeline._get_raw_image_size(img)

            image_width = (raw_w // multiple_of) * multiple_of
            image_height = (raw_h // multiple_of) * multiple_of

            # Use the resolution of the input image
            width = image_width
            height = image_height

            # 2.1 Preprocess mask
            if padding_mask_crop is not None:
                crops_coords = mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
                resize_mode = "fill"
            else:
                crops_coords = None
                resize_mode = "default"
            init_image = image_processor.preprocess(
                image, image_height, image_width, crops_coords=crops_coords, resize_mode=resize_mode
            )
            prepared["crops_coords"] = crops_coords
            prepared["height"] = height
            prepared["init_image"] = init_image
            prepared["original_image"] = image
            prepared["resize_mode"] = resize_mode
            prepared["width"] = width

        # 2.2 Preprocess reference image
        processed_image_reference = None
        if image_reference is not None and not (
            isinstance(image_reference, torch.Tensor) and image_reference.size(1) == latent_channels * 4
        ):
            if (
                isinstance(image_reference, list)
                and isinstance(image_reference[0], torch.Tensor)
                and image_reference[0].ndim == 4
            ):
                image_reference = torch.cat(image_reference, dim=0)

            img_reference = image_reference[0] if isinstance(image_reference, list) else image_reference
            raw_ref_h, raw_ref_w = Flux2KleinInpaintPipeline._get_raw_image_size(img_reference)

            if raw_ref_h * raw_ref_w > 1024 * 1024:
                scale = math.sqrt(1024 * 1024 / (raw_ref_h * raw_ref_w))
                image_reference = image_processor.resize(
                    image_reference, int(raw_ref_h * scale), int(raw_ref_w * scale)
                )
                img_reference = image_reference[0] if isinstance(image_reference, list) else image_reference
                raw_ref_h, raw_ref_w = Flux2KleinInpaintPipeline._get_raw_image_size(img_reference)

            image_reference_width = (raw_ref_w // multiple_of) * multiple_of
            image_reference_height = (raw_ref_h // multiple_of) * multiple_of

            processed_image_reference = image_processor.preprocess(
                image_reference,
                image_reference_height,
                image_reference_width,
                resize_mode="crop",
            )
        else:
            if image_reference is not None:
                bn_mean = (
                    nn.BatchNorm2d(
                        math.prod(vae_config.get("patch_size", (2, 2))) * vae_config.get("latent_channels", 32),
                        eps=vae_config.get("batch_norm_eps", 0.0001),
                        momentum=vae_config.get("batch_norm_momentum", 0.1),
                        affine=False,
                        track_running_stats=True,
                    )
                    .running_mean.view(1, -1, 1, 1)
                    .to(image_reference.device, image_reference.dtype)
                )
                bn_std = torch.sqrt(
                    nn.BatchNorm2d(
                        math.prod(vae_config.get("patch_size", (2, 2))) * vae_config.get("latent_channels", 32),
                        eps=vae_config.get("batch_norm_eps", 0.0001),
                        momentum=vae_config.get("batch_norm_momentum", 0.1),
                        affine=False,
                        track_running_stats=True,
                    ).running_var.view(1, -1, 1, 1)
                    + vae_config.get("batch_norm_eps", 0.0001)
                ).to(image_reference.device, image_reference.dtype)
                processed_image_reference = (image_reference - bn_mean) / bn_std
        prepared["processed_image_reference"] = processed_image_reference

        prepared["mask_condition"] = mask_processor.preprocess(
            mask_image, height=height, width=width, resize_mode=resize_mode, crops_coords=crops_coords
        )
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
            arguments = Flux2KleinInpaintPipeline.request_arguments(prompt, request.sampling_params)
            prepared = prepare_media(**arguments)
        except Exception:  # what is wrong with a request, the pipeline itself says, after Diffusers' own checks
            return request
        information = prompt.get("additional_information") or {}
        # Requests take their steps together only where their tensors have equal shapes.
        request.batch_compatibility_key = tuple((name, shape_of(value)) for name, value in prepared.items())
        request.prompt = {**prompt, "additional_information": {**information, "prepared_media": prepared}}
        return request

    return pre_process_func


def get_flux2_klein_inpaint_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Post-processing of `Flux2KleinInpaintPipeline`; it runs in the engine process, where no model is loaded."""
    processor = Flux2ImageProcessor()

    def post_process_func(image: torch.Tensor, sampling_params: OmniDiffusionSamplingParams | None = None) -> Any:
        output_type = sampling_params.output_type if sampling_params is not None else None
        if output_type is None:
            output_type = "pil"
        if output_type == "latent":
            return image
        return processor.postprocess(image, output_type=output_type)

    return post_process_func


class Flux2KleinInpaintPipeline(
    nn.Module,
    SupportImageInput,
    CFGParallelMixin,
    ProgressBarMixin,
    DiffusionPipelineProfilerMixin,
    SupportsComponentDiscovery,
):
    """Flux2 Klein pipeline for image inpainting with optional reference image conditioning."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    # No warm-up: the engine's request for it brings one picture, a call needs more.
    dummy_run_num_frames: ClassVar[int] = 0
    default_num_inference_steps: ClassVar[int] = 50
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "attention_kwargs": "attention processors take no per-call arguments here; LoRA scale is the engine's lora_scale",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
    }
    _text_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    _tensor_arguments: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    )
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "image",
        "image_reference",
        "mask_image",
        "generator",
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "prepared_media",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "latents",
        "condition_image_latents",
        "combined_image_ids",
        "prompt_embeds",
        "text_ids",
        "negative_prompt_embeds",
        "negative_text_ids",
        "image_latents",
        "mask",
        "noise",
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
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.is_distilled = model_index.get("is_distilled", False)
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
        self.transformer = Flux2Transformer2DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, Flux2Transformer2DModel),
        )

        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # Flux latents are turned into 2x2 patches and packed. This means the latent width and height has to be divisible
        # by the patch size. So the vae scale factor is multiplied by the patch size to account for this
        self.latent_channels = self.vae.config.latent_channels
        self.image_processor = Flux2ImageProcessor(
            vae_scale_factor=self.vae_scale_factor * 2, vae_latent_channels=self.latent_channels
        )
        self.mask_processor = Flux2ImageProcessor(
            vae_scale_factor=self.vae_scale_factor * 2,
            vae_latent_channels=self.latent_channels,
            do_normalize=False,
            do_binarize=True,
            do_convert_rgb=False,
            do_convert_grayscale=True,
        )
        self.default_sample_size = 128
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline._get_qwen3_prompt_embeds
    def _get_qwen3_prompt_embeds(
        text_encoder: Qwen3ForCausalLM,
        tokenizer: Qwen2TokenizerFast,
        prompt: str | list[str],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        max_sequence_length: int = 512,
        hidden_states_layers: list[int] = (9, 18, 27),
    ):
        dtype = text_encoder.dtype if dtype is None else dtype
        device = text_encoder.device if device is None else device

        prompt = [prompt] if isinstance(prompt, str) else prompt

        all_input_ids = []
        all_attention_masks = []

        for single_prompt in prompt:
            messages = [{"role": "user", "content": single_prompt}]
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            inputs = tokenizer(
                text,
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=max_sequence_length,
            )

            all_input_ids.append(inputs["input_ids"])
            all_attention_masks.append(inputs["attention_mask"])

        input_ids = torch.cat(all_input_ids, dim=0).to(device)
        attention_mask = torch.cat(all_attention_masks, dim=0).to(device)

        # Forward pass through the model
        output = text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )

        # Only use outputs from intermediate layers and stack them
        out = torch.stack([output.hidden_states[k] for k in hidden_states_layers], dim=1)
        out = out.to(dtype=dtype, device=device)

        batch_size, num_channels, seq_len, hidden_dim = out.shape
        prompt_embeds = out.permute(0, 2, 1, 3).reshape(batch_size, seq_len, num_channels * hidden_dim)

        return prompt_embeds

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._prepare_text_ids
    def _prepare_text_ids(
        x: torch.Tensor,  # (B, L, D) or (L, D)
        t_coord: torch.Tensor | None = None,
    ):
        B, L, _ = x.shape
        out_ids = []

        for i in range(B):
            t = torch.arange(1) if t_coord is None else t_coord[i]
            h = torch.arange(1)
            w = torch.arange(1)
            l = torch.arange(L)

            coords = torch.cartesian_prod(t, h, w, l)
            out_ids.append(coords)

        return torch.stack(out_ids)

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._prepare_latent_ids
    def _prepare_latent_ids(
        latents: torch.Tensor,  # (B, C, H, W)
    ):
        r"""
        Generates 4D position coordinates (T, H, W, L) for latent tensors.

        Args:
            latents (torch.Tensor):
                Latent tensor of shape (B, C, H, W)

        Returns:
            torch.Tensor:
                Position IDs tensor of shape (B, H*W, 4) All batches share the same coordinate structure: T=0,
                H=[0..H-1], W=[0..W-1], L=0
        """

        batch_size, _, height, width = latents.shape

        t = torch.arange(1)  # [0] - time dimension
        h = torch.arange(height)
        w = torch.arange(width)
        l = torch.arange(1)  # [0] - layer dimension

        # Create position IDs: (H*W, 4)
        latent_ids = torch.cartesian_prod(t, h, w, l)

        # Expand to batch: (B, H*W, 4)
        latent_ids = latent_ids.unsqueeze(0).expand(batch_size, -1, -1)

        return latent_ids

    @staticmethod
    def _prepare_image_ids(
        image_latents: list[torch.Tensor],  # list of (B_i, C, H, W) before packing
        batch_size: int,
        scale: int = 10,
    ):
        r"""
        Generates 4D time-space coordinates (T, H, W, L) for a sequence of image latents.

        This function creates a unique coordinate for every pixel/patch across all input latent with different
        dimensions.

        Args:
            image_latents (list[torch.Tensor]):
                A list of image latent feature tensors, typically of shape (C, H, W).
            scale (int, optional):
                A factor used to define the time separation (T-coordinate) between latents. T-coordinate for the i-th
                latent is: 'scale + scale * i'. Defaults to 10.

        Returns:
            torch.Tensor:
                The combined coordinate tensor. Shape: (1, N_total, 4) Where N_total is the sum of (H * W) for all
                input latents.

        Coordinate Components (Dimension 4):
            - T (Time): The unique index indicating which latent image the coordinate belongs to.
            - H (Height): The row index within that latent image.
            - W (Width): The column index within that latent image.
            - L (Seq. Length): A sequence length dimension, which is always fixed at 0 (size 1)
        """

        if not isinstance(image_latents, list):
            raise ValueError(f"Expected `image_latents` to be a list, got {type(image_latents)}.")

        all_image_latent_ids = []
        t_offset = scale
        for x in image_latents:
            b_i, _, height, width = x.shape

            # Create IDs for a single image at this t_offset
            t = torch.tensor([t_offset]).view(-1)
            x_ids = torch.cartesian_prod(t, torch.arange(height), torch.arange(width), torch.arange(1))

            if b_i == 1 or b_i == batch_size:
                x_ids = x_ids.unsqueeze(0).expand(batch_size, -1, -1)
                all_image_latent_ids.append(x_ids)
                t_offset += scale
            else:
                # multiple images per sample in the batch
                item_ids = [x_ids]
                for _ in range(1, b_i):
                    t_offset += scale
                    t = torch.tensor([t_offset]).view(-1)
                    item_ids.append(torch.cartesian_prod(t, torch.arange(height), torch.arange(width), torch.arange(1)))
                x_ids = torch.cat(item_ids, dim=0)  # (b_i * h * w, 4)
                x_ids = x_ids.unsqueeze(0).expand(batch_size, -1, -1)
                all_image_latent_ids.append(x_ids)
                t_offset += scale

        image_latent_ids = torch.cat(all_image_latent_ids, dim=1)

        return image_latent_ids

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._patchify_latents
    def _patchify_latents(latents):
        batch_size, num_channels_latents, height, width = latents.shape
        latents = latents.view(batch_size, num_channels_latents, height // 2, 2, width // 2, 2)
        latents = latents.permute(0, 1, 3, 5, 2, 4)
        latents = latents.reshape(batch_size, num_channels_latents * 4, height // 2, width // 2)
        return latents

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._unpatchify_latents
    def _unpatchify_latents(latents):
        batch_size, num_channels_latents, height, width = latents.shape
        latents = latents.reshape(batch_size, num_channels_latents // (2 * 2), 2, 2, height, width)
        latents = latents.permute(0, 1, 4, 2, 5, 3)
        latents = latents.reshape(batch_size, num_channels_latents // (2 * 2), height * 2, width * 2)
        return latents

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._pack_latents
    def _pack_latents(latents):
        """
        pack latents: (batch_size, num_channels, height, width) -> (batch_size, height * width, num_channels)
        """

        batch_size, num_channels, height, width = latents.shape
        latents = latents.reshape(batch_size, num_channels, height * width).permute(0, 2, 1)

        return latents

    @staticmethod
    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._unpack_latents_with_ids
    def _unpack_latents_with_ids(x: torch.Tensor, x_ids: torch.Tensor) -> list[torch.Tensor]:
        """
        using position ids to scatter tokens into place
        """
        x_list = []
        for data, pos in zip(x, x_ids):
            _, ch = data.shape  # noqa: F841
            h_ids = pos[:, 1].to(torch.int64)
            w_ids = pos[:, 2].to(torch.int64)

            h = torch.max(h_ids) + 1
            w = torch.max(w_ids) + 1

            flat_ids = h_ids * w + w_ids

            out = torch.zeros((h * w, ch), device=data.device, dtype=data.dtype)
            out.scatter_(0, flat_ids.unsqueeze(1).expand(-1, ch), data)

            # reshape from (H * W, C) to (H, W, C) and permute to (C, H, W)

            out = out.view(h, w, ch).permute(2, 0, 1)
            x_list.append(out)

        return torch.stack(x_list, dim=0)

    @staticmethod
    def _get_raw_image_size(image: PipelineImageInput) -> tuple[int, int]:
        """Helper to get (height, width) without rounding/scaling."""
        if isinstance(image, list):
            image = image[0]

        if isinstance(image, Image.Image):
            return image.height, image.width
        elif isinstance(image, torch.Tensor):
            return image.shape[-2], image.shape[-1]
        elif isinstance(image, np.ndarray):
            if image.ndim >= 3:
                return image.shape[-3], image.shape[-2]
            return image.shape[-2], image.shape[-1]

        if hasattr(image, "shape"):
            return image.shape[-2], image.shape[-1]

        raise ValueError(f"Unsupported image type: {type(image)}")

    # Copied from diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline.encode_prompt
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int] = (9, 18, 27),
    ):
        device = device or self.device

        if prompt is None:
            prompt = ""

        prompt = [prompt] if isinstance(prompt, str) else prompt

        if prompt_embeds is None:
            prompt_embeds = self._get_qwen3_prompt_embeds(
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                prompt=prompt,
                device=device,
                max_sequence_length=max_sequence_length,
                hidden_states_layers=text_encoder_out_layers,
            )

        batch_size, seq_len, _ = prompt_embeds.shape
        prompt_embeds = prompt_embeds.repeat(1, num_images_per_prompt, 1)
        prompt_embeds = prompt_embeds.view(batch_size * num_images_per_prompt, seq_len, -1)

        text_ids = self._prepare_text_ids(prompt_embeds)
        text_ids = text_ids.to(device)
        return prompt_embeds, text_ids

    # Copied from diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._encode_vae_image
    def _encode_vae_image(self, image: torch.Tensor, generator: torch.Generator):
        if image.ndim != 4:
            raise ValueError(f"Expected image dims 4, got {image.ndim}.")

        image_latents = retrieve_latents(self.vae.encode(image), generator=generator, sample_mode="argmax")
        image_latents = self._patchify_latents(image_latents)

        latents_bn_mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(image_latents.device, image_latents.dtype)
        latents_bn_std = torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(
            image_latents.device, image_latents.dtype
        )
        image_latents = (image_latents - latents_bn_mean) / latents_bn_std

        return image_latents

    def prepare_latents(
        self,
        image,
        timestep,
        batch_size,
        num_latents_channels,
        height,
        width,
        dtype,
        device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ):
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )

        # VAE applies 8x compression on images but we must also account for packing which requires
        # latent height and width to be divisible by 2.
        height = 2 * (int(height) // (self.vae_scale_factor * 2))
        width = 2 * (int(width) // (self.vae_scale_factor * 2))
        shape = (batch_size, num_latents_channels * 4, height // 2, width // 2)

        # Create a dummy tensor for _prepare_latent_ids
        dummy_latents = torch.zeros(shape, device=device, dtype=dtype)
        latent_image_ids = self._prepare_latent_ids(dummy_latents)
        latent_image_ids = latent_image_ids.to(device)

        image = image.to(device=device, dtype=dtype)
        if image.shape[1] != self.latent_channels * 4:
            image_latents = self._encode_vae_image(image=image, generator=generator)
        else:
            image_latents = image
            latents_bn_mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(image_latents.device, image_latents.dtype)
            latents_bn_std = torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(
                image_latents.device, image_latents.dtype
            )
            image_latents = (image_latents - latents_bn_mean) / latents_bn_std

        if batch_size > image_latents.shape[0] and batch_size % image_latents.shape[0] == 0:
            # expand init_latents for batch_size
            additional_image_per_prompt = batch_size // image_latents.shape[0]
            image_latents = torch.cat([image_latents] * additional_image_per_prompt, dim=0)
        elif batch_size > image_latents.shape[0] and batch_size % image_latents.shape[0] != 0:
            raise ValueError(
                f"Cannot duplicate `image` of batch size {image_latents.shape[0]} to {batch_size} text prompts."
            )

        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            latents = self.scheduler.scale_noise(image_latents, timestep, noise)
        else:
            noise = latents.to(device)
            latents = noise

        noise = self._pack_latents(noise)
        packed_image_latents = self._pack_latents(image_latents)
        latents = self._pack_latents(latents)
        return latents, noise, packed_image_latents, image_latents, latent_image_ids

    def prepare_image_latents(
        self,
        images: list[torch.Tensor],
        batch_size,
        generator: torch.Generator,
        device,
        dtype,
    ):
        image_latents = []
        for image in images:
            image = image.to(device=device, dtype=dtype)

            if image.shape[1] != self.latent_channels * 4:
                image_latent = self._encode_vae_image(image=image, generator=generator)
            else:
                image_latent = image
            image_latents.append(image_latent)

        image_latent_ids = self._prepare_image_ids(image_latents, batch_size)

        # Pack each latent and combine batch properly
        final_latents = []
        for latent in image_latents:
            packed = self._pack_latents(latent)  # (B_i, seq_len, 128)
            b_i = packed.shape[0]

            if b_i == 1 and batch_size > 1:
                packed = packed.repeat(batch_size, 1, 1)
            elif b_i == batch_size:
                pass
            else:
                # Concatenate all reference tokens along sequence dimension for each sample
                seq_len = packed.shape[1]
                packed = packed.reshape(1, b_i * seq_len, -1)
                if batch_size > 1:
                    packed = packed.repeat(batch_size, 1, 1)
            final_latents.append(packed)

        image_latents = torch.cat(final_latents, dim=1)  # (batch_size, total_seq_len, 128)

        image_latent_ids = image_latent_ids.to(device)

        return image_latents, image_latent_ids

    def prepare_mask_latents(
        self,
        mask,
        batch_size,
        num_images_per_prompt,
        height,
        width,
        dtype,
        device,
    ):
        # Interpolate the mask directly to the final packed spatial size.
        target_h = int(height) // (self.vae_scale_factor * 2)
        target_w = int(width) // (self.vae_scale_factor * 2)
        mask = F.interpolate(mask, size=(target_h, target_w), mode="bilinear")
        mask = mask.to(device=device, dtype=dtype)

        batch_size = batch_size * num_images_per_prompt

        # duplicate mask for each generation per prompt, using mps friendly method
        if mask.shape[0] < batch_size:
            if not batch_size % mask.shape[0] == 0:
                raise ValueError(
                    "The passed mask and the required batch size don't match. Masks are supposed to be duplicated to"
                    f" a total batch size of {batch_size}, but {mask.shape[0]} masks were passed. Make sure the number"
                    " of masks that you pass is divisible by the total requested batch size."
                )
            mask = mask.repeat(batch_size // mask.shape[0], 1, 1, 1)

        # Pack to (B, seq_len, 1), will broadcast against (B, seq_len, C) latents
        mask = self._pack_latents(mask)

        return mask

    # Copied from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img.StableDiffusion3Img2ImgPipeline.get_timesteps
    def get_timesteps(self, num_inference_steps, strength, device):
        # get the original timestep using init_timestep
        init_timestep = min(num_inference_steps * strength, num_inference_steps)

        t_start = int(max(num_inference_steps - init_timestep, 0))
        timesteps = self.scheduler.timesteps[t_start * self.scheduler.order :]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(t_start * self.scheduler.order)

        return timesteps, num_inference_steps - t_start

    def check_inputs(
        self,
        prompt,
        image,
        mask_image,
        image_reference,
        strength,
        height,
        width,
        output_type,
        prompt_embeds=None,
        padding_mask_crop=None,
        guidance_scale=None,
    ):
        if image is None:
            raise ValueError("`image` has to be provided for inpainting.")

        if mask_image is None:
            raise ValueError("`mask_image` has to be provided for inpainting.")

        if strength < 0 or strength > 1:
            raise ValueError(f"The value of strength should in [0.0, 1.0] but is {strength}")

        if (
            height is not None
            and height % (self.vae_scale_factor * 2) != 0
            or width is not None
            and width % (self.vae_scale_factor * 2) != 0
        ):
            logger.warning(
                f"`height` and `width` have to be divisible by {self.vae_scale_factor * 2} but are {height} and {width}. Dimensions will be resized accordingly"
            )

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

        if padding_mask_crop is not None:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"The image should be a PIL image when inpainting mask crop, but is of type {type(image)}."
                )
            if not isinstance(mask_image, Image.Image):
                raise ValueError(
                    f"The mask image should be a PIL image when inpainting mask crop, but is of type"
                    f" {type(mask_image)}."
                )
            if output_type != "pil":
                raise ValueError(f"The output type should be PIL when inpainting mask crop, but is {output_type}.")
        else:
            if image is not None:
                if not isinstance(image, (Image.Image, torch.Tensor, np.ndarray, list)):
                    raise ValueError(
                        f"`image` has to be of type `PIL.Image.Image`, `torch.Tensor`, `np.ndarray`, or `list`"
                        f" but is {type(image)}."
                    )
            if mask_image is not None:
                if not isinstance(mask_image, (Image.Image, torch.Tensor, np.ndarray, list)):
                    raise ValueError(
                        f"`mask_image` has to be of type `PIL.Image.Image`, `torch.Tensor`, `np.ndarray`, or `list`"
                        f" but is {type(mask_image)}."
                    )

        if image_reference is not None:
            if not isinstance(image_reference, (Image.Image, torch.Tensor, np.ndarray, list)):
                raise ValueError(
                    f"`image_reference` has to be of type `PIL.Image.Image`, `torch.Tensor`, `np.ndarray`, or `list`"
                    f" but is {type(image_reference)}."
                )

        if guidance_scale > 1.0 and self.is_distilled:
            logger.warning(f"Guidance scale {guidance_scale} is ignored for step-wise distilled models.")

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
            "num_images_per_prompt": sampling.num_outputs_per_prompt,
            "height": sampling.height,
            "width": sampling.width,
            "strength": sampling.strength,
            "num_inference_steps": sampling.num_inference_steps,
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
            "prompt_embeds",
            "negative_prompt_embeds",
        ):
            if name in fields:
                arguments[name] = fields[name]
        for name in (
            "image",
            "image_reference",
            "mask_image",
            "padding_mask_crop",
        ):
            if name in media:
                arguments[name] = media[name]
        for name, key in (("image_reference", "reference_image"),):  # what the engine calls them
            if key in media and name not in arguments:
                arguments[name] = media[key]
        for name in ("text_encoder_out_layers",):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        information = fields.get("additional_information") or {}
        if "prepared_media" in information:
            arguments["prepared_media"] = information["prepared_media"]
        return arguments

    def prepare_generation(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        image_reference: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 8.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = (9, 18, 27),
        prepared_media: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""

        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt=prompt,
            image=image,
            mask_image=mask_image,
            image_reference=image_reference,
            strength=strength,
            height=height,
            width=width,
            output_type=output_type,
            prompt_embeds=prompt_embeds,
            padding_mask_crop=padding_mask_crop,
            guidance_scale=guidance_scale,
        )
        do_classifier_free_guidance = guidance_scale > 1 and not self.is_distilled

        # 2. Preprocess image
        multiple_of = self.vae_scale_factor * 2
        original_image = None
        crops_coords = None
        if isinstance(image, torch.Tensor) and image.ndim == 4 and image.size(1) == self.latent_channels * 4:
            init_image = image
            original_image = image
            crops_coords = None
            resize_mode = "default"
            height = image.shape[2] * self.vae_scale_factor * 2
            width = image.shape[3] * self.vae_scale_factor * 2
        elif "crops_coords" in prepared_media:
            crops_coords = prepared_media["crops_coords"]
            height = prepared_media["height"]
            init_image = prepared_media["init_image"]
            original_image = prepared_media["original_image"]
            resize_mode = prepared_media["resize_mode"]
            width = prepared_media["width"]
        elif image is not None:
            if isinstance(image, list) and isinstance(image[0], torch.Tensor) and image[0].ndim == 4:
                image = torch.cat(image, dim=0)
            img = image[0] if isinstance(image, list) else image
            raw_h, raw_w = self._get_raw_image_size(img)

            if raw_h * raw_w > 1024 * 1024:
                scale = math.sqrt(1024 * 1024 / (raw_h * raw_w))
                image = self.image_processor.resize(image, int(raw_h * scale), int(raw_w * scale))
                img = image[0] if isinstance(image, list) else image
                raw_h, raw_w = self._get_raw_image_size(img)

            image_width = (raw_w // multiple_of) * multiple_of
            image_height = (raw_h // multiple_of) * multiple_of

            # Use the resolution of the input image
            width = image_width
            height = image_height

            # 2.1 Preprocess mask
            if padding_mask_crop is not None:
                crops_coords = self.mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
                resize_mode = "fill"
            else:
                crops_coords = None
                resize_mode = "default"

            original_image = image
            init_image = self.image_processor.preprocess(
                image, image_height, image_width, crops_coords=crops_coords, resize_mode=resize_mode
            )

        # 2.2 Preprocess reference image
        processed_image_reference = None
        if "processed_image_reference" in prepared_media:
            processed_image_reference = prepared_media["processed_image_reference"]
        elif image_reference is not None and not (
            isinstance(image_reference, torch.Tensor) and image_reference.size(1) == self.latent_channels * 4
        ):
            if (
                isinstance(image_reference, list)
                and isinstance(image_reference[0], torch.Tensor)
                and image_reference[0].ndim == 4
            ):
                image_reference = torch.cat(image_reference, dim=0)

            img_reference = image_reference[0] if isinstance(image_reference, list) else image_reference
            raw_ref_h, raw_ref_w = self._get_raw_image_size(img_reference)

            if raw_ref_h * raw_ref_w > 1024 * 1024:
                scale = math.sqrt(1024 * 1024 / (raw_ref_h * raw_ref_w))
                image_reference = self.image_processor.resize(
                    image_reference, int(raw_ref_h * scale), int(raw_ref_w * scale)
                )
                img_reference = image_reference[0] if isinstance(image_reference, list) else image_reference
                raw_ref_h, raw_ref_w = self._get_raw_image_size(img_reference)

            image_reference_width = (raw_ref_w // multiple_of) * multiple_of
            image_reference_height = (raw_ref_h // multiple_of) * multiple_of

            processed_image_reference = self.image_processor.preprocess(
                image_reference,
                image_reference_height,
                image_reference_width,
                resize_mode="crop",
            )
        else:
            if image_reference is not None:
                bn_mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(image_reference.device, image_reference.dtype)
                bn_std = torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(
                    image_reference.device, image_reference.dtype
                )
                processed_image_reference = (image_reference - bn_mean) / bn_std

        # 3. Define call parameters
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        device = self.device

        # 4. Prepare text embeddings
        prompt_embeds, text_ids = self.encode_prompt(
            prompt=prompt,
            prompt_embeds=prompt_embeds,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
        )

        negative_text_ids = None
        if do_classifier_free_guidance:
            negative_prompt = ""
            if prompt is not None and isinstance(prompt, list):
                negative_prompt = [negative_prompt] * len(prompt)
            negative_prompt_embeds, negative_text_ids = self.encode_prompt(
                prompt=negative_prompt,
                prompt_embeds=negative_prompt_embeds,
                device=device,
                num_images_per_prompt=num_images_per_prompt,
                max_sequence_length=max_sequence_length,
                text_encoder_out_layers=text_encoder_out_layers,
            )

        # 5. Prepare timesteps
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas
        if hasattr(self.scheduler.config, "use_flow_sigmas") and self.scheduler.config.use_flow_sigmas:
            sigmas = None
        image_seq_len = (int(height) // self.vae_scale_factor // 2) * (int(width) // self.vae_scale_factor // 2)
        mu = compute_empirical_mu(image_seq_len=image_seq_len, num_steps=num_inference_steps)
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler,
            num_inference_steps,
            device,
            sigmas=sigmas,
            mu=mu,
        )
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength, device)

        if num_inference_steps < 1:
            raise ValueError(
                f"After adjusting the num_inference_steps by strength parameter: {strength}, the number of pipeline "
                f"steps is {num_inference_steps} which is < 1 and not appropriate for this pipeline."
            )
        latent_timestep = timesteps[:1].repeat(batch_size * num_images_per_prompt)

        # 6. Prepare latent variables
        num_channels_latents = self.transformer.config.in_channels // 4

        latents, noise, image_latents, image_latents_encoded, latent_image_ids = self.prepare_latents(
            init_image,
            latent_timestep,
            batch_size * num_images_per_prompt,
            num_channels_latents,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        ref_images = [image_latents_encoded]
        if processed_image_reference is not None:
            ref_images.append(processed_image_reference)

        condition_image_latents, condition_image_ids = self.prepare_image_latents(
            ref_images,
            batch_size * num_images_per_prompt,
            generator,
            device,
            prompt_embeds.dtype,
        )

        if "mask_condition" in prepared_media:
            mask_condition = prepared_media["mask_condition"]
        else:
            mask_condition = self.mask_processor.preprocess(
                mask_image, height=height, width=width, resize_mode=resize_mode, crops_coords=crops_coords
            )

        mask = self.prepare_mask_latents(
            mask_condition,
            batch_size,
            num_images_per_prompt,
            height,
            width,
            prompt_embeds.dtype,
            device,
        )

        # Combine base latent position IDs with condition image position IDs.
        combined_image_ids = torch.cat([latent_image_ids, condition_image_ids], dim=1)
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "condition_image_latents": condition_image_latents,
                "combined_image_ids": combined_image_ids,
                "prompt_embeds": prompt_embeds,
                "text_ids": text_ids,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "negative_prompt_embeds": negative_prompt_embeds,
                "negative_text_ids": negative_text_ids,
                "guidance_scale": guidance_scale,
                "image_latents": image_latents,
                "mask": mask,
                "noise": noise,
            },
            {
                "latent_image_ids": latent_image_ids,
                "output_type": output_type,
                "padding_mask_crop": padding_mask_crop,
                "mask_image": mask_image,
                "original_image": original_image,
                "crops_coords": crops_coords,
            },
        )

    def predict_guided_noise(
        self,
        t,
        latents,
        condition_image_latents,
        combined_image_ids,
        prompt_embeds,
        text_ids,
        do_classifier_free_guidance,
        negative_prompt_embeds,
        negative_text_ids,
        guidance_scale,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""
        # broadcast to batch dimension in a way that's compatible with ONNX/Core ML
        timestep = t.expand(latents.shape[0]).to(latents.dtype)

        latent_model_input = torch.cat([latents, condition_image_latents], dim=1)
        img_ids = combined_image_ids

        latent_model_input = latent_model_input.to(self.dtype)
        positive_kwargs = {
            "hidden_states": latent_model_input,
            "timestep": timestep / 1000,
            "guidance": None,
            "encoder_hidden_states": prompt_embeds,
            "txt_ids": text_ids,
            "img_ids": img_ids,
        }
        negative_kwargs = positive_kwargs | {
            "encoder_hidden_states": negative_prompt_embeds,
            "txt_ids": negative_text_ids,
        }
        return self.predict_noise_maybe_with_cfg(
            do_classifier_free_guidance,
            guidance_scale,
            positive_kwargs,
            negative_kwargs,
            cfg_normalize=False,
            output_slice=latents.size(1),
        )

    def step_latents(self, scheduler, noise_pred, t, latents, image_latents, mask, i, timesteps, noise):
        # compute the previous noisy sample x_t -> x_t-1
        latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]

        init_latents_proper = image_latents
        init_mask = mask

        if i < len(timesteps) - 1:
            noise_timestep = timesteps[i + 1]
            init_latents_proper = scheduler.scale_noise(init_latents_proper, torch.tensor([noise_timestep]), noise)

        latents = (1 - init_mask) * init_latents_proper + init_mask * latents
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
        condition_image_latents,
        combined_image_ids,
        prompt_embeds,
        text_ids,
        do_classifier_free_guidance,
        negative_prompt_embeds,
        negative_text_ids,
        guidance_scale,
        image_latents,
        mask,
        noise,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            for i, t in enumerate(timesteps):
                noise_pred = self.predict_guided_noise(
                    t=t,
                    latents=latents,
                    condition_image_latents=condition_image_latents,
                    combined_image_ids=combined_image_ids,
                    prompt_embeds=prompt_embeds,
                    text_ids=text_ids,
                    do_classifier_free_guidance=do_classifier_free_guidance,
                    negative_prompt_embeds=negative_prompt_embeds,
                    negative_text_ids=negative_text_ids,
                    guidance_scale=guidance_scale,
                )
                latents = self.step_latents(
                    self.scheduler,
                    noise_pred=noise_pred,
                    t=t,
                    latents=latents,
                    image_latents=image_latents,
                    mask=mask,
                    i=i,
                    timesteps=timesteps,
                    noise=noise,
                )
                progress_bar.update()
        return latents

    def decode(
        self,
        latents,
        latent_image_ids,
        output_type,
        padding_mask_crop,
        mask_image,
        original_image,
        crops_coords,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        # 8. Post-processing
        latents = self._unpack_latents_with_ids(latents, latent_image_ids)

        latents_bn_mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        latents_bn_std = torch.sqrt(self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).to(
            latents.device, latents.dtype
        )
        latents = latents * latents_bn_std + latents_bn_mean
        latents = self._unpatchify_latents(latents)

        if output_type == "latent":
            image = latents
        else:
            image = self.vae.decode(latents, return_dict=False)[0]

            if padding_mask_crop is not None:
                image = self.image_processor.postprocess(image, output_type=output_type)
                image = [self.image_processor.apply_overlay(mask_image, original_image, i, crops_coords) for i in image]
                image = self.image_processor.normalize(
                    self.image_processor.numpy_to_pt(self.image_processor.pil_to_numpy(image))
                )
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
                    joined[name] = join_rows(values)
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
                    t=state.current_timestep,
                    latents=state.latents,
                    condition_image_latents=inputs["condition_image_latents"],
                    combined_image_ids=inputs["combined_image_ids"],
                    prompt_embeds=inputs["prompt_embeds"],
                    text_ids=inputs["text_ids"],
                    do_classifier_free_guidance=inputs["do_classifier_free_guidance"],
                    negative_prompt_embeds=inputs["negative_prompt_embeds"],
                    negative_text_ids=inputs["negative_text_ids"],
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
            image_latents=inputs["image_latents"],
            mask=inputs["mask"],
            i=state.step_index,
            timesteps=state.timesteps,
            noise=inputs["noise"],
        )
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **kwargs: Any) -> DiffusionOutput:
        """Step execution: decode a finished request."""
        return self.finish(latents=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
