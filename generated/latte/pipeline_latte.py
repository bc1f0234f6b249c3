# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.LattePipeline (pipelines/latte/pipeline_latte.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import html
import importlib
import inspect
import json
import os
import re
import urllib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from cache_dit import DBCacheConfig, refresh_context
from diffusers.utils.import_utils import BACKENDS_MAPPING, is_bs4_available, is_ftfy_available
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub import hf_hub_download
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl import DistributedAutoencoderKL
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
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.diffusion.worker.utils import StepRequestState
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType
from vllm_omni.platforms import current_omni_platform

from .latte_transformer import LatteTransformer3DModel


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
    component_class = {"AutoencoderKL": DistributedAutoencoderKL}.get(class_name) or getattr(
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


class LattePipeline(
    nn.Module, CFGParallelMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin, SupportsComponentDiscovery
):
    """Pipeline for text-to-video generation using Latte."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 50
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
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
        "prompt_embeds",
        "extra_step_kwargs",
    )
    _branch_rows: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    _agreed: ClassVar[tuple[str, ...]] = ("timesteps",)

    bad_punct_regex = re.compile(r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/\\*]{1,}")

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config
        self.device = get_local_device()
        self.dtype = od_config.dtype
        model_index = read_json(od_config, "model_index.json")

        # Offloaded components wait on the CPU until the engine moves them.
        device = torch.device("cpu") if od_config.enable_cpu_offload else self.device
        self.tokenizer = None
        if model_index.get("tokenizer", [None])[0] is not None:
            self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.text_encoder = None
        if model_index.get("text_encoder", [None])[0] is not None:
            self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.scheduler = load_component(od_config, model_index, "scheduler")
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
        self.transformer = LatteTransformer3DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, LatteTransformer3DModel),
        )

        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    # Adapted from https://github.com/PixArt-alpha/PixArt-alpha/blob/master/diffusion/model/utils.py
    def mask_text_embeddings(self, emb, mask):
        if emb.shape[0] == 1:
            keep_index = mask.sum().item()
            return emb[:, :, :keep_index, :], keep_index  # 1, 120, 4096 -> 1 7 4096
        else:
            masked_feature = emb * mask[:, None, :, None]  # 1 120 4096
            return masked_feature, emb.shape[2]

    # Adapted from diffusers.pipelines.deepfloyd_if.pipeline_if.encode_prompt
    def encode_prompt(
        self,
        prompt: str | list[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        clean_caption: bool = False,
        mask_feature: bool = True,
        dtype=None,
    ):
        r"""
        Encodes the prompt into text encoder hidden states.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                prompt to be encoded
            negative_prompt (`str` or `list[str]`, *optional*):
                The prompt not to guide the video generation. If not defined, one has to pass `negative_prompt_embeds`
                instead. Ignored when not using guidance (i.e., ignored if `guidance_scale` is less than `1`). For
                Latte, this should be "".
            do_classifier_free_guidance (`bool`, *optional*, defaults to `True`):
                whether to use classifier free guidance or not
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                number of video that should be generated per prompt
            device: (`torch.device`, *optional*):
                torch device to place the resulting embeddings on
            prompt_embeds (`torch.FloatTensor`, *optional*):
                Pre-generated text embeddings. Can be used to easily tweak text inputs, *e.g.* prompt weighting. If not
                provided, text embeddings will be generated from `prompt` input argument.
            negative_prompt_embeds (`torch.FloatTensor`, *optional*):
                Pre-generated negative text embeddings. For Latte, it's should be the embeddings of the "" string.
            clean_caption (bool, defaults to `False`):
                If `True`, the function will preprocess and clean the provided caption before encoding.
            mask_feature: (bool, defaults to `True`):
                If `True`, the function will mask the text embeddings.
        """
        embeds_initially_provided = prompt_embeds is not None and negative_prompt_embeds is not None

        if device is None:
            device = self.device

        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        max_length = 120
        if prompt_embeds is None:
            prompt = self._text_preprocessing(prompt, clean_caption=clean_caption)
            text_inputs = self.tokenizer(
                prompt,
                padding="max_length",
                max_length=max_length,
                truncation=True,
                return_attention_mask=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            text_input_ids = text_inputs.input_ids
            untruncated_ids = self.tokenizer(prompt, padding="longest", return_tensors="pt").input_ids

            if untruncated_ids.shape[-1] >= text_input_ids.shape[-1] and not torch.equal(
                text_input_ids, untruncated_ids
            ):
                removed_text = self.tokenizer.batch_decode(untruncated_ids[:, max_length - 1 : -1])
                logger.warning(
                    "The following part of your input was truncated because CLIP can only handle sequences up to"
                    f" {max_length} tokens: {removed_text}"
                )

            attention_mask = text_inputs.attention_mask.to(device)
            prompt_embeds_attention_mask = attention_mask

            prompt_embeds = self.text_encoder(text_input_ids.to(device), attention_mask=attention_mask)
            prompt_embeds = prompt_embeds[0]
        else:
            prompt_embeds_attention_mask = torch.ones_like(prompt_embeds)

        if self.text_encoder is not None:
            dtype = self.text_encoder.dtype
        else:
            dtype = self.dtype

        prompt_embeds = prompt_embeds.to(dtype=dtype, device=device)

        bs_embed, seq_len, _ = prompt_embeds.shape
        # duplicate text embeddings and attention mask for each generation per prompt, using mps friendly method
        prompt_embeds = prompt_embeds.repeat(1, num_images_per_prompt, 1)
        prompt_embeds = prompt_embeds.view(bs_embed * num_images_per_prompt, seq_len, -1)
        prompt_embeds_attention_mask = prompt_embeds_attention_mask.view(bs_embed, -1)
        prompt_embeds_attention_mask = prompt_embeds_attention_mask.repeat(num_images_per_prompt, 1)

        # get unconditional embeddings for classifier free guidance
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            uncond_tokens = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
            uncond_tokens = self._text_preprocessing(uncond_tokens, clean_caption=clean_caption)
            max_length = prompt_embeds.shape[1]
            uncond_input = self.tokenizer(
                uncond_tokens,
                padding="max_length",
                max_length=max_length,
                truncation=True,
                return_attention_mask=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            attention_mask = uncond_input.attention_mask.to(device)

            negative_prompt_embeds = self.text_encoder(
                uncond_input.input_ids.to(device),
                attention_mask=attention_mask,
            )
            negative_prompt_embeds = negative_prompt_embeds[0]

        if do_classifier_free_guidance:
            # duplicate unconditional embeddings for each generation per prompt, using mps friendly method
            seq_len = negative_prompt_embeds.shape[1]

            negative_prompt_embeds = negative_prompt_embeds.to(dtype=dtype, device=device)

            negative_prompt_embeds = negative_prompt_embeds.repeat(1, num_images_per_prompt, 1)
            negative_prompt_embeds = negative_prompt_embeds.view(batch_size * num_images_per_prompt, seq_len, -1)

            # For classifier free guidance, we need to do two forward passes.
            # Here we concatenate the unconditional and text embeddings into a single batch
            # to avoid doing two forward passes
        else:
            negative_prompt_embeds = None

        # Perform additional masking.
        if mask_feature and not embeds_initially_provided:
            prompt_embeds = prompt_embeds.unsqueeze(1)
            masked_prompt_embeds, keep_indices = self.mask_text_embeddings(prompt_embeds, prompt_embeds_attention_mask)
            masked_prompt_embeds = masked_prompt_embeds.squeeze(1)
            masked_negative_prompt_embeds = (
                negative_prompt_embeds[:, :keep_indices, :] if negative_prompt_embeds is not None else None
            )

            return masked_prompt_embeds, masked_negative_prompt_embeds

        return prompt_embeds, negative_prompt_embeds

    # Copied from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.StableDiffusionPipeline.prepare_extra_step_kwargs
    def prepare_extra_step_kwargs(self, generator, eta):
        # prepare extra kwargs for the scheduler step, since not all schedulers have the same signature
        # eta (η) is only used with the DDIMScheduler, it will be ignored for other schedulers.
        # eta corresponds to η in DDIM paper: https://huggingface.co/papers/2010.02502
        # and should be between [0, 1]

        accepts_eta = "eta" in set(inspect.signature(self.scheduler.step).parameters.keys())
        extra_step_kwargs = {}
        if accepts_eta:
            extra_step_kwargs["eta"] = eta

        # check if the scheduler accepts generator
        accepts_generator = "generator" in set(inspect.signature(self.scheduler.step).parameters.keys())
        if accepts_generator:
            extra_step_kwargs["generator"] = generator
        return extra_step_kwargs

    def check_inputs(
        self,
        prompt,
        height,
        width,
        negative_prompt,
        prompt_embeds=None,
        negative_prompt_embeds=None,
    ):
        if height % 8 != 0 or width % 8 != 0:
            raise ValueError(f"`height` and `width` have to be divisible by 8 but are {height} and {width}.")
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

        if prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `prompt`: {prompt} and `negative_prompt_embeds`:"
                f" {negative_prompt_embeds}. Please make sure to only forward one of the two."
            )

        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                f"Cannot forward both `negative_prompt`: {negative_prompt} and `negative_prompt_embeds`:"
                f" {negative_prompt_embeds}. Please make sure to only forward one of the two."
            )

        if prompt_embeds is not None and negative_prompt_embeds is not None:
            if prompt_embeds.shape != negative_prompt_embeds.shape:
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` must have the same shape when passed directly, but"
                    f" got: `prompt_embeds` {prompt_embeds.shape} != `negative_prompt_embeds`"
                    f" {negative_prompt_embeds.shape}."
                )

    # Copied from diffusers.pipelines.deepfloyd_if.pipeline_if.IFPipeline._text_preprocessing
    def _text_preprocessing(self, text, clean_caption=False):
        if clean_caption and not is_bs4_available():
            logger.warning(BACKENDS_MAPPING["bs4"][-1].format("Setting `clean_caption=True`"))
            logger.warning("Setting `clean_caption` to False...")
            clean_caption = False

        if clean_caption and not is_ftfy_available():
            logger.warning(BACKENDS_MAPPING["ftfy"][-1].format("Setting `clean_caption=True`"))
            logger.warning("Setting `clean_caption` to False...")
            clean_caption = False

        if not isinstance(text, (tuple, list)):
            text = [text]

        def process(text: str):
            if clean_caption:
                text = self._clean_caption(text)
                text = self._clean_caption(text)
            else:
                text = text.lower().strip()
            return text

        return [process(t) for t in text]

    # Copied from diffusers.pipelines.deepfloyd_if.pipeline_if.IFPipeline._clean_caption
    def _clean_caption(self, caption):
        caption = str(caption)
        caption = urllib.parse.unquote_plus(caption)
        caption = caption.strip().lower()
        caption = re.sub("<person>", "person", caption)
        # urls:
        caption = re.sub(
            r"\b((?:https?:(?:\/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))",  # noqa
            "",
            caption,
        )  # regex for urls
        caption = re.sub(
            r"\b((?:www:(?:\/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)))",  # noqa
            "",
            caption,
        )  # regex for urls
        from bs4 import BeautifulSoup

        # html:
        caption = BeautifulSoup(caption, features="html.parser").text

        # @<nickname>
        caption = re.sub(r"@[\w\d]+\b", "", caption)

        # 31C0—31EF CJK Strokes
        # 31F0—31FF Katakana Phonetic Extensions
        # 3200—32FF Enclosed CJK Letters and Months
        # 3300—33FF CJK Compatibility
        # 3400—4DBF CJK Unified Ideographs Extension A
        # 4DC0—4DFF Yijing Hexagram Symbols
        # 4E00—9FFF CJK Unified Ideographs
        caption = re.sub(r"[\u31c0-\u31ef]+", "", caption)
        caption = re.sub(r"[\u31f0-\u31ff]+", "", caption)
        caption = re.sub(r"[\u3200-\u32ff]+", "", caption)
        caption = re.sub(r"[\u3300-\u33ff]+", "", caption)
        caption = re.sub(r"[\u3400-\u4dbf]+", "", caption)
        caption = re.sub(r"[\u4dc0-\u4dff]+", "", caption)
        caption = re.sub(r"[\u4e00-\u9fff]+", "", caption)
        #######################################################

        # все виды тире / all types of dash --> "-"
        caption = re.sub(
            r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+",  # noqa
            "-",
            caption,
        )

        # кавычки к одному стандарту
        caption = re.sub(r"[`´«»“”¨]", '"', caption)
        caption = re.sub(r"[‘’]", "'", caption)

        # &quot;
        caption = re.sub(r"&quot;?", "", caption)
        # &amp
        caption = re.sub(r"&amp", "", caption)

        # ip addresses:
        caption = re.sub(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ", caption)

        # article ids:
        caption = re.sub(r"\d:\d\d\s+$", "", caption)

        # \n
        caption = re.sub(r"\\n", " ", caption)

        # "#123"
        caption = re.sub(r"#\d{1,3}\b", "", caption)
        # "#12345.."
        caption = re.sub(r"#\d{5,}\b", "", caption)
        # "123456.."
        caption = re.sub(r"\b\d{6,}\b", "", caption)
        # filenames:
        caption = re.sub(r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", "", caption)

        #
        caption = re.sub(r"[\"\']{2,}", r'"', caption)  # """AUSVERKAUFT"""
        caption = re.sub(r"[\.]{2,}", r" ", caption)  # """AUSVERKAUFT"""

        caption = re.sub(self.bad_punct_regex, r" ", caption)  # ***AUSVERKAUFT***, #AUSVERKAUFT
        caption = re.sub(r"\s+\.\s+", r" ", caption)  # " . "

        # this-is-my-cute-cat / this_is_my_cute_cat
        regex2 = re.compile(r"(?:\-|\_)")
        if len(re.findall(regex2, caption)) > 3:
            caption = re.sub(regex2, " ", caption)
        from ftfy import fix_text

        caption = fix_text(caption)
        caption = html.unescape(html.unescape(caption))

        caption = re.sub(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "", caption)  # jc6640
        caption = re.sub(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "", caption)  # jc6640vc
        caption = re.sub(r"\b\d+[a-zA-Z]+\d+\b", "", caption)  # 6640vc231

        caption = re.sub(r"(worldwide\s+)?(free\s+)?shipping", "", caption)
        caption = re.sub(r"(free\s)?download(\sfree)?", "", caption)
        caption = re.sub(r"\bclick\b\s(?:for|on)\s\w+", "", caption)
        caption = re.sub(r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", "", caption)
        caption = re.sub(r"\bpage\s+\d+\b", "", caption)

        caption = re.sub(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", r" ", caption)  # j2d1a2a...

        caption = re.sub(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", "", caption)

        caption = re.sub(r"\b\s+\:\s+", r": ", caption)
        caption = re.sub(r"(\D[,\./])\b", r"\1 ", caption)
        caption = re.sub(r"\s+", " ", caption)

        caption.strip()

        caption = re.sub(r"^[\"\']([\w\W]+)[\"\']$", r"\1", caption)
        caption = re.sub(r"^[\'\_,\-\:;]", r"", caption)
        caption = re.sub(r"[\'\_,\-\:\-\+]$", r"", caption)
        caption = re.sub(r"^\.\S+$", "", caption)

        return caption.strip()

    # Copied from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_synth.TextToVideoSDPipeline.prepare_latents
    def prepare_latents(
        self, batch_size, num_channels_latents, num_frames, height, width, dtype, device, generator, latents=None
    ):
        shape = (
            batch_size,
            num_channels_latents,
            num_frames,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )

        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device)

        # scale the initial noise by the standard deviation required by the scheduler
        latents = latents * self.scheduler.init_noise_sigma
        return latents

    # Similar to diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion.decode_latents
    def decode_latents(self, latents: torch.Tensor, video_length: int, decode_chunk_size: int = 14):
        # [batch, channels, frames, height, width] -> [batch*frames, channels, height, width]
        latents = latents.permute(0, 2, 1, 3, 4).flatten(0, 1)

        latents = 1 / self.vae.config.scaling_factor * latents

        forward_vae_fn = self.vae._orig_mod.forward if is_compiled_module(self.vae) else self.vae.forward
        accepts_num_frames = "num_frames" in set(inspect.signature(forward_vae_fn).parameters.keys())

        # decode decode_chunk_size frames at a time to avoid OOM
        frames = []
        for i in range(0, latents.shape[0], decode_chunk_size):
            num_frames_in = latents[i : i + decode_chunk_size].shape[0]
            decode_kwargs = {}
            if accepts_num_frames:
                # we only pass num_frames_in if it's expected
                decode_kwargs["num_frames"] = num_frames_in

            frame = self.vae.decode(latents[i : i + decode_chunk_size], **decode_kwargs).sample
            frames.append(frame)
        frames = torch.cat(frames, dim=0)

        # [batch*frames, channels, height, width] -> [batch, channels, frames, height, width]
        frames = frames.reshape(-1, video_length, *frames.shape[1:]).permute(0, 2, 1, 3, 4)

        # we always cast to float32 as this does not cause significant overhead and is compatible with bfloa16
        frames = frames.float()
        return frames

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
            "num_inference_steps": sampling.num_inference_steps,
            "timesteps": sampling.timesteps,
            "height": sampling.height,
            "width": sampling.width,
            "eta": sampling.eta,
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
        ):
            if name in fields:
                arguments[name] = fields[name]
        for name in (
            "video_length",
            "mask_feature",
        ):
            if name in media:
                arguments[name] = media[name]
        for name in (
            "clean_caption",
            "enable_temporal_attentions",
            "decode_chunk_size",
        ):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        return arguments

    def prepare_generation(
        self,
        prompt: str | list[str] = None,
        negative_prompt: str = "",
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        video_length: int = 16,
        height: int = 512,
        width: int = 512,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        negative_prompt_embeds: torch.FloatTensor | None = None,
        output_type: str = "pil",
        clean_caption: bool = True,
        mask_feature: bool = True,
        enable_temporal_attentions: bool = True,
        decode_chunk_size: int = 14,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""

        # 0. Default
        decode_chunk_size = decode_chunk_size if decode_chunk_size is not None else video_length

        # 1. Check inputs. Raise error if not correct
        height = height or self.transformer.config.sample_size * self.vae_scale_factor
        width = width or self.transformer.config.sample_size * self.vae_scale_factor
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
        )

        # 2. Default height and width to transformer
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        device = self.device

        # here `guidance_scale` is defined analog to the guidance weight `w` of equation (2)
        # of the Imagen paper: https://huggingface.co/papers/2205.11487 . `guidance_scale = 1`
        # corresponds to doing no classifier free guidance.
        do_classifier_free_guidance = guidance_scale > 1.0

        # 3. Encode input prompt
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clean_caption=clean_caption,
            mask_feature=mask_feature,
        )
        if do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)

        # 4. Prepare timesteps
        timestep_device = device
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, timestep_device, timesteps
        )

        # 5. Prepare latents.
        latent_channels = self.transformer.config.in_channels
        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            latent_channels,
            video_length,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        # 6. Prepare extra step kwargs. TODO: Logic should ideally just be moved out of the pipeline
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        return (
            {
                "latents": latents,
                "timesteps": timesteps,
                "prompt_embeds": prompt_embeds,
                "enable_temporal_attentions": enable_temporal_attentions,
                "do_classifier_free_guidance": do_classifier_free_guidance,
                "guidance_scale": guidance_scale,
                "extra_step_kwargs": extra_step_kwargs,
            },
            {
                "output_type": output_type,
                "video_length": video_length,
                "decode_chunk_size": decode_chunk_size,
            },
        )

    def predict_guided_noise(
        self,
        latents,
        scheduler,
        t,
        prompt_embeds,
        enable_temporal_attentions,
        do_classifier_free_guidance,
        guidance_scale,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""
        latent_model_input = latents
        latent_model_input = scheduler.scale_model_input(latent_model_input, t)

        current_timestep = t
        if not torch.is_tensor(current_timestep):
            # TODO: this requires sync between CPU and GPU. So try to pass timesteps as tensors if you can
            # This would be a good case for the `match` statement (Python 3.10+)
            is_mps = latent_model_input.device.type == "mps"
            is_npu = latent_model_input.device.type == "npu"
            if isinstance(current_timestep, float):
                dtype = torch.float32 if (is_mps or is_npu) else torch.float64
            else:
                dtype = torch.int32 if (is_mps or is_npu) else torch.int64
            current_timestep = torch.tensor([current_timestep], dtype=dtype, device=latent_model_input.device)
        elif len(current_timestep.shape) == 0:
            current_timestep = current_timestep[None].to(latent_model_input.device)
        # broadcast to batch dimension in a way that's compatible with ONNX/Core ML
        current_timestep = current_timestep.expand(latent_model_input.shape[0])
        positive_kwargs = {
            "hidden_states": latent_model_input,
            "encoder_hidden_states": prompt_embeds,
            "timestep": current_timestep,
            "enable_temporal_attentions": enable_temporal_attentions,
        }
        negative_kwargs = None
        if do_classifier_free_guidance:
            negative_prompt_embeds, prompt_embeds = prompt_embeds.chunk(2)
            negative_kwargs = positive_kwargs | {
                "encoder_hidden_states": negative_prompt_embeds,
            }
            positive_kwargs = positive_kwargs | {
                "encoder_hidden_states": prompt_embeds,
            }
        return self.predict_noise_maybe_with_cfg(
            do_classifier_free_guidance, guidance_scale, positive_kwargs, negative_kwargs, cfg_normalize=False
        )

    def step_latents(self, scheduler, noise_pred, t, latents, extra_step_kwargs):

        # use learned sigma?
        if not (
            hasattr(scheduler.config, "variance_type")
            and scheduler.config.variance_type in ["learned", "learned_range"]
        ):
            noise_pred = noise_pred.chunk(2, dim=1)[0]

        # compute previous video: x_t -> x_t-1
        latents = scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
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
        prompt_embeds,
        enable_temporal_attentions,
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
                    scheduler=self.scheduler,
                    t=t,
                    prompt_embeds=prompt_embeds,
                    enable_temporal_attentions=enable_temporal_attentions,
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
        video_length,
        decode_chunk_size,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        if output_type == "latents":
            output_type = "latent"

        if not output_type == "latent":
            video = self.decode_latents(latents, video_length, decode_chunk_size=decode_chunk_size)
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
                    scheduler=state.scheduler,
                    t=state.current_timestep,
                    prompt_embeds=inputs["prompt_embeds"],
                    enable_temporal_attentions=inputs["enable_temporal_attentions"],
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
