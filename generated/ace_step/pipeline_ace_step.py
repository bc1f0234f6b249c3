# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM-Omni project and The HuggingFace Team
# Ported by porter from diffusers.AceStepPipeline (pipelines/ace_step/pipeline_ace_step.py, diffusers 0.40.0), rule set 91e97b116ae2.
# Generated: edit the rules, not this file.

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, List, Optional, Tuple, Union

import numpy as np
import torch
from cache_dit import refresh_context
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_omni.diffusion.compile import regionally_compile
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
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

from .ace_step_transformer import AceStepTransformer1DModel

logger = init_logger(__name__)  # pylint: disable=invalid-name


def _normalize_audio_codes(audio_codes: Union[str, List[str]], batch_size: int) -> List[str]:
    if isinstance(audio_codes, str):
        return [audio_codes] * batch_size
    if not all(isinstance(code, str) for code in audio_codes):
        raise TypeError("`audio_codes` must be a string or a list of strings.")
    audio_codes = list(audio_codes[:batch_size])
    while len(audio_codes) < batch_size:
        audio_codes.append(audio_codes[-1] if audio_codes else "")
    return audio_codes


def _parse_audio_code_string(code_str: str, max_audio_code: int) -> List[int]:
    if not code_str:
        return []

    codes = []
    for value in re.findall(r"<\|audio_code_(\d+)\|>", code_str):
        code_value = int(value)
        codes.append(max(0, min(code_value, max_audio_code)))
    return codes


# Task-specific instruction templates (from ACE-Step constants)
TASK_INSTRUCTIONS = {
    "text2music": "Fill the audio semantic mask based on the given conditions:",
    "repaint": "Repaint the mask area based on the given conditions:",
    "cover": "Generate audio semantic tokens based on the given conditions:",
    "extract": "Extract the {TRACK_NAME} track from the audio:",
    "extract_default": "Extract the track from the audio:",
    "lego": "Generate the {TRACK_NAME} track based on the audio context:",
    "lego_default": "Generate the track based on the audio context:",
    "complete": "Complete the input track with {TRACK_CLASSES}:",
    "complete_default": "Complete the input track:",
}


# Valid task types
TASK_TYPES = ["text2music", "repaint", "cover", "extract", "lego", "complete"]


DEFAULT_DIT_INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"


# SFT prompt template from ACE-Step constants. The newline between each section label
# (`# Instruction`, `# Caption`, `# Metas`) and its content is load-bearing — the text
# encoder was trained with this exact format.
SFT_GEN_PROMPT = "# Instruction\n{}\n\n# Caption\n{}\n\n# Metas\n{}<|endoftext|>\n"


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
    if library in ("ace_step",):
        library = f"diffusers.pipelines.{library}"
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


def begin_anew(denoiser: nn.Module | None) -> None:
    """Make Cache-DiT, where it is on, forget the loop of steps before: another window, or another request of the batch."""
    if hasattr(denoiser, "_context_manager"):
        refresh_context(denoiser)


def refuse_cache_dit(denoiser: nn.Module) -> None:
    """Cache-DiT takes every further call of the denoiser in a step for another step."""
    if hasattr(denoiser, "_context_manager"):
        raise NotImplementedError("Cache-DiT is on, and a step calls the denoiser once more than it can know of.")


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


