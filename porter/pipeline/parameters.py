"""Which place of a request carries each `__call__` parameter: one rule, five steps in order."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import libcst as cst

from porter.pipeline.model import Parameter, Place
from porter.pipeline.tables import Tables
from porter.source.marks import strip
from porter.source.tree import code

_NOT_MEDIA = frozenset({
    "embeds", "latents", "prompt", "scale", "size", "resolution", "strength", "guidance", "kwargs", "s", "seconds",
    "duration", "rate",
})  # fmt: skip

_SETTINGS = frozenset({"int", "float", "bool", "None", "Optional", "typing"})
"""Types of parameters that are never content."""


def request_parameters(parameters: Iterable[cst.Param], tables: Tables) -> tuple[Parameter, ...]:
    """The mapping of all parameters, refused ones included."""
    return tuple(_parameter(p, tables) for p in parameters)


def _parameter(parameter: cst.Param, tables: Tables) -> Parameter:
    name = parameter.name.value
    default = code(parameter.default) if parameter.default is not None else None
    if name in tables.refused:
        return Parameter(name, "refused", name, default, reason=tables.refused[name])
    if name in tables.outputs:
        return Parameter(name, "outputs", "num_outputs_per_prompt", default)
    if name in tables.sampling:
        return Parameter(name, "sampling", name, default, tables.sampling[name])
    return Parameter(name, _place(name, tables), name, default)


def _place(name: str, tables: Tables) -> Place:
    words = set(name.split("_"))
    if "prompt" in words:
        return "prompt"
    if words & tables.media_words and not words & _NOT_MEDIA:
        return "media"
    return "extra"


def media_keys(names: Collection[str], tables: Tables) -> dict[str, str]:
    """The engine's key of each media parameter that it has one for; `names` are the media parameters of a pipeline."""
    chosen = {key: next((n for n in wanted if n in names), None) for key, wanted in tables.media_keys.items()}
    return {name: key for key, name in chosen.items() if name is not None}


def is_text(parameter: cst.Param) -> bool:
    """Whether a request may give one string for this parameter where a call with many prompts gives a list."""
    if parameter.annotation is None:
        return parameter.name.value in ("prompt", "negative_prompt")
    text = code(parameter.annotation.annotation)
    return "str" in text and "list" in text.lower() and "Tensor" not in text


def is_tensor(parameter: cst.Param) -> bool:
    """Whether a call with many prompts takes this parameter as one tensor with a leading batch dimension."""
    text = code(parameter.annotation.annotation) if parameter.annotation is not None else ""
    name = parameter.name.value
    return "Tensor" in text and ("prompt" in name or name.endswith("latents") or "embeds" in name)


def is_setting(parameter: cst.Param) -> bool:
    """Whether the annotation speaks of plain values only, so that the parameter is never content."""
    text = code(parameter.annotation.annotation) if parameter.annotation is not None else ""
    return bool(text) and set(re.findall(r"\w+", text)) <= _SETTINGS


def declaration(parameter: cst.Param) -> str:
    """A parameter as a signature has it."""
    default = code(parameter.default) if parameter.default is not None else None
    annotation = f": {strip(code(parameter.annotation.annotation))}" if parameter.annotation is not None else ""
    equals = f"{' = ' if annotation else '='}{default}" if default is not None else ""
    return f"{parameter.name.value}{annotation}{equals}"
