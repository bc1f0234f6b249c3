# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.Cosmos2_5_TransferPipeline (pipelines/cosmos/pipeline_cosmos2_5_transfer.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, List, Optional, Union

import numpy as np
import torch
from cache_dit import refresh_context
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer import DEFAULT_NEGATIVE_PROMPT
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
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
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType
from vllm_omni.platforms import current_omni_platform

from .cosmos_transformer import CosmosTransformer3DModel


def _maybe_pad_or_trim_video(video: torch.Tensor, num_frames: int):
    n_pad_frames = num_frames - video.shape[2]
    if n_pad_frames > 0:
        last_frame = video[:, :, -1:, :, :]
        video = torch.cat((video, last_frame.repeat(1, 1, n_pad_frames, 1, 1)), dim=2)
    elif num_frames < video.shape[2]:
        video = video[:, :, :num_frames, :, :]
    return video


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


def refuse_cache_dit(denoiser: nn.Module) -> None:
    """Cache-DiT takes every further call of the denoiser in a step for another step."""
    if hasattr(denoiser, "_context_manager"):
        raise NotImplementedError("Cache-DiT is on, and a step calls the denoiser once more than it can know of.")


def get_cosmos2_5_transfer_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """Pre-processing of `Cosmos2_5_TransferPipeline`: what its media need before a model; it runs in the engine process."""
    vae_config = read_json(od_config, "vae/config.json")
    vae_scale_factor_spatial = 2 ** len(vae_config.get("temperal_downsample", [False, True, True]))
    video_processor = VideoProcessor(vae_scale_factor=vae_scale_factor_spatial)

    def prepare_media(
        *,
        controls: PipelineImageInput | List[PipelineImageInput],
        height: int = 704,
        width: Optional[int] = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The values that `prepare_generation` has no need to compute then."""
        prepared = {}

        if width is None:
            frame = controls[0] if isinstance(controls, list) else controls
            if isinstance(frame, list):
                frame = frame[0]
            if isinstance(frame, (torch.Tensor, np.ndarray)):
                if frame.ndim == 5:
                    frame = frame[0, 0]
                elif frame.ndim == 4:
                    frame = frame[0]

            if isinstance(frame, Image.Image):
                width = int((height + 16) * (frame.width / frame.height))
            else:
                width = int((height + 16) * (frame.shape[2] / frame.shape[1]))  # NOTE: assuming C H W

        prepared["control_video"] = video_processor.preprocess_video(controls, height, width)
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
            arguments = Cosmos2_5_TransferPipeline.request_arguments(
                prompt, request.sampling_params, request.is_dummy_run()
            )
            prepared = prepare_media(**arguments)
        except Exception:  # what is wrong with a request, the pipeline itself says, after Diffusers' own checks
            return request
        information = prompt.get("additional_information") or {}
        # Requests take their steps together only where their tensors have equal shapes.
        request.batch_compatibility_key = tuple((name, shape_of(value)) for name, value in prepared.items())
        request.prompt = {**prompt, "additional_information": {**information, "prepared_media": prepared}}
        return request

    return pre_process_func


class Cosmos2_5_TransferPipeline(
    nn.Module, CFGParallelMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin, SupportsComponentDiscovery
):
    """Pipeline for Cosmos Transfer2.5, supporting auto-regressive inference."""

    supports_request_batch: ClassVar[bool] = False
    default_num_inference_steps: ClassVar[int] = 36
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
    }

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config
        self.device = get_local_device()
        self.dtype = od_config.dtype
        model_index = read_json(od_config, "model_index.json")

        # Offloaded components wait on the CPU until the engine moves them.
        device = torch.device("cpu") if od_config.enable_cpu_offload else self.device
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.scheduler = load_component(od_config, model_index, "scheduler")
        self.controlnet = load_component(od_config, model_index, "controlnet", torch_dtype=od_config.dtype).to(device)
        self.safety_checker = None
        if model_index.get("safety_checker", [None])[0] is not None:
            self.safety_checker = load_component(od_config, model_index, "safety_checker", dtype=od_config.dtype).to(
                device
            )
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
        self.transformer = CosmosTransformer3DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, CosmosTransformer3DModel),
        )

        if self.safety_checker is None:
            from cosmos_guardrail import CosmosSafetyChecker

            self.safety_checker = CosmosSafetyChecker()

        self.vae_scale_factor_temporal = 2 ** sum(self.vae.temperal_downsample)
        self.vae_scale_factor_spatial = 2 ** len(self.vae.temperal_downsample)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

        latents_mean = (
            torch.tensor(self.vae.config.latents_mean).view(1, self.vae.config.z_dim, 1, 1, 1).float()
            if getattr(self.vae.config, "latents_mean", None) is not None
            else None
        )
        latents_std = (
            torch.tensor(self.vae.config.latents_std).view(1, self.vae.config.z_dim, 1, 1, 1).float()
            if getattr(self.vae.config, "latents_std", None) is not None
            else None
        )
        self.latents_mean = latents_mean
        self.latents_std = latents_std

        if self.latents_mean is None or self.latents_std is None:
            raise ValueError("VAE configuration must define both `latents_mean` and `latents_std`.")
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    def _get_prompt_embeds(
        self,
        prompt: Union[str, List[str]] = None,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        device = device or self.device
        dtype = dtype or self.text_encoder.dtype
        prompt = [prompt] if isinstance(prompt, str) else prompt

        input_ids_batch = []

        for sample_idx in range(len(prompt)):
            conversations = [
                {
                    "role": "system",
                    "content": [
                        {
                            "type": "text",
                            "text": "You are a helpful assistant who will provide prompts to an image generator.",
                        }
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "text",
                            "text": prompt[sample_idx],
                        }
                    ],
                },
            ]
            input_ids = self.tokenizer.apply_chat_template(
                conversations,
                tokenize=True,
                add_generation_prompt=False,
                add_vision_id=False,
                max_length=max_sequence_length,
                truncation=True,
                padding="max_length",
            )
            input_ids = (
                input_ids["input_ids"] if not isinstance(input_ids, list) and "input_ids" in input_ids else input_ids
            )
            input_ids = torch.LongTensor(input_ids)
            input_ids_batch.append(input_ids)

        input_ids_batch = torch.stack(input_ids_batch, dim=0)

        outputs = self.text_encoder(
            input_ids_batch.to(device),
            output_hidden_states=True,
        )
        hidden_states = outputs.hidden_states

        normalized_hidden_states = []
        for layer_idx in range(1, len(hidden_states)):
            normalized_state = (hidden_states[layer_idx] - hidden_states[layer_idx].mean(dim=-1, keepdim=True)) / (
                hidden_states[layer_idx].std(dim=-1, keepdim=True) + 1e-8
            )
            normalized_hidden_states.append(normalized_state)

        prompt_embeds = torch.cat(normalized_hidden_states, dim=-1)
        prompt_embeds = prompt_embeds.to(dtype=dtype, device=device)

        return prompt_embeds

    # Modified from diffusers.pipelines.cosmos.pipeline_cosmos_text2world.CosmosTextToWorldPipeline.encode_prompt
    def encode_prompt(
        self,
        prompt: Union[str, List[str]],
        negative_prompt: Optional[Union[str, List[str]]] = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 512,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        r"""
        Encodes the prompt into text encoder hidden states.

        Args:
            prompt (`str` or `List[str]`, *optional*):
                prompt to be encoded
            negative_prompt (`str` or `List[str]`, *optional*):
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
            prompt_embeds = self._get_prompt_embeds(
                prompt=prompt, max_sequence_length=max_sequence_length, device=device, dtype=dtype
            )

            # duplicate text embeddings for each generation per prompt, using mps friendly method
            _, seq_len, _ = prompt_embeds.shape
            prompt_embeds = prompt_embeds.repeat(1, num_videos_per_prompt, 1)
            prompt_embeds = prompt_embeds.view(batch_size * num_videos_per_prompt, seq_len, -1)

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

            negative_prompt_embeds = self._get_prompt_embeds(
                prompt=negative_prompt, max_sequence_length=max_sequence_length, device=device, dtype=dtype
            )

            # duplicate text embeddings for each generation per prompt, using mps friendly method
            _, seq_len, _ = negative_prompt_embeds.shape
            negative_prompt_embeds = negative_prompt_embeds.repeat(1, num_videos_per_prompt, 1)
            negative_prompt_embeds = negative_prompt_embeds.view(batch_size * num_videos_per_prompt, seq_len, -1)

        return prompt_embeds, negative_prompt_embeds

    # Modified from diffusers.pipelines.cosmos.pipeline_cosmos2_video2world.Cosmos2VideoToWorldPipeline.prepare_latents and
    # diffusers.pipelines.cosmos.pipeline_cosmos2_video2world.Cosmos2TextToImagePipeline.prepare_latents
    def prepare_latents(
        self,
        video: Optional[torch.Tensor],
        batch_size: int,
        num_channels_latents: int = 16,
        height: int = 704,
        width: int = 1280,
        num_frames_in: int = 93,
        num_frames_out: int = 93,
        do_classifier_free_guidance: bool = True,
        dtype: Optional[torch.dtype] = None,
        device: Optional[torch.device] = None,
        generator: Optional[Union[torch.Generator, List[torch.Generator]]] = None,
        latents: Optional[torch.Tensor] = None,
        num_cond_latent_frames: int = 0,
    ) -> torch.Tensor:
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )

        B = batch_size
        C = num_channels_latents
        T = (num_frames_out - 1) // self.vae_scale_factor_temporal + 1
        H = height // self.vae_scale_factor_spatial
        W = width // self.vae_scale_factor_spatial
        shape = (B, C, T, H, W)

        if latents is not None:
            if latents.shape[1:] != shape[1:]:
                raise ValueError(f"Unexpected `latents` shape, got {latents.shape}, expected {shape}.")
            latents = latents.to(device=device, dtype=dtype)
        else:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)

        if num_frames_in == 0:
            cond_mask = torch.zeros((B, 1, T, H, W), dtype=latents.dtype, device=latents.device)
            cond_indicator = torch.zeros((B, 1, T, 1, 1), dtype=latents.dtype, device=latents.device)

            cond_latents = torch.zeros_like(latents)

            return (
                latents,
                cond_latents,
                cond_mask,
                cond_indicator,
            )
        else:
            if video is None:
                raise ValueError("`video` must be provided when `num_frames_in` is greater than 0.")
            video = video.to(device=device, dtype=self.vae.dtype)
            if isinstance(generator, list):
                cond_latents = [
                    retrieve_latents(self.vae.encode(video[i].unsqueeze(0)), generator=generator[i])
                    for i in range(batch_size)
                ]
            else:
                cond_latents = [retrieve_latents(self.vae.encode(vid.unsqueeze(0)), generator) for vid in video]

            cond_latents = torch.cat(cond_latents, dim=0).to(dtype)

            latents_mean = self.latents_mean.to(device=device, dtype=dtype)
            latents_std = self.latents_std.to(device=device, dtype=dtype)
            cond_latents = (cond_latents - latents_mean) / latents_std

            padding_shape = (B, 1, T, H, W)
            ones_padding = latents.new_ones(padding_shape)
            zeros_padding = latents.new_zeros(padding_shape)

            cond_indicator = latents.new_zeros(B, 1, latents.size(2), 1, 1)
            cond_indicator[:, :, 0:num_cond_latent_frames, :, :] = 1.0
            cond_mask = cond_indicator * ones_padding + (1 - cond_indicator) * zeros_padding

            return (
                latents,
                cond_latents,
                cond_mask,
                cond_indicator,
            )

    # Modified from diffusers.pipelines.cosmos.pipeline_cosmos_text2world.CosmosTextToWorldPipeline.check_inputs
    def check_inputs(
        self,
        prompt,
        height,
        width,
        prompt_embeds=None,
        num_ar_conditional_frames=None,
        num_ar_latent_conditional_frames=None,
        num_frames_per_chunk=None,
        num_frames=None,
        conditional_frame_timestep=0.1,
    ):
        if width <= 0 or height <= 0 or height % 16 != 0 or width % 16 != 0:
            raise ValueError(
                f"`height` and `width` have to be divisible by 16 (& positive) but are {height} and {width}."
            )

        if num_frames is not None and num_frames <= 0:
            raise ValueError(f"`num_frames` has to be a positive integer when provided but is {num_frames}.")

        if conditional_frame_timestep < 0 or conditional_frame_timestep > 1:
            raise ValueError(
                "`conditional_frame_timestep` has to be a float in the [0, 1] interval but is "
                f"{conditional_frame_timestep}."
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

        if num_ar_latent_conditional_frames is not None and num_ar_conditional_frames is not None:
            raise ValueError(
                "Provide only one of `num_ar_conditional_frames` or `num_ar_latent_conditional_frames`, not both."
            )
        if num_ar_latent_conditional_frames is None and num_ar_conditional_frames is None:
            raise ValueError("Provide either `num_ar_conditional_frames` or `num_ar_latent_conditional_frames`.")
        if num_ar_latent_conditional_frames is not None and num_ar_latent_conditional_frames < 0:
            raise ValueError("`num_ar_latent_conditional_frames` must be >= 0.")
        if num_ar_conditional_frames is not None and num_ar_conditional_frames < 0:
            raise ValueError("`num_ar_conditional_frames` must be >= 0.")

        if num_ar_latent_conditional_frames is not None:
            num_ar_conditional_frames = max(
                0, (num_ar_latent_conditional_frames - 1) * self.vae_scale_factor_temporal + 1
            )

        min_chunk_len = self.vae_scale_factor_temporal + 1
        if num_frames_per_chunk < min_chunk_len:
            logger.warning(f"{num_frames_per_chunk=} must be larger than {min_chunk_len=}, setting to min_chunk_len")
            num_frames_per_chunk = min_chunk_len
        if getattr(self.transformer.config, "max_size", None) is not None:
            max_frames_by_rope = max(
                size // patch
                for size, patch in zip(self.transformer.config.max_size, self.transformer.config.patch_size)
            )
            if num_frames_per_chunk > max_frames_by_rope:
                raise ValueError(
                    f"{num_frames_per_chunk=} is too large for RoPE setting ({max_frames_by_rope=}). "
                    "Please reduce `num_frames_per_chunk`."
                )

        if num_ar_conditional_frames >= num_frames_per_chunk:
            raise ValueError(
                f"{num_ar_conditional_frames=} must be smaller than {num_frames_per_chunk=} for chunked generation."
            )

        return num_frames_per_chunk

    @classmethod
    def request_arguments(
        cls, prompt: OmniPromptType, sampling: OmniDiffusionSamplingParams, is_dummy_run: bool
    ) -> dict[str, Any]:
        """Arguments that a request gives; what it omits keeps the default of `prepare_generation`."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        media = fields.get("multi_modal_data") or {}
        for name, reason in cls._refused_arguments.items():
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
        for name in ("controls",):
            if name in media:
                arguments[name] = media[name]
        for name in (
            "controls_conditioning_scale",
            "num_frames_per_chunk",
            "conditional_frame_timestep",
            "num_ar_conditional_frames",
            "num_ar_latent_conditional_frames",
        ):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        information = fields.get("additional_information") or {}
        if "prepared_media" in information:
            arguments["prepared_media"] = information["prepared_media"]
        return arguments

    def prepare_generation(
        self,
        controls: PipelineImageInput | List[PipelineImageInput],
        controls_conditioning_scale: Union[float, List[float]] = 1.0,
        prompt: Union[str, List[str]] | None = None,
        negative_prompt: Union[str, List[str]] = DEFAULT_NEGATIVE_PROMPT,
        height: int = 704,
        width: Optional[int] = None,
        num_frames: Optional[int] = None,
        num_frames_per_chunk: int = 93,
        num_inference_steps: int = 36,
        guidance_scale: float = 3.0,
        num_videos_per_prompt: int = 1,
        generator: Optional[Union[torch.Generator, List[torch.Generator]]] = None,
        latents: Optional[torch.Tensor] = None,
        prompt_embeds: Optional[torch.Tensor] = None,
        negative_prompt_embeds: Optional[torch.Tensor] = None,
        output_type: Optional[str] = "pil",
        max_sequence_length: int = 512,
        conditional_frame_timestep: float = 0.1,
        num_ar_conditional_frames: Optional[int] = 1,
        num_ar_latent_conditional_frames: Optional[int] = None,
        prepared_media: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""
        if self.safety_checker is None:
            raise ValueError(
                f"You have disabled the safety checker for {self.__class__}. This is in violation of the "
                "[NVIDIA Open Model License Agreement](https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license). "
                f"Please ensure that you are compliant with the license agreement."
            )

        if width is None:
            frame = controls[0] if isinstance(controls, list) else controls
            if isinstance(frame, list):
                frame = frame[0]
            if isinstance(frame, (torch.Tensor, np.ndarray)):
                if frame.ndim == 5:
                    frame = frame[0, 0]
                elif frame.ndim == 4:
                    frame = frame[0]

            if isinstance(frame, Image.Image):
                width = int((height + 16) * (frame.width / frame.height))
            else:
                if frame.ndim != 3:
                    raise ValueError("`controls` must contain 3D frames in CHW format.")
                width = int((height + 16) * (frame.shape[2] / frame.shape[1]))  # NOTE: assuming C H W

        num_frames_per_chunk = self.check_inputs(
            prompt,
            height,
            width,
            prompt_embeds,
            num_ar_conditional_frames,
            num_ar_latent_conditional_frames,
            num_frames_per_chunk,
            num_frames,
            conditional_frame_timestep,
        )

        if num_ar_latent_conditional_frames is not None:
            num_cond_latent_frames = num_ar_latent_conditional_frames
            num_ar_conditional_frames = max(0, (num_cond_latent_frames - 1) * self.vae_scale_factor_temporal + 1)
        else:
            num_cond_latent_frames = max(0, (num_ar_conditional_frames - 1) // self.vae_scale_factor_temporal + 1)
        do_classifier_free_guidance = guidance_scale > 1.0

        device = self.device

        if self.safety_checker is not None:
            self.safety_checker.to(device)
            if prompt is not None:
                prompt_list = [prompt] if isinstance(prompt, str) else prompt
                for p in prompt_list:
                    if not self.safety_checker.check_text_safety(p):
                        raise ValueError(
                            f"Cosmos Guardrail detected unsafe text in the prompt: {p}. Please ensure that the "
                            f"prompt abides by the NVIDIA Open Model License Agreement."
                        )

        # Define call parameters
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        # Encode input prompt
        (
            prompt_embeds,
            negative_prompt_embeds,
        ) = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=do_classifier_free_guidance,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            device=device,
            max_sequence_length=max_sequence_length,
        )

        vae_dtype = self.vae.dtype
        transformer_dtype = self.dtype

        if getattr(self.transformer.config, "img_context_dim_in", None):
            img_context = torch.zeros(
                batch_size,
                self.transformer.config.img_context_num_tokens,
                self.transformer.config.img_context_dim_in,
                device=prompt_embeds.device,
                dtype=transformer_dtype,
            )

            if num_videos_per_prompt > 1:
                img_context = img_context.repeat_interleave(num_videos_per_prompt, dim=0)

            encoder_hidden_states = (prompt_embeds, img_context)
            neg_encoder_hidden_states = (negative_prompt_embeds, img_context)
        else:
            encoder_hidden_states = prompt_embeds
            neg_encoder_hidden_states = negative_prompt_embeds

        if "control_video" in prepared_media:
            control_video = prepared_media["control_video"]
        else:
            control_video = self.video_processor.preprocess_video(controls, height, width)
        if control_video.shape[0] != batch_size:
            if control_video.shape[0] == 1:
                control_video = control_video.repeat(batch_size, 1, 1, 1, 1)
            else:
                raise ValueError(
                    f"Expected controls batch size {batch_size} to match prompt batch size, but got {control_video.shape[0]}."
                )

        num_frames_out = control_video.shape[2]
        if num_frames is not None:
            num_frames_out = min(num_frames_out, num_frames)

        control_video = _maybe_pad_or_trim_video(control_video, num_frames_out)
        # chunk information
        chunk_stride = num_frames_per_chunk - num_ar_conditional_frames
        chunk_idxs = [
            (start_idx, min(start_idx + num_frames_per_chunk, num_frames_out))
            for start_idx in range(0, num_frames_out - num_ar_conditional_frames, chunk_stride)
        ]

        video_chunks = []
        latents_mean = self.latents_mean.to(dtype=vae_dtype, device=device)
        latents_std = self.latents_std.to(dtype=vae_dtype, device=device)

        def decode_latents(latents):
            latents = latents * latents_std + latents_mean
            video = self.vae.decode(latents.to(dtype=self.vae.dtype, device=device), return_dict=False)[0]
            return video

        latents_arg = latents
        initial_num_cond_latent_frames = 0
        latent_chunks = []
        num_chunks = len(chunk_idxs)
        total_steps = num_inference_steps * num_chunks
        return (
            {
                "chunk_idxs": chunk_idxs,
                "batch_size": batch_size,
                "num_frames_per_chunk": num_frames_per_chunk,
                "height": height,
                "width": width,
                "vae_dtype": vae_dtype,
                "video_chunks": video_chunks,
                "num_ar_conditional_frames": num_ar_conditional_frames,
                "device": device,
                "num_videos_per_prompt": num_videos_per_prompt,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "generator": generator,
                "initial_num_cond_latent_frames": initial_num_cond_latent_frames,
                "num_cond_latent_frames": num_cond_latent_frames,
                "latents_arg": latents_arg,
                "transformer_dtype": transformer_dtype,
                "conditional_frame_timestep": conditional_frame_timestep,
                "control_video": control_video,
                "latents_mean": latents_mean,
                "latents_std": latents_std,
                "num_inference_steps": num_inference_steps,
                "encoder_hidden_states": encoder_hidden_states,
                "controls_conditioning_scale": controls_conditioning_scale,
                "neg_encoder_hidden_states": neg_encoder_hidden_states,
                "guidance_scale": guidance_scale,
                "decode_latents": decode_latents,
                "latent_chunks": latent_chunks,
            },
            {
                "output_type": output_type,
                "video_chunks": video_chunks,
                "num_ar_conditional_frames": num_ar_conditional_frames,
                "num_frames_out": num_frames_out,
                "device": device,
                "latent_chunks": latent_chunks,
                "num_cond_latent_frames": num_cond_latent_frames,
            },
        )

    def diffuse(
        self,
        chunk_idxs,
        batch_size,
        num_frames_per_chunk,
        height,
        width,
        vae_dtype,
        video_chunks,
        num_ar_conditional_frames,
        device,
        num_videos_per_prompt,
        do_classifier_free_guidance,
        generator,
        initial_num_cond_latent_frames,
        num_cond_latent_frames,
        latents_arg,
        transformer_dtype,
        conditional_frame_timestep,
        control_video,
        latents_mean,
        latents_std,
        num_inference_steps,
        encoder_hidden_states,
        controls_conditioning_scale,
        neg_encoder_hidden_states,
        guidance_scale,
        decode_latents,
        latent_chunks,
    ) -> None:
        """All denoising, from start to end."""
        for chunk_idx, (start_idx, end_idx) in enumerate(chunk_idxs):
            if chunk_idx == 0:
                prev_output = torch.zeros((batch_size, num_frames_per_chunk, 3, height, width), dtype=vae_dtype)
                prev_output = self.video_processor.preprocess_video(prev_output, height, width)
            else:
                prev_output = video_chunks[-1].clone()
                if num_ar_conditional_frames > 0:
                    prev_output[:, :, :num_ar_conditional_frames] = prev_output[:, :, -num_ar_conditional_frames:]
                    prev_output[:, :, num_ar_conditional_frames:] = -1  # -1 == 0 in processed video space
                else:
                    prev_output.fill_(-1)

            chunk_video = prev_output.to(device=device, dtype=vae_dtype)
            chunk_video = _maybe_pad_or_trim_video(chunk_video, num_frames_per_chunk)
            latents, cond_latent, cond_mask, cond_indicator = self.prepare_latents(
                video=chunk_video,
                batch_size=batch_size * num_videos_per_prompt,
                num_channels_latents=self.transformer.config.in_channels - 1,
                height=height,
                width=width,
                num_frames_in=chunk_video.shape[2],
                num_frames_out=num_frames_per_chunk,
                do_classifier_free_guidance=do_classifier_free_guidance,
                dtype=torch.float32,
                device=device,
                generator=generator,
                num_cond_latent_frames=initial_num_cond_latent_frames if chunk_idx == 0 else num_cond_latent_frames,
                latents=latents_arg,
            )
            cond_mask = cond_mask.to(transformer_dtype)
            cond_timestep = torch.ones_like(cond_indicator) * conditional_frame_timestep
            padding_mask = latents.new_zeros(1, 1, height, width, dtype=transformer_dtype)

            chunk_control_video = control_video[:, :, start_idx:end_idx, ...].to(device=device, dtype=self.vae.dtype)
            chunk_control_video = _maybe_pad_or_trim_video(chunk_control_video, num_frames_per_chunk)
            if isinstance(generator, list):
                controls_latents = [
                    retrieve_latents(self.vae.encode(chunk_control_video[i].unsqueeze(0)), generator=generator[i])
                    for i in range(chunk_control_video.shape[0])
                ]
            else:
                controls_latents = [
                    retrieve_latents(self.vae.encode(vid.unsqueeze(0)), generator=generator)
                    for vid in chunk_control_video
                ]
            controls_latents = torch.cat(controls_latents, dim=0).to(transformer_dtype)

            controls_latents = (controls_latents - latents_mean) / latents_std

            # Denoising loop
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps = self.scheduler.timesteps

            gt_velocity = (latents - cond_latent) * cond_mask
            begin_anew(self.transformer)
            for i, t in enumerate(timesteps):
                current_timestep = t.cpu().item()

                # NOTE: assumes sigma(t) \in [0, 1]
                sigma_t = (
                    torch.tensor(self.scheduler.sigmas[i].item())
                    .unsqueeze(0)
                    .to(device=device, dtype=transformer_dtype)
                )

                in_latents = cond_mask * cond_latent + (1 - cond_mask) * latents
                in_latents = in_latents.to(transformer_dtype)
                in_timestep = cond_indicator * cond_timestep + (1 - cond_indicator) * sigma_t
                control_output = self.controlnet(
                    controls_latents=controls_latents,
                    latents=in_latents,
                    timestep=in_timestep,
                    encoder_hidden_states=encoder_hidden_states,
                    condition_mask=cond_mask,
                    conditioning_scale=controls_conditioning_scale,
                    padding_mask=padding_mask,
                    return_dict=False,
                )
                control_blocks = control_output[0]

                noise_pred = self.transformer(
                    hidden_states=in_latents,
                    timestep=in_timestep,
                    encoder_hidden_states=encoder_hidden_states,
                    block_controlnet_hidden_states=control_blocks,
                    condition_mask=cond_mask,
                    padding_mask=padding_mask,
                    return_dict=False,
                )[0]
                noise_pred = gt_velocity + noise_pred * (1 - cond_mask)

                if do_classifier_free_guidance:
                    control_output = self.controlnet(
                        controls_latents=controls_latents,
                        latents=in_latents,
                        timestep=in_timestep,
                        encoder_hidden_states=neg_encoder_hidden_states,  # NOTE: negative prompt
                        condition_mask=cond_mask,
                        conditioning_scale=controls_conditioning_scale,
                        padding_mask=padding_mask,
                        return_dict=False,
                    )
                    control_blocks = control_output[0]

                    refuse_cache_dit(self.transformer)
                    noise_pred_neg = self.transformer(
                        hidden_states=in_latents,
                        timestep=in_timestep,
                        encoder_hidden_states=neg_encoder_hidden_states,  # NOTE: negative prompt
                        block_controlnet_hidden_states=control_blocks,
                        condition_mask=cond_mask,
                        padding_mask=padding_mask,
                        return_dict=False,
                    )[0]
                    # NOTE: replace velocity (noise_pred_neg) with gt_velocity for conditioning inputs only
                    noise_pred_neg = gt_velocity + noise_pred_neg * (1 - cond_mask)
                    noise_pred = noise_pred + guidance_scale * (noise_pred - noise_pred_neg)

                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

            video_chunks.append(decode_latents(latents).detach().cpu())
            latent_chunks.append(latents.detach().cpu())

    def decode(
        self,
        output_type,
        video_chunks,
        num_ar_conditional_frames,
        num_frames_out,
        device,
        latent_chunks,
        num_cond_latent_frames,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        if not output_type == "latent":
            video_chunks = [
                chunk[:, :, num_ar_conditional_frames:, ...] if chunk_idx != 0 else chunk
                for chunk_idx, chunk in enumerate(video_chunks)
            ]
            video = torch.cat(video_chunks, dim=2)
            video = video[:, :, :num_frames_out, ...]

            assert self.safety_checker is not None
            self.safety_checker.to(device)
            video = self.video_processor.postprocess_video(video, output_type="np")
            video = (video * 255).astype(np.uint8)
            video_batch = []
            for vid in video:
                vid = self.safety_checker.check_video_safety(vid)
                if vid is None:
                    video_batch.append(np.zeros_like(video[0]))
                else:
                    video_batch.append(vid)
            video = np.stack(video_batch).astype(np.float32) / 255.0 * 2 - 1
            video = torch.from_numpy(video).permute(0, 4, 1, 2, 3)
        else:
            latent_T = (num_frames_out - 1) // self.vae_scale_factor_temporal + 1
            latent_chunks = [
                chunk[:, :, num_cond_latent_frames:, ...] if chunk_idx != 0 else chunk
                for chunk_idx, chunk in enumerate(latent_chunks)
            ]
            video = torch.cat(latent_chunks, dim=2)
            video = video[:, :, :latent_T, ...]
        return video

    def generate(self, inputs: dict[str, Any], decode_inputs: dict[str, Any]) -> DiffusionOutput:
        """Denoise what was prepared, and decode it."""
        self.diffuse(**inputs)
        return self.finish(**decode_inputs)

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
        return [self.generate(*self.prepare_generation(**arguments)) for arguments in requests]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
