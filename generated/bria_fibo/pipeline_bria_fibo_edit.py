# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.BriaFiboEditPipeline (pipelines/bria_fibo/pipeline_bria_fibo_edit.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, List, Optional, Union

import numpy as np
import torch
from cache_dit import refresh_context
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
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

from .bria_fibo_transformer import BriaFiboTransformer2DModel

PREFERRED_RESOLUTION = {
    256 * 256: [(208, 304), (224, 288), (256, 256), (288, 224), (304, 208), (320, 192), (336, 192)],
    512 * 512: [
        (416, 624),
        (432, 592),
        (464, 560),
        (512, 512),
        (544, 480),
        (576, 448),
        (592, 432),
        (608, 416),
        (624, 416),
        (640, 400),
        (672, 384),
        (704, 368),
    ],
    1024 * 1024: [
        (832, 1248),
        (880, 1184),
        (912, 1136),
        (1024, 1024),
        (1136, 912),
        (1184, 880),
        (1216, 848),
        (1248, 832),
        (1248, 832),
        (1264, 816),
        (1296, 800),
        (1360, 768),
    ],
}


PipelineMaskInput = Union[
    torch.FloatTensor, Image.Image, List[Image.Image], List[torch.FloatTensor], np.ndarray, List[np.ndarray]
]


def paste_mask_on_image(mask: PipelineMaskInput, image: PipelineImageInput):
    """convert mask and image to PIL Images and paste the mask on the image"""
    if isinstance(mask, torch.Tensor):
        if mask.ndim == 3 and mask.shape[0] == 1:
            mask = mask.squeeze(0)
        mask = Image.fromarray((mask.cpu().numpy() * 255).astype(np.uint8))
    elif isinstance(mask, Image.Image):
        pass
    elif isinstance(mask, list):
        mask = mask[0]
        if isinstance(mask, torch.Tensor):
            if mask.ndim == 3 and mask.shape[0] == 1:
                mask = mask.squeeze(0)
            mask = Image.fromarray((mask.cpu().numpy() * 255).astype(np.uint8))
        elif isinstance(mask, np.ndarray):
            mask = Image.fromarray((mask * 255).astype(np.uint8))
    elif isinstance(mask, np.ndarray):
        mask = Image.fromarray((mask * 255).astype(np.uint8))

    if isinstance(image, torch.Tensor):
        if image.ndim == 3:
            image = image.permute(1, 2, 0)
        image = Image.fromarray((image.cpu().numpy() * 255).astype(np.uint8))
    elif isinstance(image, Image.Image):
        pass
    elif isinstance(image, list):
        image = image[0]
        if isinstance(image, torch.Tensor):
            if image.ndim == 3:
                image = image.permute(1, 2, 0)
            image = Image.fromarray((image.cpu().numpy() * 255).astype(np.uint8))
        elif isinstance(image, np.ndarray):
            image = Image.fromarray((image * 255).astype(np.uint8))
    elif isinstance(image, np.ndarray):
        image = Image.fromarray((image * 255).astype(np.uint8))

    mask = mask.convert("L")
    image = image.convert("RGB")
    gray_color = (128, 128, 128)
    gray_img = Image.new("RGB", image.size, gray_color)
    image = Image.composite(gray_img, image, mask)
    return image


def is_valid_edit_json(json_input: str | dict):
    """
    Check if the input is a valid JSON string or dict with an "edit_instruction" key.

    Args:
        json_input (`str` or `dict`):
            The JSON string or dict to check.

    Returns:
        `bool`: True if the input is a valid JSON string or dict with an "edit_instruction" key, False otherwise.
    """
    try:
        if isinstance(json_input, str) and "edit_instruction" in json_input:
            json.loads(json_input)
            return True
        elif isinstance(json_input, dict) and "edit_instruction" in json_input:
            return True
        else:
            return False
    except json.JSONDecodeError:
        return False