def get_ace_step_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Post-processing of `AceStepPipeline`; it runs in the engine process, where no model is loaded."""
    sample_rate = read_json(od_config, "vae/config.json")["sampling_rate"]

    def post_process_func(audio: torch.Tensor, sampling_params: OmniDiffusionSamplingParams | None = None) -> Any:
        output_type = sampling_params.output_type if sampling_params is not None else None
        if output_type is None:
            output_type = "pt"
        if output_type == "latent":
            return audio
        if output_type == "np":
            audio = audio.cpu().float().numpy()
        return {
            "payload": {
                "audio": audio,
            },
            "metadata": {"audio": {"sample_rate": sample_rate}},
        }

    return post_process_func


class AceStepPipeline(
    nn.Module, CFGParallelMixin, ProgressBarMixin, DiffusionPipelineProfilerMixin, SupportsComponentDiscovery
):
    """Pipeline for text-to-music generation using ACE-Step 1.5."""

    supports_request_batch: ClassVar[bool] = True
    supports_step_execution: ClassVar[bool] = True
    support_audio_output: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 8
    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _PROFILER_TARGETS: ClassVar[list[str]] = ["text_encoder.forward", "diffuse", "vae.decode"]
    _refused_arguments: ClassVar[dict[str, str]] = {
        "return_dict": "the engine always returns its own output object",
        "callback": "the engine reports progress itself and calls nothing back",
        "callback_steps": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end": "the engine reports progress itself and calls nothing back",
        "callback_on_step_end_tensor_inputs": "the engine reports progress itself and calls nothing back",
        "attention_kwargs": "attention processors take no per-call arguments here; LoRA scale is the engine's lora_scale",
    }
    _text_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    _tensor_arguments: ClassVar[tuple[str, ...]] = ("latents",)
    _request_arguments: ClassVar[tuple[str, ...]] = (
        "prompt",
        "generator",
        "latents",
        "src_audio",
        "reference_audio",
        "audio_codes",
    )
    # What a request brings to `diffuse`: rows (some with both guidance branches), their number, or a value on which
    # requests of one loop agree.
    _rows: ClassVar[tuple[str, ...]] = (
        "xt",
        "encoder_hidden_states",
        "null_encoder_hidden_states",
        "context_latents",
        "non_cover_encoder_hidden_states",
    )
    _row_counts: ClassVar[tuple[str, ...]] = ("batch_size",)
    _agreed: ClassVar[tuple[str, ...]] = (
        "timesteps",
        "task_type",
    )

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config
        self.device = get_local_device()
        self.dtype = od_config.dtype
        model_index = read_json(od_config, "model_index.json")

        # Offloaded components wait on the CPU until the engine moves them.
        device = torch.device("cpu") if od_config.enable_cpu_offload else self.device
        self.vae = load_component(od_config, model_index, "vae", torch_dtype=od_config.dtype).to(device)
        self.text_encoder = load_component(od_config, model_index, "text_encoder", dtype=od_config.dtype).to(device)
        self.tokenizer = load_component(od_config, model_index, "tokenizer")
        self.condition_encoder = load_component(
            od_config, model_index, "condition_encoder", torch_dtype=od_config.dtype
        ).to(device)
        self.scheduler = load_component(od_config, model_index, "scheduler")
        self.audio_tokenizer = None
        if model_index.get("audio_tokenizer", [None])[0] is not None:
            self.audio_tokenizer = load_component(od_config, model_index, "audio_tokenizer")
        self.audio_token_detokenizer = None
        if model_index.get("audio_token_detokenizer", [None])[0] is not None:
            self.audio_token_detokenizer = load_component(
                od_config, model_index, "audio_token_detokenizer", torch_dtype=od_config.dtype
            ).to(device)
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
        self.transformer = AceStepTransformer1DModel(
            od_config=od_config,
            quant_config=od_config.quantization_config,
            prefix=maybe_prefix(prefix, "transformer"),
            **get_transformer_config_kwargs(od_config.tf_model_config, AceStepTransformer1DModel),
        )

        # Cache config-derived values (Flux2-style). `sample_rate` / `latents_per_second`
        # fall back to the ACE-Step 1.5 defaults if the VAE happens to be offloaded.
        transformer_config = self.transformer.config
        self.is_turbo = bool(
            transformer_config
            and (
                getattr(transformer_config, "is_turbo", False)
                or getattr(transformer_config, "model_version", None) == "turbo"
            )
        )
        vae_config = self.vae.config
        self.sample_rate = int(getattr(vae_config, "sampling_rate", 48000)) if vae_config else 48000
        downsample = math.prod(getattr(vae_config, "downsampling_ratios", (1920,))) if vae_config else 1920
        self.latents_per_second = float(self.sample_rate) / float(downsample)
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def setup_compile(self) -> None:
        for name in self._dit_modules:
            compile_denoiser(getattr(self, name), self.od_config)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True iff APG guidance should run in the denoising loop."""
        gs = getattr(self, "_guidance_scale", 1.0)
        return gs is not None and gs > 1.0 and not self.is_turbo

    def check_inputs(
        self,
        prompt: Union[str, List[str]],
        lyrics: Union[str, List[str]],
        task_type: str,
        num_inference_steps: int,
        guidance_scale: float,
        shift: float,
        audio_cover_strength: float,
        cfg_interval_start: float,
        cfg_interval_end: float,
        repainting_start: Optional[float],
        repainting_end: Optional[float],
    ) -> None:
        """Validate user-facing arguments before we start allocating noise tensors."""
        if prompt is None:
            raise ValueError("`prompt` must be provided (a string or a list of strings).")
        if not isinstance(prompt, (str, list)):
            raise TypeError(f"`prompt` must be str or list[str], got {type(prompt).__name__}")
        if lyrics is not None and not isinstance(lyrics, (str, list)):
            raise TypeError(f"`lyrics` must be str or list[str], got {type(lyrics).__name__}")
        if task_type not in TASK_TYPES:
            raise ValueError(f"`task_type` must be one of {TASK_TYPES}, got {task_type!r}.")
        if num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {num_inference_steps!r}.")
        if guidance_scale is not None and guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be >= 0, got {guidance_scale!r}.")
        if shift is not None and shift <= 0:
            raise ValueError(f"`shift` must be > 0, got {shift!r}.")
        if not 0.0 <= audio_cover_strength <= 1.0:
            raise ValueError(f"`audio_cover_strength` must be in [0, 1], got {audio_cover_strength!r}.")
        if not 0.0 <= cfg_interval_start <= 1.0 or not 0.0 <= cfg_interval_end <= 1.0:
            raise ValueError("`cfg_interval_start` / `cfg_interval_end` must be in [0, 1].")
        if cfg_interval_start > cfg_interval_end:
            raise ValueError("`cfg_interval_start` must be <= `cfg_interval_end`.")
        if task_type == "repaint":
            if (
                repainting_start is not None
                and repainting_end is not None
                and repainting_end > 0
                and repainting_start >= repainting_end
            ):
                raise ValueError(
                    f"For repaint, need `repainting_start` < `repainting_end` (got {repainting_start} / {repainting_end})."
                )

    @staticmethod
    def _get_task_instruction(
        task_type: str = "text2music",
        track_name: Optional[str] = None,
        complete_track_classes: Optional[List[str]] = None,
    ) -> str:
        """
        Get the instruction text for a specific task type.

        Args:
            task_type (`str`, *optional*, defaults to `"text2music"`):
                The task type. One of `"text2music"`, `"cover"`, `"repaint"`, `"extract"`, `"lego"`, `"complete"`.
            track_name (`str`, *optional*):
                Track name for extract/lego tasks (e.g., `"vocals"`, `"drums"`).
            complete_track_classes (`List[str]`, *optional*):
                Track classes for complete task.

        Returns:
            `str`: The instruction text for the task.
        """
        if task_type == "extract":
            if track_name:
                return TASK_INSTRUCTIONS["extract"].format(TRACK_NAME=track_name.upper())
            return TASK_INSTRUCTIONS["extract_default"]
        elif task_type == "lego":
            if track_name:
                return TASK_INSTRUCTIONS["lego"].format(TRACK_NAME=track_name.upper())
            return TASK_INSTRUCTIONS["lego_default"]
        elif task_type == "complete":
            if complete_track_classes and len(complete_track_classes) > 0:
                classes_str = " | ".join(t.upper() for t in complete_track_classes)
                return TASK_INSTRUCTIONS["complete"].format(TRACK_CLASSES=classes_str)
            return TASK_INSTRUCTIONS["complete_default"]
        elif task_type in TASK_INSTRUCTIONS:
            return TASK_INSTRUCTIONS[task_type]
        return TASK_INSTRUCTIONS["text2music"]

    @staticmethod
    def _build_metadata_string(
        bpm: Optional[int] = None,
        keyscale: Optional[str] = None,
        timesignature: Optional[str] = None,
        audio_duration: Optional[float] = None,
    ) -> str:
        """
        Build the metadata string for the SFT prompt template.

        Matches the original ACE-Step handler `_dict_to_meta_string` format.

        Args:
            bpm (`int`, *optional*): BPM value. Uses `"N/A"` if `None`.
            keyscale (`str`, *optional*): Musical key (e.g., `"C major"`). Uses `"N/A"` if empty.
            timesignature (`str`, *optional*): Time signature (e.g., `"4"`). Uses `"N/A"` if empty.
            audio_duration (`float`, *optional*): Duration in seconds.

        Returns:
            `str`: Formatted metadata string.
        """
        bpm_str = str(bpm) if bpm is not None and bpm > 0 else "N/A"
        ts_str = timesignature if timesignature and timesignature.strip() else "N/A"
        ks_str = keyscale if keyscale and keyscale.strip() else "N/A"

        if audio_duration is not None and audio_duration > 0:
            dur_str = f"{int(audio_duration)} seconds"
        else:
            dur_str = "30 seconds"

        return f"- bpm: {bpm_str}\n- timesignature: {ts_str}\n- keyscale: {ks_str}\n- duration: {dur_str}\n"

    def _format_prompt(
        self,
        prompt: str,
        lyrics: str = "",
        vocal_language: str = "en",
        audio_duration: float = 60.0,
        instruction: Optional[str] = None,
        bpm: Optional[int] = None,
        keyscale: Optional[str] = None,
        timesignature: Optional[str] = None,
    ) -> Tuple[str, str]:
        """
        Format the prompt and lyrics into the expected text encoder input format.

        The text prompt uses the SFT generation template with instruction, caption, and metadata. The lyrics use a
        separate format with language header and lyric content, matching the original ACE-Step handler.

        Args:
            prompt (`str`): Text caption describing the music.
            lyrics (`str`, *optional*, defaults to `""`): Lyric text.
            vocal_language (`str`, *optional*, defaults to `"en"`): Language code for lyrics.
            audio_duration (`float`, *optional*, defaults to 60.0): Duration of the audio in seconds.
            instruction (`str`, *optional*): Instruction text for generation.
            bpm (`int`, *optional*): BPM (beats per minute).
            keyscale (`str`, *optional*): Musical key (e.g., `"C major"`).
            timesignature (`str`, *optional*): Time signature (e.g., `"4"`).

        Returns:
            Tuple of `(formatted_text, formatted_lyrics)`.
        """
        if instruction is None:
            instruction = DEFAULT_DIT_INSTRUCTION

        # Ensure instruction ends with colon (matching handler.py _format_instruction)
        if not instruction.endswith(":"):
            instruction = instruction + ":"

        # Build metadata string
        metas_str = self._build_metadata_string(
            bpm=bpm,
            keyscale=keyscale,
            timesignature=timesignature,
            audio_duration=audio_duration,
        )

        # Format text prompt using SFT template
        formatted_text = SFT_GEN_PROMPT.format(instruction, prompt, metas_str)

        # Format lyrics using the dedicated lyrics format (NOT the SFT template)
        # Matches handler.py _format_lyrics
        formatted_lyrics = f"# Languages\n{vocal_language}\n\n# Lyric\n{lyrics}<|endoftext|>"

        return formatted_text, formatted_lyrics

    def encode_prompt(
        self,
        prompt: Union[str, List[str]],
        lyrics: Union[str, List[str]],
        device: torch.device,
        vocal_language: Union[str, List[str]] = "en",
        audio_duration: float = 60.0,
        instruction: Optional[str] = None,
        bpm: Optional[int] = None,
        keyscale: Optional[str] = None,
        timesignature: Optional[str] = None,
        max_text_length: int = 256,
        max_lyric_length: int = 2048,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Encode text prompts and lyrics into embeddings.

        Text prompts are encoded through the full text encoder model to produce contextual hidden states. Lyrics are
        only passed through the text encoder's embedding layer (token lookup), since the lyric encoder in the condition
        encoder handles the contextual encoding.

        Args:
            prompt (`str` or `List[str]`):
                Text caption(s) describing the music.
            lyrics (`str` or `List[str]`):
                Lyric text(s).
            device (`torch.device`):
                Device for tensors.
            vocal_language (`str` or `List[str]`, *optional*, defaults to `"en"`):
                Language code(s) for lyrics.
            audio_duration (`float`, *optional*, defaults to 60.0):
                Duration of the audio in seconds.
            instruction (`str`, *optional*):
                Instruction text for generation.
            bpm (`int`, *optional*):
                BPM (beats per minute) for metadata.
            keyscale (`str`, *optional*):
                Musical key (e.g., `"C major"`).
            timesignature (`str`, *optional*):
                Time signature (e.g., `"4"` for 4/4).
            max_text_length (`int`, *optional*, defaults to 256):
                Maximum token length for text prompts.
            max_lyric_length (`int`, *optional*, defaults to 2048):
                Maximum token length for lyrics.

        Returns:
            Tuple of `(text_hidden_states, text_attention_mask, lyric_hidden_states, lyric_attention_mask)`.
        """
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(lyrics, str):
            lyrics = [lyrics]
        if isinstance(vocal_language, str):
            vocal_language = [vocal_language] * len(prompt)

        batch_size = len(prompt)

        all_text_strs = []
        all_lyric_strs = []
        for i in range(batch_size):
            text_str, lyric_str = self._format_prompt(
                prompt=prompt[i],
                lyrics=lyrics[i],
                vocal_language=vocal_language[i],
                audio_duration=audio_duration,
                instruction=instruction,
                bpm=bpm,
                keyscale=keyscale,
                timesignature=timesignature,
            )
            all_text_strs.append(text_str)
            all_lyric_strs.append(lyric_str)

        # Tokenize text prompts (matching handler.py: padding="longest", max_length=256)
        text_inputs = self.tokenizer(
            all_text_strs,
            padding="longest",
            truncation=True,
            max_length=max_text_length,
            return_tensors="pt",
        )
        text_input_ids = text_inputs.input_ids.to(device)
        text_attention_mask = text_inputs.attention_mask.to(device).bool()

        # Tokenize lyrics (matching handler.py: padding="longest", max_length=2048)
        lyric_inputs = self.tokenizer(
            all_lyric_strs,
            padding="longest",
            truncation=True,
            max_length=max_lyric_length,
            return_tensors="pt",
        )
        lyric_input_ids = lyric_inputs.input_ids.to(device)
        lyric_attention_mask = lyric_inputs.attention_mask.to(device).bool()

        # Encode text through the full text encoder model.
        text_hidden_states = self.text_encoder(input_ids=text_input_ids).last_hidden_state

        # Encode lyrics using only the embedding layer (token lookup); contextual encoding
        # happens inside the condition encoder.
        embed_layer = self.text_encoder.get_input_embeddings()
        lyric_hidden_states = embed_layer(lyric_input_ids)

        return text_hidden_states, text_attention_mask, lyric_hidden_states, lyric_attention_mask

    def prepare_latents(
        self,
        batch_size: int,
        audio_duration: float,
        dtype: torch.dtype,
        device: torch.device,
        generator: Optional[Union[torch.Generator, List[torch.Generator]]] = None,
        latents: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """
        Prepare initial noise latents for the flow matching process.

        Args:
            batch_size (`int`): Number of samples to generate.
            audio_duration (`float`): Duration of audio in seconds.
            dtype (`torch.dtype`): Data type for the latents.
            device (`torch.device`): Device for the latents.
            generator (`torch.Generator` or `List[torch.Generator]`, *optional*): Random number generator(s).
            latents (`torch.Tensor`, *optional*): Pre-generated latents.

        Returns:
            Noise latents of shape `(batch_size, latent_length, acoustic_dim)`.
        """
        latent_length = math.ceil(audio_duration * self.latents_per_second)
        acoustic_dim = self.transformer.config.audio_acoustic_hidden_dim

        if latents is not None:
            return latents.to(device=device, dtype=dtype)

        shape = (batch_size, latent_length, acoustic_dim)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents

    def _get_timestep_schedule(
        self,
        num_inference_steps: int = 8,
        shift: float = 3.0,
        device: torch.device = None,
        dtype: torch.dtype = None,
        timesteps: Optional[List[float]] = None,
    ) -> torch.Tensor:
        """
        Get the timestep schedule for the flow matching process.

        ACE-Step uses a fixed timestep schedule based on the shift parameter. The schedule goes from t=1 (pure noise)
        to t=0 (clean data).

        Args:
            num_inference_steps (`int`, *optional*, defaults to 8):
                Number of denoising steps.
            shift (`float`, *optional*, defaults to 3.0):
                Shift parameter controlling the timestep distribution (1.0, 2.0, or 3.0).
            device (`torch.device`, *optional*): Device for the schedule tensor.
            dtype (`torch.dtype`, *optional*): Data type for the schedule tensor.
            timesteps (`List[float]`, *optional*):
                Custom timestep schedule. If provided, overrides `num_inference_steps` and `shift`.

        Returns:
            `torch.Tensor`: Tensor of timestep values.
        """
        # Custom override: caller supplies the exact timestep sequence (matches original's
        # `timesteps=` arg).
        if timesteps is not None:
            return torch.tensor(timesteps, device=device, dtype=dtype)

        # Linear schedule in [1, 0] with N+1 points, drop the terminal t=0, then apply
        # the flow-matching shift transform. The turbo checkpoints ship with fixed 8-step
        # tables for `shift ∈ {1, 2, 3}` — those values are recovered exactly by this
        # formula, so no separate lookup table is needed.
        t = torch.linspace(1.0, 0.0, num_inference_steps + 1, device=device, dtype=dtype)
        if shift != 1.0:
            t = shift * t / (1 + (shift - 1) * t)
        return t[:-1]

    def prepare_reference_audio_latents(
        self,
        reference_audio: torch.Tensor,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Process reference audio into acoustic latents for the timbre encoder.

        The reference audio is repeated/cropped to 30 seconds (3 segments of 10 seconds each from front, middle, and
        back), encoded through the VAE, and then transposed for the timbre encoder.

        Args:
            reference_audio (`torch.Tensor`): Reference audio tensor of shape `[channels, samples]` at
                `self.sample_rate`.
            batch_size (`int`): Batch size.
            device (`torch.device`): Target device.
            dtype (`torch.dtype`): Target dtype.

        Returns:
            Tuple of `(refer_audio_acoustic, refer_audio_order_mask)`.
        """
        target_frames = 30 * self.sample_rate  # 30 seconds

        # Repeat if shorter than 30 seconds
        if reference_audio.shape[-1] < target_frames:
            repeat_times = math.ceil(target_frames / reference_audio.shape[-1])
            reference_audio = reference_audio.repeat(1, repeat_times)

        # Select 3 segments of 10 seconds each
        segment_frames = 10 * self.sample_rate
        total_frames = reference_audio.shape[-1]
        segment_size = total_frames // 3

        front_audio = reference_audio[:, :segment_frames]
        mid_start = segment_size
        middle_audio = reference_audio[:, mid_start : mid_start + segment_frames]
        back_start = max(total_frames - segment_frames, 0)
        back_audio = reference_audio[:, back_start : back_start + segment_frames]

        reference_audio = torch.cat([front_audio, middle_audio, back_audio], dim=-1)

        ref_audio_input = reference_audio.unsqueeze(0).to(device=device, dtype=self.vae.dtype)
        ref_latents = self.vae.encode(ref_audio_input).latent_dist.sample()
        # [1, D, T] -> [1, T, D]
        ref_latents = ref_latents.transpose(1, 2).to(dtype=dtype)

        # Repeat for batch
        refer_audio_acoustic = ref_latents.expand(batch_size, -1, -1)
        refer_audio_order_mask = torch.arange(batch_size, device=device, dtype=torch.long)
        return refer_audio_acoustic, refer_audio_order_mask

    def prepare_src_latents(
        self,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 1,
        src_audio: Optional[torch.Tensor] = None,
        audio_codes: Optional[Union[str, List[str]]] = None,
        latent_length: Optional[int] = None,
        task_type: str = "text2music",
    ) -> Tuple[torch.Tensor, int]:
        """
        Prepare source latents for text-to-music and audio-to-audio tasks.

        Args:
            src_audio (`torch.Tensor`, *optional*): Source audio tensor of shape `[channels, samples]` at
                `self.sample_rate`.
            audio_codes (`str` or `List[str]`, *optional*): Audio semantic code strings.
            latent_length (`int`, *optional*): Target latent length when no source audio or audio codes are given.
            device (`torch.device`): Target device.
            dtype (`torch.dtype`): Target dtype.
            batch_size (`int`): Batch size.
            task_type (`str`): Current task type.

        Returns:
            Tuple of `(src_latents, latent_length)` where `src_latents` has shape `[batch, T, D]`.
        """
        if audio_codes is not None:
            if self.audio_tokenizer is None or self.audio_token_detokenizer is None:
                raise ValueError(
                    "ACE-Step audio-code cover conditioning requires the registered `audio_tokenizer` and "
                    "`audio_token_detokenizer` modules. Re-run the converter with a checkpoint that includes "
                    "tokenizer/detokenizer weights."
                )

            max_audio_code = self.audio_tokenizer.quantizer.codebook_size - 1
            audio_codes = _normalize_audio_codes(audio_codes, batch_size)
            parsed_codes = [_parse_audio_code_string(code, max_audio_code) for code in audio_codes]
            max_length = max((len(code_ids) for code_ids in parsed_codes), default=0)
            if max_length == 0:
                raise ValueError("`audio_codes` did not contain any `<|audio_code_*|>` tokens.")

            indices = torch.zeros(
                batch_size,
                max_length,
                int(getattr(self.audio_tokenizer.config, "fsq_input_num_quantizers", 1)),
                device=device,
                dtype=torch.long,
            )
            for batch_idx, code_ids in enumerate(parsed_codes):
                if code_ids:
                    indices[batch_idx, : len(code_ids), 0] = torch.tensor(code_ids, device=device, dtype=torch.long)

            quantized = self.audio_tokenizer.quantizer.get_output_from_indices(indices).to(device=device, dtype=dtype)
            src_latents = self.audio_token_detokenizer(quantized).to(dtype=dtype)
            return src_latents, src_latents.shape[1]

        if src_audio is not None:
            src_audio = src_audio.unsqueeze(0) if src_audio.dim() == 2 else src_audio
            src_audio = src_audio.to(device=device, dtype=self.vae.dtype)
            src_latents = self.vae.encode(src_audio).latent_dist.sample().transpose(1, 2).to(dtype=dtype)
            if src_latents.shape[0] == 1:
                src_latents = src_latents.expand(batch_size, -1, -1)
            latent_length = src_latents.shape[1]

            if task_type == "cover":
                if self.audio_tokenizer is None or self.audio_token_detokenizer is None:
                    raise ValueError(
                        "ACE-Step source-audio cover conditioning requires the registered `audio_tokenizer` and "
                        "`audio_token_detokenizer` modules. Re-run the converter with a checkpoint that includes "
                        "tokenizer/detokenizer weights."
                    )
                silence_latent = self.condition_encoder.silence_latent.to(device=device, dtype=dtype)
                quantized, _ = self.audio_tokenizer.tokenize(src_latents.to(device=device, dtype=dtype), silence_latent)
                src_latents = self.audio_token_detokenizer(quantized.to(device=device, dtype=dtype))
                src_latents = src_latents[:, :latent_length, :].contiguous()

            return src_latents, latent_length

        if latent_length is None:
            raise ValueError("`latent_length` must be provided when preparing source latents without source audio.")

        silence_latent = self.condition_encoder.silence_latent.to(device=device, dtype=dtype)
        if silence_latent.shape[1] >= latent_length:
            src_latents = silence_latent[:, :latent_length, :]
        else:
            repeats = (latent_length + silence_latent.shape[1] - 1) // silence_latent.shape[1]
            src_latents = silence_latent.repeat(1, repeats, 1)[:, :latent_length, :]
        return src_latents.expand(batch_size, -1, -1).contiguous(), latent_length

    def _build_chunk_mask(
        self,
        task_type: str,
        latent_length: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        acoustic_dim: int,
        repainting_start: Optional[float] = None,
        repainting_end: Optional[float] = None,
        has_src_audio: bool = False,
    ) -> torch.Tensor:
        """
        Build chunk masks for different task types.

        The chunk mask indicates which latent frames should be generated (1) vs kept from source (0).

        Args:
            task_type (`str`): Task type.
            latent_length (`int`): Length of the latent sequence.
            batch_size (`int`): Batch size.
            device (`torch.device`): Target device.
            dtype (`torch.dtype`): Target dtype.
            acoustic_dim (`int`): Acoustic dimension.
            repainting_start (`float`, *optional*): Start time in seconds for repaint region.
            repainting_end (`float`, *optional*): End time in seconds for repaint region.
            has_src_audio (`bool`, *optional*): Whether source audio was provided.

        Returns:
            `torch.Tensor`: Chunk mask of shape `[batch, latent_length, acoustic_dim]`.
        """
        # The real handler (acestep/core/generation/handler/conditioning_masks.py:64-67)
        # starts with a BOOL tensor: True inside the "generate" window, False outside.
        # The chunk_mask_modes["auto"] override tries to set entries to `2.0`, but the
        # underlying tensor is bool so `tensor[i] = 2.0` is cast to `True` — net effect:
        # the value fed to the DiT after `.to(dtype)` is 1.0 everywhere a span is active
        # and 0.0 outside. I confirmed this by dumping the chunk_masks tensor that
        # generate_audio actually receives (unique values = [True]).
        if task_type in ("repaint", "lego") and has_src_audio:
            lps = self.latents_per_second
            start_latent = int((repainting_start or 0.0) * lps)
            if repainting_end is not None and repainting_end > 0:
                end_latent = int(repainting_end * lps)
            else:
                end_latent = latent_length

            start_latent = max(0, min(start_latent, latent_length - 1))
            end_latent = max(start_latent + 1, min(end_latent, latent_length))

            # 1.0 INSIDE the repaint window (generate), 0.0 outside (keep src).
            # Matches conditioning_masks.py line 64: `mask[start:end] = True`.
            mask_1d = torch.zeros(latent_length, device=device, dtype=dtype)
            mask_1d[start_latent:end_latent] = 1.0
            chunk_mask = mask_1d.unsqueeze(0).unsqueeze(-1).expand(batch_size, -1, acoustic_dim).clone()
        else:
            # Full generation span: ones everywhere (bool True cast to float).
            chunk_mask = torch.ones(batch_size, latent_length, acoustic_dim, device=device, dtype=dtype)

        return chunk_mask

    def request_arguments(self, prompt: OmniPromptType, sampling: OmniDiffusionSamplingParams) -> dict[str, Any]:
        """Arguments that a request gives; what it omits keeps the default of `prepare_generation`."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
        media = fields.get("multi_modal_data") or {}
        for name, reason in self._refused_arguments.items():
            if any(place.get(name) is not None for place in (fields, media, sampling.extra_args)):
                raise ValueError(f"`{name}` can't be set: {reason}.")
        # A sampling field holds None where the request gave nothing; in a dictionary the key tells.
        arguments = {
            "num_inference_steps": sampling.num_inference_steps,
            "generator": sampling.generator,
            "latents": sampling.latents,
            "output_type": sampling.output_type,
            "timesteps": sampling.timesteps,
            "guidance_scale": sampling.guidance_scale if sampling.guidance_scale_provided else None,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in ("prompt",):
            if name in fields:
                arguments[name] = fields[name]
        for name in (
            "src_audio",
            "reference_audio",
            "audio_codes",
        ):
            if name in media:
                arguments[name] = media[name]
        for name in (
            "lyrics",
            "audio_duration",
            "vocal_language",
            "shift",
            "instruction",
            "max_text_length",
            "max_lyric_length",
            "bpm",
            "keyscale",
            "timesignature",
            "task_type",
            "track_name",
            "complete_track_classes",
            "repainting_start",
            "repainting_end",
            "audio_cover_strength",
            "cfg_interval_start",
            "cfg_interval_end",
        ):
            if name in sampling.extra_args:
                arguments[name] = sampling.extra_args[name]
        return arguments

    def prepare_generation(
        self,
        prompt: Union[str, List[str]] = None,
        lyrics: Union[str, List[str]] = "",
        audio_duration: float = 60.0,
        vocal_language: Union[str, List[str]] = "en",
        num_inference_steps: int = 8,
        guidance_scale: float = 7.0,
        shift: float = 3.0,
        generator: Optional[Union[torch.Generator, List[torch.Generator]]] = None,
        latents: Optional[torch.Tensor] = None,
        output_type: Optional[str] = "pt",
        instruction: Optional[str] = None,
        max_text_length: int = 256,
        max_lyric_length: int = 2048,
        bpm: Optional[int] = None,
        keyscale: Optional[str] = None,
        timesignature: Optional[str] = None,
        task_type: str = "text2music",
        track_name: Optional[str] = None,
        complete_track_classes: Optional[List[str]] = None,
        src_audio: Optional[torch.Tensor] = None,
        reference_audio: Optional[torch.Tensor] = None,
        audio_codes: Optional[Union[str, List[str]]] = None,
        repainting_start: Optional[float] = None,
        repainting_end: Optional[float] = None,
        audio_cover_strength: float = 1.0,
        cfg_interval_start: float = 0.0,
        cfg_interval_end: float = 1.0,
        timesteps: Optional[List[float]] = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything up to the denoising loop: inputs of `diffuse` and inputs of `decode`."""
        # 0. Default values and input validation
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            raise ValueError("Must provide `prompt` as a string or list of strings.")

        device = self.device
        dtype = self.dtype
        acoustic_dim = self.transformer.config.audio_acoustic_hidden_dim

        # Turbo checkpoints have guidance distilled into the weights: running CFG
        # produces over-guided audio. Warn + coerce to 1.0 so users who forward their
        # base/sft settings to a turbo pipe still get sensible output.
        if self.is_turbo and guidance_scale > 1.0:
            logger.warning(f"Guidance scale {guidance_scale} is ignored for turbo (guidance-distilled) checkpoints.")
            guidance_scale = 1.0

        has_audio_codes = False
        if audio_codes is not None:
            if isinstance(audio_codes, str):
                has_audio_codes = bool(audio_codes.strip())
            elif isinstance(audio_codes, list):
                if not all(isinstance(code, str) for code in audio_codes):
                    raise TypeError("`audio_codes` must be a string or a list of strings.")
                has_audio_codes = any(code.strip() for code in audio_codes)
            else:
                raise TypeError(f"`audio_codes` must be str or list[str], got {type(audio_codes).__name__}")
            if has_audio_codes:
                if self.audio_tokenizer is None or self.audio_token_detokenizer is None:
                    raise ValueError(
                        "ACE-Step audio-code cover conditioning requires the registered `audio_tokenizer` and "
                        "`audio_token_detokenizer` modules. Re-run the converter with a checkpoint that includes "
                        "tokenizer/detokenizer weights."
                    )
                task_type = "cover" if task_type == "text2music" else task_type
                max_audio_code = self.audio_tokenizer.quantizer.codebook_size - 1
                normalized_audio_codes = _normalize_audio_codes(audio_codes, batch_size)
                num_audio_codes = max(
                    (len(_parse_audio_code_string(code, max_audio_code)) for code in normalized_audio_codes), default=0
                )
                pool_window_size = int(getattr(self.audio_token_detokenizer.config, "pool_window_size", 5))
                audio_codes_latent_length = num_audio_codes * pool_window_size
                if audio_codes_latent_length <= 0:
                    raise ValueError("`audio_codes` did not contain any `<|audio_code_*|>` tokens.")
                if audio_duration is None or audio_duration <= 0:
                    audio_duration = audio_codes_latent_length / self.latents_per_second

        self.check_inputs(
            prompt=prompt,
            lyrics=lyrics,
            task_type=task_type,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            audio_cover_strength=audio_cover_strength,
            cfg_interval_start=cfg_interval_start,
            cfg_interval_end=cfg_interval_end,
            repainting_start=repainting_start,
            repainting_end=repainting_end,
        )
        # Stash a few args as instance state so `do_classifier_free_guidance` and the
        # step-end callback can read them without the full arg bundle.
        self._guidance_scale = guidance_scale

        # Auto-generate instruction based on task_type if not provided
        if instruction is None:
            instruction = self._get_task_instruction(
                task_type=task_type,
                track_name=track_name,
                complete_track_classes=complete_track_classes,
            )

        # Determine if src_audio provides the duration
        has_src_audio = src_audio is not None
        if has_src_audio:
            src_audio_duration = src_audio.shape[-1] / self.sample_rate
            if audio_duration is None or audio_duration <= 0:
                audio_duration = src_audio_duration
        if audio_duration is None or audio_duration <= 0:
            audio_duration = 60.0

        # 1. Encode text prompts and lyrics
        text_hidden_states, text_attention_mask, lyric_hidden_states, lyric_attention_mask = self.encode_prompt(
            prompt=prompt,
            lyrics=lyrics,
            device=device,
            vocal_language=vocal_language,
            audio_duration=audio_duration,
            instruction=instruction,
            bpm=bpm,
            keyscale=keyscale,
            timesignature=timesignature,
            max_text_length=max_text_length,
            max_lyric_length=max_lyric_length,
        )

        # 2. Prepare source latents and latent length (VAE-driven latent frame rate).
        latent_length = math.ceil(audio_duration * self.latents_per_second)
        src_latents, latent_length = self.prepare_src_latents(
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            src_audio=src_audio,
            audio_codes=audio_codes if has_audio_codes else None,
            latent_length=latent_length,
            task_type=task_type,
        )

        # 3. Prepare reference audio for timbre encoder
        if reference_audio is not None:
            refer_audio_acoustic, refer_audio_order_mask = self.prepare_reference_audio_latents(
                reference_audio=reference_audio, batch_size=batch_size, device=device, dtype=dtype
            )
        else:
            # No reference audio: use the learned silence_latent that ships with the
            # condition encoder. Matches
            # acestep/core/generation/handler/conditioning_embed.py:47
            #     if all(refer_audio == 0): refer_audio_latent = silence_latent[:, :750, :]
            # Literal zeros are OOD for the timbre encoder and produce drone-like output.
            timbre_fix_frame = math.ceil(30 * self.latents_per_second)
            refer_audio_acoustic = (
                self.condition_encoder.silence_latent[:, :timbre_fix_frame, :]
                .to(device=device, dtype=dtype)
                .expand(batch_size, -1, -1)
                .contiguous()
            )
            refer_audio_order_mask = torch.arange(batch_size, device=device, dtype=torch.long)

        # 4. Encode conditions
        encoder_hidden_states, encoder_attention_mask = self.condition_encoder(
            text_hidden_states=text_hidden_states,
            text_attention_mask=text_attention_mask,
            lyric_hidden_states=lyric_hidden_states,
            lyric_attention_mask=lyric_attention_mask,
            refer_audio_acoustic_hidden_states_packed=refer_audio_acoustic,
            refer_audio_order_mask=refer_audio_order_mask,
        )

        # For audio_cover_strength < 1.0, also encode a non-cover (text2music) condition
        non_cover_encoder_hidden_states = None
        if audio_cover_strength < 1.0 and task_type == "cover":
            text2music_instruction = TASK_INSTRUCTIONS["text2music"]
            nc_text_hs, nc_text_mask, nc_lyric_hs, nc_lyric_mask = self.encode_prompt(
                prompt=prompt,
                lyrics=lyrics,
                device=device,
                vocal_language=vocal_language,
                audio_duration=audio_duration,
                instruction=text2music_instruction,
                bpm=bpm,
                keyscale=keyscale,
                timesignature=timesignature,
                max_text_length=max_text_length,
                max_lyric_length=max_lyric_length,
            )
            non_cover_encoder_hidden_states, _ = self.condition_encoder(
                text_hidden_states=nc_text_hs,
                text_attention_mask=nc_text_mask,
                lyric_hidden_states=nc_lyric_hs,
                lyric_attention_mask=nc_lyric_mask,
                refer_audio_acoustic_hidden_states_packed=refer_audio_acoustic,
                refer_audio_order_mask=refer_audio_order_mask,
            )

        # 5. Build chunk mask and context latents
        chunk_mask = self._build_chunk_mask(
            task_type=task_type,
            latent_length=latent_length,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            acoustic_dim=acoustic_dim,
            repainting_start=repainting_start,
            repainting_end=repainting_end,
            has_src_audio=has_src_audio,
        )

        # For repaint: substitute silence_latent INSIDE the repaint window, keep the
        # original src_latents outside. Matches conditioning_masks.py: src_latent[
        # start:end] = silence_latent_tiled[start:end]. chunk_mask is 1 inside the
        # window, 0 outside.
        if task_type in ("repaint",) and has_src_audio:
            sl_tiled, _ = self.prepare_src_latents(
                device=device, dtype=dtype, batch_size=batch_size, latent_length=latent_length
            )
            src_latents = torch.where(chunk_mask > 0.5, sl_tiled, src_latents)

        context_latents = torch.cat([src_latents, chunk_mask], dim=-1)

        # 6. Prepare noise latents
        latents = self.prepare_latents(
            batch_size=batch_size,
            audio_duration=latent_length / self.latents_per_second,
            dtype=dtype,
            device=device,
            generator=generator,
            latents=latents,
        )

        # 7. Prepare null condition for CFG. Matches the base-model behaviour in
        # `acestep/models/base/modeling_acestep_v15_base.py`: broadcast the learned
        # `null_condition_emb` to the shape of the conditional sequence. Re-encoding empty
        # strings through the text encoder produces out-of-distribution conditioning and
        # visibly degrades audio quality — do not do that.
        do_cfg = self.do_classifier_free_guidance
        null_encoder_hidden_states = None
        if do_cfg:
            null_emb = getattr(self.condition_encoder, "null_condition_emb", None)
            if null_emb is None:
                raise ValueError(
                    "Classifier-free guidance requested (guidance_scale > 1.0) but the "
                    "condition encoder does not expose `null_condition_emb`. Re-run the "
                    "converter against a base/SFT checkpoint, or pass `guidance_scale=1.0`."
                )
            null_encoder_hidden_states = null_emb.to(
                device=encoder_hidden_states.device, dtype=encoder_hidden_states.dtype
            ).expand_as(encoder_hidden_states)

        # 9. Configure scheduler with ACE-Step's custom sigma schedule. `_get_timestep_schedule`
        #    already returns the shifted / turbo sigmas in `[0, 1]`; the scheduler was
        #    registered with `num_train_timesteps=1` and `shift=1.0` so it consumes them
        #    verbatim (and appends the terminal 0 used on the final Euler step).
        t_schedule = self._get_timestep_schedule(
            num_inference_steps=num_inference_steps,
            shift=shift,
            device=device,
            dtype=torch.float32,
            timesteps=timesteps,
        )
        self.scheduler.set_timesteps(sigmas=t_schedule.tolist(), device=device)
        num_steps = len(self.scheduler.timesteps)

        # 10. Denoising loop (flow matching ODE)
        xt = latents
        # APG momentum is stateful across steps, so instantiate once before the loop.
        momentum_buffer = MomentumBuffer(momentum=-0.75) if do_cfg else None
        timesteps = self.scheduler.timesteps
        return (
            {
                "xt": xt,
                "timesteps": timesteps,
                "batch_size": batch_size,
                "device": device,
                "dtype": dtype,
                "do_cfg": do_cfg,
                "cfg_interval_start": cfg_interval_start,
                "cfg_interval_end": cfg_interval_end,
                "encoder_hidden_states": encoder_hidden_states,
                "null_encoder_hidden_states": null_encoder_hidden_states,
                "context_latents": context_latents,
                "guidance_scale": guidance_scale,
                "momentum_buffer": momentum_buffer,
                "audio_cover_strength": audio_cover_strength,
                "non_cover_encoder_hidden_states": non_cover_encoder_hidden_states,
                "task_type": task_type,
            },
            {
                "output_type": output_type,
            },
        )

    def predict_guided_noise(
        self,
        t_sched,
        batch_size,
        device,
        dtype,
        do_cfg,
        cfg_interval_start,
        cfg_interval_end,
        xt,
        encoder_hidden_states,
        null_encoder_hidden_states,
        context_latents,
        guidance_scale,
        momentum_buffer,
        audio_cover_strength,
        non_cover_encoder_hidden_states,
        task_type,
    ) -> torch.Tensor:
        """The prediction that one scheduler step takes, guided if the request is."""
        current_timestep = float(t_sched)
        t_curr_tensor = current_timestep * torch.ones((batch_size,), device=device, dtype=dtype)

        # Determine if CFG should be applied at this timestep
        # cfg_interval maps timestep ratio to [cfg_interval_start, cfg_interval_end]
        timestep_ratio = 1.0 - current_timestep  # t=1 -> ratio=0, t=0 -> ratio=1
        apply_cfg = do_cfg and (cfg_interval_start <= timestep_ratio <= cfg_interval_end)

        if apply_cfg:
            # Batched guidance: stack (cond, null) on batch dim and run the DiT once.
            # Matches `acestep/models/base/modeling_acestep_v15_base.py:1972-2022`.
            model_output = self.transformer(
                hidden_states=torch.cat([xt, xt], dim=0),
                timestep=torch.cat([t_curr_tensor, t_curr_tensor], dim=0),
                timestep_r=torch.cat([t_curr_tensor, t_curr_tensor], dim=0),
                encoder_hidden_states=torch.cat([encoder_hidden_states, null_encoder_hidden_states], dim=0),
                context_latents=torch.cat([context_latents, context_latents], dim=0),
                return_dict=False,
            )
            vt_cond, vt_uncond = model_output[0].chunk(2, dim=0)
            # ACE-Step base / SFT use APG — not vanilla CFG. The original formulation is
            # `pred_cond + (guidance_scale - 1) * update` with time-only normalization.
            vt = normalized_guidance(
                pred_cond=vt_cond,
                pred_uncond=vt_uncond,
                guidance_scale=guidance_scale - 1.0,
                momentum_buffer=momentum_buffer,
                eta=0.0,
                norm_threshold=2.5,
                use_original_formulation=True,
                norm_dim=(1,),
            )
        else:
            # Standard forward pass (no CFG)
            refuse_cache_dit(self.transformer)
            model_output = self.transformer(
                hidden_states=xt,
                timestep=t_curr_tensor,
                timestep_r=t_curr_tensor,
                encoder_hidden_states=encoder_hidden_states,
                context_latents=context_latents,
                return_dict=False,
            )
            vt = model_output[0]

        # Audio cover strength blending for cover tasks
        if audio_cover_strength < 1.0 and non_cover_encoder_hidden_states is not None and task_type == "cover":
            refuse_cache_dit(self.transformer)
            nc_output = self.transformer(
                hidden_states=xt,
                timestep=t_curr_tensor,
                timestep_r=t_curr_tensor,
                encoder_hidden_states=non_cover_encoder_hidden_states,
                context_latents=context_latents,
                return_dict=False,
            )
            vt_nc = nc_output[0]
            # Blend: strength * cover_vt + (1 - strength) * text2music_vt
            vt = audio_cover_strength * vt + (1.0 - audio_cover_strength) * vt_nc
        return vt

    def diffuse(
        self,
        xt,
        timesteps,
        batch_size,
        device,
        dtype,
        do_cfg,
        cfg_interval_start,
        cfg_interval_end,
        encoder_hidden_states,
        null_encoder_hidden_states,
        context_latents,
        guidance_scale,
        momentum_buffer,
        audio_cover_strength,
        non_cover_encoder_hidden_states,
        task_type,
    ) -> torch.Tensor:
        """The denoising loop."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            begin_anew(self.transformer)
            for t_sched in timesteps:
                vt = self.predict_guided_noise(
                    t_sched=t_sched,
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype,
                    do_cfg=do_cfg,
                    cfg_interval_start=cfg_interval_start,
                    cfg_interval_end=cfg_interval_end,
                    xt=xt,
                    encoder_hidden_states=encoder_hidden_states,
                    null_encoder_hidden_states=null_encoder_hidden_states,
                    context_latents=context_latents,
                    guidance_scale=guidance_scale,
                    momentum_buffer=momentum_buffer,
                    audio_cover_strength=audio_cover_strength,
                    non_cover_encoder_hidden_states=non_cover_encoder_hidden_states,
                    task_type=task_type,
                )

                # Euler ODE step via the scheduler. The scheduler appends a terminal
                # sigma=0, so on the last step `dt = 0 - t_curr = -t_curr` and
                # `prev = x + dt * v = x - t_curr * v` — the "project to x0" step the
                # hand-rolled loop did as a special case.
                xt = self.scheduler_step_maybe_with_cfg(vt, t_sched, xt, do_true_cfg=False)
                progress_bar.update()
        return xt

    def decode(
        self,
        xt,
        output_type,
    ) -> torch.Tensor:
        """What Diffusers returns, before post-processing."""

        # 11. Post-processing: decode latents to audio
        if output_type == "latent":
            return xt

        # Decode latents to audio waveform using VAE. VAE expects [B, C, T]; our
        # latents are [B, T, C]. Tiling for long audio is handled inside
        # `AutoencoderOobleck.decode` (enabled on pipeline init).
        audio_latents = xt.transpose(1, 2)
        audio = self.vae.decode(audio_latents).sample

        # Two-stage normalization matches the real pipeline:
        # 1. `_decode_generate_music_pred_latents`: if peak > 1, divide by peak (hard
        #    anti-clip).
        # 2. `generate_music` -> `normalize_audio(target_db=-1.0)`: rescale to peak =
        #    10 ** (-1.0 / 20) ≈ 0.891 so the output has consistent loudness.
        # Without step 2, diffusers output was ~1.12x louder than the reference even
        # when the latent content was matching.
        if audio.dtype != torch.float32:
            audio = audio.float()
        peak = audio.abs().amax(dim=[1, 2], keepdim=True)
        if torch.any(peak > 1.0):
            audio = audio / peak.clamp(min=1.0)
        target_amp = 10.0 ** (-1.0 / 20.0)  # -1 dBFS
        peak = audio.abs().amax(dim=[1, 2], keepdim=True).clamp(min=1e-6)
        audio = audio * (target_amp / peak)
        return audio

    def generate(self, inputs: dict[str, Any], decode_inputs: dict[str, Any]) -> DiffusionOutput:
        """Denoise what was prepared, and decode it."""
        return self.finish(xt=self.diffuse(**inputs), **decode_inputs)

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
        xt = self.diffuse(**joined)
        for index, (_, decode_inputs, _) in enumerate(prepared):
            outputs.append(self.finish(xt=xt[index : index + 1], **decode_inputs))
        return outputs

    def join_inputs(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Inputs of one loop for all requests; None where they have to stay apart."""
        joined = dict(requests[0])
        try:
            for name in joined:
                values = [inputs[name] for inputs in requests]
                if name in self._rows:
                    joined[name] = join_rows(values)
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
        state.latents = inputs.pop("xt")
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
                    t_sched=state.current_timestep,
                    batch_size=inputs["batch_size"],
                    device=inputs["device"],
                    dtype=inputs["dtype"],
                    do_cfg=inputs["do_cfg"],
                    cfg_interval_start=inputs["cfg_interval_start"],
                    cfg_interval_end=inputs["cfg_interval_end"],
                    xt=state.latents,
                    encoder_hidden_states=inputs["encoder_hidden_states"],
                    null_encoder_hidden_states=inputs["null_encoder_hidden_states"],
                    context_latents=inputs["context_latents"],
                    guidance_scale=inputs["guidance_scale"],
                    momentum_buffer=inputs["momentum_buffer"],
                    audio_cover_strength=inputs["audio_cover_strength"],
                    non_cover_encoder_hidden_states=inputs["non_cover_encoder_hidden_states"],
                    task_type=inputs["task_type"],
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
        return self.finish(xt=state.latents, **state.extra["decode"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
