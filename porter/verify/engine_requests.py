"""From arguments of a Diffusers pipeline's __call__ to the engine's requests, by the one rule of the port contract.

The rule, tried in this order: `num_*_per_prompt` -> num_outputs_per_prompt; a sampling field of the same name;
prompts and what belongs to them -> the prompt dict; media -> its multi_modal_data; anything else -> extra_args.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

MEDIA = frozenset({"image", "images", "video", "videos", "mask", "audio", "audios", "controls"})
NOT_MEDIA = frozenset(
    {"embeds", "latents", "guidance", "scale", "ids", "noise", "strength", "s", "seconds", "duration", "rate"}
)
MAIN_MEDIA = {"images": "image", "videos": "video", "audios": "audio"}


class Reach(StrEnum):
    """How a parameter reaches the port."""

    COUNT = "num_outputs_per_prompt"
    SAMPLING = "sampling field"
    PROMPT = "prompt dict"
    MEDIA = "multi_modal_data"
    EXTRA = "extra_args"


def reach_of(name: str, sampling_fields: frozenset[str]) -> Reach:
    """Where the contract puts a parameter of Diffusers' __call__."""
    words = set(name.split("_"))
    if re.fullmatch(r"num_\w+_per_prompt", name):
        return Reach.COUNT
    if name in sampling_fields:
        return Reach.SAMPLING
    if "prompt" in words or name.endswith("prompt_embeds"):
        return Reach.PROMPT
    if words & MEDIA and not words & NOT_MEDIA:
        return Reach.MEDIA
    return Reach.EXTRA


def arguments_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call, with its tensors and images loaded."""
    import torch

    kwargs = dict(call["kwargs"])
    if call.get("tensors"):
        kwargs |= torch.load(call["tensors"], weights_only=True)
    if call.get("images"):
        from PIL import Image

        for name, paths in call["images"].items():
            opened = [Image.open(p).copy() for p in (paths if isinstance(paths, list) else [paths])]
            kwargs[name] = opened if isinstance(paths, list) else opened[0]
    return kwargs


def requests_of(call: Mapping[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """One engine request per prompt of the call, and how each parameter reached it.

    A call with a list of prompts has a list of seeds; prompt-like lists and tensors are split along their first axis.
    A call that lists `requests` has one call for each, which may differ in everything.
    """
    if "requests" in call:
        groups = [requests_of(each) for each in call["requests"]]
        alone = [request for requests, _ in groups for request in requests]
        for index, request in enumerate(alone):
            request.request_id = f"r{index}"
        return alone, groups[0][1]
    from dataclasses import fields

    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    known = frozenset(f.name for f in fields(OmniDiffusionSamplingParams))
    kwargs = arguments_of(call)
    seeds = call["seed"] if isinstance(call["seed"], list) else [call["seed"]]
    reach = {name: reach_of(name, known) for name in kwargs}
    requests = []
    for index, seed in enumerate(seeds):
        prompt: dict[str, Any] = {}
        media: dict[str, Any] = {}
        sampling: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in kwargs.items():
            match reach[name]:
                case Reach.COUNT:
                    sampling["num_outputs_per_prompt"] = value
                case Reach.SAMPLING:
                    sampling[name] = _share(value, index, len(seeds), tensors=name.endswith("latents"))
                case Reach.PROMPT:
                    prompt[name] = _share(value, index, len(seeds), tensors=True)
                case Reach.MEDIA:
                    media[name] = value
                    media.setdefault(MAIN_MEDIA.get(name, name), value)
                case Reach.EXTRA:
                    extra[name] = value if isinstance(value, list) else _share(value, index, len(seeds), tensors=True)
        prompt.setdefault("prompt", None)
        if media:
            prompt["multi_modal_data"] = media
        if extra:
            sampling["extra_args"] = extra
        params = OmniDiffusionSamplingParams(seed=seed, **sampling)
        requests.append(OmniDiffusionRequest(prompt=prompt, sampling_params=params, request_id=f"r{index}"))
    return requests, {name: str(where) for name, where in reach.items()}


def _share(value: Any, index: int, count: int, *, tensors: bool) -> Any:
    """The part of a per-prompt value that belongs to prompt `index` of `count`. A tensor keeps its batch axis."""
    import torch

    if count == 1:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return value[0]
        return value
    if isinstance(value, list) and len(value) == count and all(isinstance(v, str) or v is None for v in value):
        return value[index]
    if tensors and torch.is_tensor(value) and value.dim() and value.shape[0] % count == 0:
        size = value.shape[0] // count
        return value[index * size : (index + 1) * size]
    return value