def is_valid_mask(mask: PipelineMaskInput):
    """
    Check if the mask is a valid mask.
    """
    if isinstance(mask, torch.Tensor):
        return True
    elif isinstance(mask, Image.Image):
        return True
    elif isinstance(mask, list):
        return all(isinstance(m, (torch.Tensor, Image.Image, np.ndarray)) for m in mask)
    elif isinstance(mask, np.ndarray):
        return mask.ndim in [2, 3] and mask.min() >= 0 and mask.max() <= 1
    else:
        return False


def get_mask_size(mask: PipelineMaskInput):
    """
    Get the size of the mask.
    """
    if isinstance(mask, torch.Tensor):
        return mask.shape[-2:]
    elif isinstance(mask, Image.Image):
        return mask.size[::-1]  # (height, width)
    elif isinstance(mask, list):
        return [get_mask_size(m) for m in mask]
    elif isinstance(mask, np.ndarray):
        return mask.shape[-2:]
    else:
        return None


def get_image_size(image: PipelineImageInput):
    """
    Get the size of the image.
    """
    if isinstance(image, torch.Tensor):
        return image.shape[-2:]
    elif isinstance(image, Image.Image):
        return image.size[::-1]  # (height, width)
    elif isinstance(image, list):
        return [get_image_size(i) for i in image]
    else:
        return None


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


def get_bria_fibo_edit_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """Pre-processing of `BriaFiboEditPipeline`: what its media need before a model; it runs in the engine process."""

    vae_scale_factor = 16
    image_processor = VaeImageProcessor(vae_scale_factor=vae_scale_factor)  # * 2)

    def prepare_media(
        *,
        image: Optional[PipelineImageInput] = None,
        mask: Optional[PipelineMaskInput] = None,
        height: int | None = None,
        width: int | None = None,
        _auto_resize: bool = True,
        **others: Any,
    ) -> dict[str, Any]:
        """The values that `prepare_generation` has no need to compute then."""
        prepared = {}

        if height is None or width is None:
            if image is not None:
                image_height, image_width = image_processor.get_default_height_width(image)
                if _auto_resize:
                    image_width, image_height = min(
                        PREFERRED_RESOLUTION[1024 * 1024],
                        key=lambda size: abs(size[0] / size[1] - image_width / image_height),
                    )
                width, height = image_width, image_height
            else:
                raise ValueError("You must provide either an image or both height and width.")
            prepared["height"] = height
            prepared["width"] = width

        if mask is not None and image is not None:
            image = paste_mask_on_image(mask, image)

        # Preprocess image
        if image is not None:
            image = image_processor.resize(image, height, width)
            prepared["image"] = image_processor.preprocess(image, height, width)
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
            arguments = BriaFiboEditPipeline.request_arguments(prompt, request.sampling_params)
            prepared = prepare_media(**arguments)
        except Exception:  # what is wrong with a request, the pipeline itself says, after Diffusers' own checks
            return request
        information = prompt.get("additional_information") or {}
        # Requests take their steps together only where their tensors have equal shapes.
        request.batch_compatibility_key = tuple((name, shape_of(value)) for name, value in prepared.items())
        request.prompt = {**prompt, "additional_information": {**information, "prepared_media": prepared}}
        return request

    return pre_process_func


def get_bria_fibo_edit_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Post-processing of `BriaFiboEditPipeline`; it runs in the engine process, where no model is loaded."""
    processor = VaeImageProcessor()

    def post_process_func(image: torch.Tensor, sampling_params: OmniDiffusionSamplingParams | None = None) -> Any:
        output_type = sampling_params.output_type if sampling_params is not None else None
        if output_type is None:
            output_type = "pil"
        if output_type == "latent":
            return image
        return processor.postprocess(image, output_type=output_type)

    return post_process_func


class BriaFiboEditPipeline(
    nn.Module,
    SupportImageInput,
    CFGParallelMixin,
    ProgressBarMixin,
    DiffusionPipelineProfilerMixin,
    SupportsComponentDiscovery,
):
    """Port of Diffusers' BriaFiboEditPipeline."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    # No warm-up: the engine's request for it brings one picture, a call needs more.
    dummy_run_num_frames: ClassVar[int] = 0
    default_num_inference_steps: ClassVar[int] = 30
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "joint_attention_kwargs": "attention processors take no per-call arguments here; LoRA scale is the engine's lora_scale",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
    }
    _text_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
    )
    _tensor_arguments: ClassVar[tuple[str, ...]] = ("latents",)
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "image",
        "mask",
        "negative_prompt",
        "generator",
        "latents",
        "prepared_media",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "latents",
        "image_latents",
        "prompt_embeds",
        "prompt_layers",
        "joint_attention_kwargs",
        "text_ids",
        "latent_image_ids",
    )
    _branch_rows: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "prompt_layers",
        "joint_attention_kwargs",
        "latent_image_ids",
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
        self.transformer = BriaFiboTransformer2DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, BriaFiboTransformer2DModel),
        )

        self.vae_scale_factor = 16
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)  # * 2)
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    def get_prompt_embeds(
        self,
        prompt: Union[str, List[str]],
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 2048,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        device = device or self.device
        dtype = dtype or self.text_encoder.dtype

        prompt = [prompt] if isinstance(prompt, str) else prompt
        if not prompt:
            raise ValueError("`prompt` must be a non-empty string or list of strings.")

        batch_size = len(prompt)
        bot_token_id = 128000

        text_encoder_device = device if device is not None else torch.device("cpu")
        if not isinstance(text_encoder_device, torch.device):
            text_encoder_device = torch.device(text_encoder_device)

        if all(p == "" for p in prompt):
            input_ids = torch.full((batch_size, 1), bot_token_id, dtype=torch.long, device=text_encoder_device)
            attention_mask = torch.ones_like(input_ids)
        else:
            tokenized = self.tokenizer(
                prompt,
                padding="longest",
                max_length=max_sequence_length,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            input_ids = tokenized.input_ids.to(text_encoder_device)
            attention_mask = tokenized.attention_mask.to(text_encoder_device)

            if any(p == "" for p in prompt):
                empty_rows = torch.tensor([p == "" for p in prompt], dtype=torch.bool, device=text_encoder_device)
                input_ids[empty_rows] = bot_token_id
                attention_mask[empty_rows] = 1

        encoder_outputs = self.text_encoder(
            input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
        )
        hidden_states = encoder_outputs.hidden_states

        prompt_embeds = torch.cat([hidden_states[-1], hidden_states[-2]], dim=-1)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)

        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        hidden_states = tuple(
            layer.repeat_interleave(num_images_per_prompt, dim=0).to(device=device) for layer in hidden_states
        )
        attention_mask = attention_mask.repeat_interleave(num_images_per_prompt, dim=0).to(device=device)

        return prompt_embeds, hidden_states, attention_mask

    @staticmethod
    def pad_embedding(prompt_embeds, max_tokens, attention_mask=None):
        # Pad embeddings to `max_tokens` while preserving the mask of real tokens.
        batch_size, seq_len, dim = prompt_embeds.shape

        if attention_mask is None:
            attention_mask = torch.ones((batch_size, seq_len), dtype=prompt_embeds.dtype, device=prompt_embeds.device)
        else:
            attention_mask = attention_mask.to(device=prompt_embeds.device, dtype=prompt_embeds.dtype)

        if max_tokens < seq_len:
            raise ValueError("`max_tokens` must be greater or equal to the current sequence length.")

        if max_tokens > seq_len:
            pad_length = max_tokens - seq_len
            padding = torch.zeros((batch_size, pad_length, dim), dtype=prompt_embeds.dtype, device=prompt_embeds.device)
            prompt_embeds = torch.cat([prompt_embeds, padding], dim=1)

            mask_padding = torch.zeros((batch_size, pad_length), dtype=prompt_embeds.dtype, device=prompt_embeds.device)
            attention_mask = torch.cat([attention_mask, mask_padding], dim=1)

        return prompt_embeds, attention_mask

    def encode_prompt(
        self,
        prompt: Union[str, List[str]],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 5,
        negative_prompt: Optional[Union[str, List[str]]] = None,
        max_sequence_length: int = 3000,
    ):
        r"""
        Args:
            prompt (`str` or `List[str]`, *optional*):
                prompt to be encoded
            device: (`torch.device`):
                torch device
            num_images_per_prompt (`int`):
                number of images that should be generated per prompt
            guidance_scale (`float`):
                Guidance scale for classifier free guidance.
            negative_prompt (`str` or `List[str]`, *optional*):
                The prompt or prompts not to guide the image generation. Ignored when not using guidance (i.e., ignored
                if `guidance_scale` is less than `1`).
        """
        device = device or self.device

        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt)
        negative_prompt_attention_mask = None
        negative_prompt_embeds = None
        prompt_embeds, prompt_layers, prompt_attention_mask = self.get_prompt_embeds(
            prompt=prompt,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds = prompt_embeds.to(dtype=self.dtype)
        prompt_layers = [tensor.to(dtype=self.dtype) for tensor in prompt_layers]

        if guidance_scale > 1:
            if isinstance(negative_prompt, list) and negative_prompt[0] is None:
                negative_prompt = ""
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

            negative_prompt_embeds, negative_prompt_layers, negative_prompt_attention_mask = self.get_prompt_embeds(
                prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                max_sequence_length=max_sequence_length,
                device=device,
            )
            negative_prompt_embeds = negative_prompt_embeds.to(dtype=self.dtype)
            negative_prompt_layers = [tensor.to(dtype=self.dtype) for tensor in negative_prompt_layers]

        # Pad to longest
        if prompt_attention_mask is not None:
            prompt_attention_mask = prompt_attention_mask.to(device=prompt_embeds.device, dtype=prompt_embeds.dtype)

        if negative_prompt_embeds is not None:
            if negative_prompt_attention_mask is not None:
                negative_prompt_attention_mask = negative_prompt_attention_mask.to(
                    device=negative_prompt_embeds.device, dtype=negative_prompt_embeds.dtype
                )
            max_tokens = max(negative_prompt_embeds.shape[1], prompt_embeds.shape[1])

            prompt_embeds, prompt_attention_mask = self.pad_embedding(
                prompt_embeds, max_tokens, attention_mask=prompt_attention_mask
            )
            prompt_layers = [self.pad_embedding(layer, max_tokens)[0] for layer in prompt_layers]

            negative_prompt_embeds, negative_prompt_attention_mask = self.pad_embedding(
                negative_prompt_embeds, max_tokens, attention_mask=negative_prompt_attention_mask
            )
            negative_prompt_layers = [self.pad_embedding(layer, max_tokens)[0] for layer in negative_prompt_layers]
        else:
            max_tokens = prompt_embeds.shape[1]
            prompt_embeds, prompt_attention_mask = self.pad_embedding(
                prompt_embeds, max_tokens, attention_mask=prompt_attention_mask
            )
            negative_prompt_layers = None

        dtype = self.text_encoder.dtype
        text_ids = torch.zeros(prompt_embeds.shape[0], max_tokens, 3).to(device=device, dtype=dtype)

        return (
            prompt_embeds,
            negative_prompt_embeds,
            text_ids,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            prompt_layers,
            negative_prompt_layers,
        )

    @staticmethod
    # Based on diffusers.pipelines.flux.pipeline_flux.FluxPipeline._unpack_latents
    def _unpack_latents(latents, height, width, vae_scale_factor):
        batch_size, num_patches, channels = latents.shape

        height = height // vae_scale_factor
        width = width // vae_scale_factor

        latents = latents.view(batch_size, height // 2, width // 2, channels // 4, 2, 2)
        latents = latents.permute(0, 3, 1, 4, 2, 5)

        latents = latents.reshape(batch_size, channels // (2 * 2), height, width)
        return latents

    @staticmethod
    # Copied from diffusers.pipelines.flux.pipeline_flux.FluxPipeline._prepare_latent_image_ids
    def _prepare_latent_image_ids(batch_size, height, width, device, dtype):
        latent_image_ids = torch.zeros(height, width, 3)
        latent_image_ids[..., 1] = latent_image_ids[..., 1] + torch.arange(height)[:, None]
        latent_image_ids[..., 2] = latent_image_ids[..., 2] + torch.arange(width)[None, :]

        latent_image_id_height, latent_image_id_width, latent_image_id_channels = latent_image_ids.shape

        latent_image_ids = latent_image_ids.reshape(
            latent_image_id_height * latent_image_id_width, latent_image_id_channels
        )

        return latent_image_ids.to(device=device, dtype=dtype)

    @staticmethod
    def _unpack_latents_no_patch(latents, height, width, vae_scale_factor):
        batch_size, num_patches, channels = latents.shape

        height = height // vae_scale_factor
        width = width // vae_scale_factor

        latents = latents.view(batch_size, height, width, channels)
        latents = latents.permute(0, 3, 1, 2)

        return latents

    @staticmethod
    def _pack_latents_no_patch(latents, batch_size, num_channels_latents, height, width):
        latents = latents.permute(0, 2, 3, 1)
        latents = latents.reshape(batch_size, height * width, num_channels_latents)
        return latents

    @staticmethod
    # Copied from diffusers.pipelines.flux.pipeline_flux.FluxPipeline._pack_latents
    def _pack_latents(latents, batch_size, num_channels_latents, height, width):
        latents = latents.view(batch_size, num_channels_latents, height // 2, 2, width // 2, 2)
        latents = latents.permute(0, 2, 4, 1, 3, 5)
        latents = latents.reshape(batch_size, (height // 2) * (width // 2), num_channels_latents * 4)

        return latents

    def prepare_latents(
        self,
        batch_size,
        num_channels_latents,
        height,
        width,
        dtype,
        device,
        generator,
        latents=None,
        do_patching=False,
    ):
        height = int(height) // self.vae_scale_factor
        width = int(width) // self.vae_scale_factor

        shape = (batch_size, num_channels_latents, height, width)

        if latents is not None:
            latent_image_ids = self._prepare_latent_image_ids(batch_size, height, width, device, dtype)
            return latents.to(device=device, dtype=dtype), latent_image_ids

        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )

        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if do_patching:
            latents = self._pack_latents(latents, batch_size, num_channels_latents, height, width)
            latent_image_ids = self._prepare_latent_image_ids(batch_size, height // 2, width // 2, device, dtype)
        else:
            latents = self._pack_latents_no_patch(latents, batch_size, num_channels_latents, height, width)
            latent_image_ids = self._prepare_latent_image_ids(batch_size, height, width, device, dtype)

        return latents, latent_image_ids

    def prepare_image_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        image = image.to(device=device, dtype=dtype)

        # scaling
        latents_mean = (
            torch.tensor(self.vae.config.latents_mean).view(1, self.vae.config.z_dim, 1, 1, 1).to(device, dtype)
        )
        latents_std = 1.0 / torch.tensor(self.vae.config.latents_std).view(1, self.vae.config.z_dim, 1, 1, 1).to(
            device, dtype
        )

        image_latents_cthw = self.vae.encode(image.unsqueeze(2)).latent_dist.mean
        latents_scaled = [(latent - latents_mean) * latents_std for latent in image_latents_cthw]
        image_latents_cthw = torch.concat(latents_scaled, dim=0)
        image_latents_bchw = image_latents_cthw[:, :, 0, :, :]

        image_latent_height, image_latent_width = image_latents_bchw.shape[2:]
        image_latents_bsd = self._pack_latents_no_patch(
            latents=image_latents_bchw,
            batch_size=batch_size,
            num_channels_latents=num_channels_latents,
            height=image_latent_height,
            width=image_latent_width,
        )
        # breakpoint()
        image_ids = self._prepare_latent_image_ids(
            batch_size=batch_size, height=image_latent_height, width=image_latent_width, device=device, dtype=dtype
        )
        # image ids are the same as latent ids with the first dimension set to 1 instead of 0
        image_ids[..., 0] = 1
        return image_latents_bsd, image_ids

    def check_inputs(
        self,
        prompt,
        seed,
        image,
        mask,
        height,
        width,
        max_sequence_length=None,
    ):
        if seed is not None and not isinstance(seed, int):
            raise ValueError("Seed must be an integer")
        if image is not None and not isinstance(image, (torch.Tensor, Image.Image, list)):
            raise ValueError("Image must be a valid image")
        if image is None and mask is not None:
            raise ValueError("If mask is provided, image must also be provided")

        if mask is not None and not is_valid_mask(mask):
            raise ValueError("Mask must be a valid mask")

        if mask is not None and image is not None and not (get_mask_size(mask) == get_image_size(image)):
            raise ValueError("Mask and image must have the same size")

        if height % (self.vae_scale_factor * 2) != 0 or width % (self.vae_scale_factor * 2) != 0:
            logger.warning(
                f"`height` and `width` have to be divisible by {self.vae_scale_factor * 2} but are {height} and {width}. Dimensions will be resized accordingly"
            )

        if prompt is None:
            raise ValueError("`prompt` must be provided.")
        elif not is_valid_edit_json(prompt):
            raise ValueError(f"`prompt` has to be a valid JSON string or dict but is {type(prompt)}")

        if max_sequence_length is not None and max_sequence_length > 3000:
            raise ValueError(f"`max_sequence_length` cannot be greater than 3000 but is {max_sequence_length}")

    def create_attention_matrix(self, attention_mask):
        attention_matrix = torch.einsum("bi,bj->bij", attention_mask, attention_mask)

        # convert to 0 - keep, -inf ignore
        attention_matrix = torch.where(
            attention_matrix == 1, 0.0, -torch.inf
        )  # Apply -inf to ignored tokens for nulling softmax score
        return attention_matrix

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
            "num_inference_steps": sampling.num_inference_steps,
            "timesteps": sampling.timesteps,
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
        ):
            if name in fields:
                arguments[name] = fields[name]
        for name in (
            "image",
            "mask",
        ):
            if name in media:
                arguments[name] = media[name]
        for name, key in (("mask", "mask_image"),):  # what the engine calls them
            if key in media and name not in arguments:
                arguments[name] = media[key]
        for name in (
            "seed",
            "do_patching",
            "_auto_resize",
        ):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        information = fields.get("additional_information") or {}
        if "prepared_media" in information:
            arguments["prepared_media"] = information["prepared_media"]
        return arguments

    def prepare_generation(
        self,
        prompt: Union[str, List[str]] = None,
        image: Optional[PipelineImageInput] = None,
        mask: Optional[PipelineMaskInput] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        timesteps: List[int] = None,
        seed: int | None = None,
        guidance_scale: float = 5,
        negative_prompt: Optional[Union[str, List[str]]] = None,
        num_images_per_prompt: Optional[int] = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Optional[torch.FloatTensor] = None,
        output_type: str = "pil",
        max_sequence_length: int = 3000,
        do_patching=False,
        _auto_resize: bool = True,
        prepared_media: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""

        if "height" in prepared_media:
            height = prepared_media["height"]
            width = prepared_media["width"]
        elif height is None or width is None:
            if image is not None:
                image_height, image_width = self.image_processor.get_default_height_width(image)
                if _auto_resize:
                    image_width, image_height = min(
                        PREFERRED_RESOLUTION[1024 * 1024],
                        key=lambda size: abs(size[0] / size[1] - image_width / image_height),
                    )
                width, height = image_width, image_height
            else:
                raise ValueError("You must provide either an image or both height and width.")

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            seed=seed,
            image=image,
            mask=mask,
            prompt=prompt,
            height=height,
            width=width,
            max_sequence_length=max_sequence_length,
        )

        if mask is not None and image is not None:
            image = paste_mask_on_image(mask, image)

        # 2. Define call parameters

        if prompt is not None and is_valid_edit_json(prompt):
            prompt = json.dumps(prompt)
        if isinstance(prompt, str):
            batch_size = 1
        else:
            batch_size = len(prompt)

        device = self.device
        if generator is None and seed is not None:
            generator = torch.Generator(device=device).manual_seed(seed)

        (
            prompt_embeds,
            negative_prompt_embeds,
            text_ids,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            prompt_layers,
            negative_prompt_layers,
        ) = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            device=device,
            max_sequence_length=max_sequence_length,
            num_images_per_prompt=num_images_per_prompt,
        )
        prompt_batch_size = prompt_embeds.shape[0]

        if guidance_scale > 1:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)
            prompt_layers = [
                torch.cat([negative_prompt_layers[i], prompt_layers[i]], dim=0) for i in range(len(prompt_layers))
            ]
            prompt_attention_mask = torch.cat([negative_prompt_attention_mask, prompt_attention_mask], dim=0)

        total_num_layers_transformer = len(self.transformer.transformer_blocks) + len(
            self.transformer.single_transformer_blocks
        )
        if len(prompt_layers) >= total_num_layers_transformer:
            # remove first layers
            prompt_layers = prompt_layers[len(prompt_layers) - total_num_layers_transformer :]
        else:
            # duplicate last layer
            prompt_layers = prompt_layers + [prompt_layers[-1]] * (total_num_layers_transformer - len(prompt_layers))

        # Preprocess image
        if "image" in prepared_media:
            image = prepared_media["image"]
        elif image is not None:
            image = self.image_processor.resize(image, height, width)
            image = self.image_processor.preprocess(image, height, width)

        # 5. Prepare latent variables
        num_channels_latents = self.transformer.config.in_channels
        if do_patching:
            num_channels_latents = int(num_channels_latents / 4)

        latents, latent_image_ids = self.prepare_latents(
            prompt_batch_size,
            num_channels_latents,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
            do_patching,
        )

        if image is not None:
            image_latents, image_ids = self.prepare_image_latents(
                image=image,
                batch_size=batch_size * num_images_per_prompt,
                num_channels_latents=num_channels_latents,
                height=height,
                width=width,
                dtype=prompt_embeds.dtype,
                device=device,
                generator=generator,
            )
            latent_image_ids = torch.cat([latent_image_ids, image_ids], dim=0)  # dim 0 is sequence dimension
        else:
            image_latents = None

        latent_attention_mask = torch.ones(
            [latents.shape[0], latents.shape[1]], dtype=latents.dtype, device=latents.device
        )
        if guidance_scale > 1:
            latent_attention_mask = latent_attention_mask.repeat(2, 1)

        if image_latents is None:
            attention_mask = torch.cat([prompt_attention_mask, latent_attention_mask], dim=1)
        else:
            image_latent_attention_mask = torch.ones(
                [image_latents.shape[0], image_latents.shape[1]],
                dtype=image_latents.dtype,
                device=image_latents.device,
            )
            if guidance_scale > 1:
                image_latent_attention_mask = image_latent_attention_mask.repeat(2, 1)
            attention_mask = torch.cat(
                [prompt_attention_mask, latent_attention_mask, image_latent_attention_mask], dim=1
            )

        attention_mask = self.create_attention_matrix(attention_mask)  # batch, seq => batch, seq, seq
        attention_mask = attention_mask.unsqueeze(dim=1).to(dtype=self.dtype)  # for head broadcasting

        joint_attention_kwargs = {}
        joint_attention_kwargs["attention_mask"] = attention_mask

        # Adapt scheduler to dynamic shifting (resolution dependent)

        if do_patching:
            seq_len = (height // (self.vae_scale_factor * 2)) * (width // (self.vae_scale_factor * 2))
        else:
            seq_len = (height // self.vae_scale_factor) * (width // self.vae_scale_factor)

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)

        mu = calculate_shift(
            seq_len,
            self.scheduler.config.base_image_seq_len,
            self.scheduler.config.max_image_seq_len,
            self.scheduler.config.base_shift,
            self.scheduler.config.max_shift,
        )

        # Init sigmas and timesteps according to shift size
        # This changes the scheduler in-place according to the dynamic scheduling
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler,
            num_inference_steps=num_inference_steps,
            device=device,
            timesteps=None,
            sigmas=sigmas,
            mu=mu,
        )

        # Support old different diffusers versions
        if len(latent_image_ids.shape) == 3:
            latent_image_ids = latent_image_ids[0]

        if len(text_ids.shape) == 3:
            text_ids = text_ids[0]
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "image_latents": image_latents,
                "guidance_scale": guidance_scale,
                "prompt_embeds": prompt_embeds,
                "prompt_layers": prompt_layers,
                "joint_attention_kwargs": joint_attention_kwargs,
                "text_ids": text_ids,
                "latent_image_ids": latent_image_ids,
            },
            {
                "output_type": output_type,
                "do_patching": do_patching,
                "height": height,
                "width": width,
            },
        )

    def predict_guided_noise(
        self,
        latents,
        image_latents,
        guidance_scale,
        t,
        prompt_embeds,
        prompt_layers,
        joint_attention_kwargs,
        text_ids,
        latent_image_ids,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""

        latent_model_input = latents

        if image_latents is not None:
            latent_model_input = torch.cat([latent_model_input, image_latents], dim=1)

        # expand the latents if we are doing classifier free guidance
        latent_model_input = torch.cat([latent_model_input] * 2) if guidance_scale > 1 else latent_model_input

        # broadcast to batch dimension in a way that's compatible with ONNX/Core ML
        timestep = t.expand(latent_model_input.shape[0]).to(
            device=latent_model_input.device, dtype=latent_model_input.dtype
        )

        # This is predicts "v" from flow-matching or eps from diffusion
        noise_pred = self.transformer(
            hidden_states=latent_model_input,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds,
            text_encoder_layers=prompt_layers,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
            txt_ids=text_ids,
            img_ids=latent_image_ids,
        )[0]

        # perform guidance
        if guidance_scale > 1:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
        return noise_pred

    def step_latents(self, scheduler, noise_pred, t, latents):
        # compute the previous noisy sample x_t -> x_t-1
        latents = scheduler.step(noise_pred[:, : latents.shape[1], ...], t, latents, return_dict=False)[0]
        return latents

    def diffuse(
        self,
        latents,
        timesteps,
        image_latents,
        guidance_scale,
        prompt_embeds,
        prompt_layers,
        joint_attention_kwargs,
        text_ids,
        latent_image_ids,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            for t in timesteps:
                noise_pred = self.predict_guided_noise(
                    latents=latents,
                    image_latents=image_latents,
                    guidance_scale=guidance_scale,
                    t=t,
                    prompt_embeds=prompt_embeds,
                    prompt_layers=prompt_layers,
                    joint_attention_kwargs=joint_attention_kwargs,
                    text_ids=text_ids,
                    latent_image_ids=latent_image_ids,
                )
                latents = self.step_latents(self.scheduler, noise_pred=noise_pred, t=t, latents=latents)
                progress_bar.update()
        return latents

    def decode(
        self,
        latents,
        output_type,
        do_patching,
        height,
        width,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        if output_type == "latent":
            image = latents

        else:
            if do_patching:
                latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
            else:
                latents = self._unpack_latents_no_patch(latents, height, width, self.vae_scale_factor)

            latents = latents.unsqueeze(dim=2)
            latents_device = latents[0].device
            latents_dtype = latents[0].dtype
            latents_mean = (
                torch.tensor(self.vae.config.latents_mean)
                .view(1, self.vae.config.z_dim, 1, 1, 1)
                .to(latents_device, latents_dtype)
            )
            latents_std = 1.0 / torch.tensor(self.vae.config.latents_std).view(1, self.vae.config.z_dim, 1, 1, 1).to(
                latents_device, latents_dtype
            )
            latents_scaled = torch.cat([latent / latents_std + latents_mean for latent in latents], dim=0)
            image = self.vae.decode(latents_scaled, return_dict=False)[0]
            image = image.squeeze(dim=2)
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
                    image_latents=inputs["image_latents"],
                    guidance_scale=inputs["guidance_scale"],
                    t=state.current_timestep,
                    prompt_embeds=inputs["prompt_embeds"],
                    prompt_layers=inputs["prompt_layers"],
                    joint_attention_kwargs=inputs["joint_attention_kwargs"],
                    text_ids=inputs["text_ids"],
                    latent_image_ids=inputs["latent_image_ids"],
                )
            )
        return torch.cat(predictions)

    def step_scheduler(self, state: StepRequestState, noise_pred: torch.Tensor, **kwargs: Any) -> None:
        """Step execution: one step of the request's own scheduler."""
        state.latents = self.step_latents(
            state.scheduler, noise_pred=noise_pred, t=state.current_timestep, latents=state.latents
        )
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **kwargs: Any) -> DiffusionOutput:
        """Step execution: decode a finished request."""
        return self.finish(latents=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
