"""Tiny random checkpoints, saved as a user's would be, and the check that a checkpoint is complete."""

from __future__ import annotations

import inspect
import json
import struct
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.verify.outcome import VerifyError
from porter.verify.stand_ins import note, provide

ORDER = ("tokenizer", "processor", "feature_extractor", "image_processor", "text_encoder", "image_encoder", "vae",
         "scheduler")  # fmt: skip
SHARD = "2MB"
AGAIN = "download the checkpoint again; nothing was loaded"


def component_classes(pipeline: type) -> dict[str, str | None]:
    """Component names of a pipeline's constructor and the class each annotation names (None for Auto and unions)."""
    constructor = inspect.getattr_static(pipeline, "__init__")
    hints = typing.get_type_hints(constructor)
    found: dict[str, str | None] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint = hints.get(name)
        arms = [a for a in typing.get_args(hint) if a is not type(None)] or [hint]
        found[name] = getattr(arms[0], "__name__", None) if len(arms) == 1 else None
    return found


def build_checkpoint(pipeline_class: str, spec: Mapping[str, Any], out: Path | str, seed: int = 0) -> Path:
    """Build every component that the pipeline's constructor declares, save the pipeline to `out`, return the folder.

    `spec` is the content of tests/corpus/pipelines/<Pipeline>.yaml: `components` {name: {class, options...} or null}
    and `denoisers` {name: {class, config}}. A component of a class with a denoiser entry is built from its config.
    """
    import torch

    from porter.verify.baseline import diffusers_class
    from porter.verify.tiny import build_component, random_model

    torch.manual_seed(seed)
    provide(spec.get("stand_ins", {}))
    pipeline = diffusers_class(pipeline_class)
    declared = component_classes(pipeline)
    given = dict(spec.get("components", {}))
    denoisers = spec.get("denoisers", {})
    if unknown := (set(given) | set(denoisers)) - set(declared):
        raise VerifyError(f"{pipeline_class} has no component {', '.join(sorted(unknown))}")
    built: dict[str, Any] = {}
    for name in sorted(declared, key=_order):
        options = given.get(name, {})
        if name in denoisers:
            built[name] = random_model(denoisers[name]["class"], denoisers[name]["config"], seed + 1 + len(built))
        elif options is None:
            built[name] = None
        elif not isinstance(options, dict):
            built[name] = options
        elif declared[name] in ("bool", "int", "float", "str") or _optional(pipeline, name, given):
            continue
        else:
            suffix = name.removeprefix("text_encoder") if name.startswith("text_encoder") else ""
            class_name = options.get("class", declared[name])
            if class_name is None:
                raise VerifyError(f"{pipeline_class}: the annotation of {name} names no single class", "give its class")
            options = {"tokenizer": f"tokenizer{suffix}"} | {k: v for k, v in options.items() if k != "class"}
            if not name.startswith("text_encoder"):
                options.pop("tokenizer")
            built[name] = build_component(class_name, options, built)
    pipe = pipeline(**built)
    pipe.save_pretrained(str(out), max_shard_size=SHARD)
    _drop_unsaved(Path(out) / "model_index.json")
    note(out, spec.get("stand_ins", {}))
    return Path(out)


def _drop_unsaved(index: Path) -> None:
    """Take components out of the index that Diffusers lists and does not save (those with a default)."""
    rows = json.loads(index.read_text())
    kept = {n: v for n, v in rows.items() if not isinstance(v, list) or v[0] is None or (index.parent / n).is_dir()}
    index.write_text(json.dumps(kept, indent=2))


def _order(name: str) -> tuple[int, str]:
    return next((i for i, prefix in enumerate(ORDER) if name.startswith(prefix)), len(ORDER)), name


def _optional(pipeline: type, name: str, given: Mapping[str, Any]) -> bool:
    """A component that has a default in the constructor is left out unless the file mentions it."""
    parameter = inspect.signature(inspect.getattr_static(pipeline, "__init__")).parameters[name]
    return parameter.default is not parameter.empty and name not in given


def check_checkpoint(path: Path | str) -> tuple[str, ...]:
    """Class names in a complete checkpoint folder. Raises VerifyError (PORT011) naming the first thing that is missing."""
    root = Path(path)
    index = root / "model_index.json"
    if not index.is_file():
        raise _unreadable(f"{root} is no Diffusers checkpoint: it has no model_index.json")
    data = _mapping(index)
    for name, value in data.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
            continue
        folder = root / name
        if not folder.is_dir():
            raise _unreadable(f"checkpoint {root}: component {name} ({value[1]}) has no folder", AGAIN)
        _check_weights(folder)
    return (data.get("_class_name", ""),)


def _unreadable(message: str, advice: str = "") -> VerifyError:
    return VerifyError(message, advice, "PORT011")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(f"{path}: not valid JSON: {error}", AGAIN) from None
    if not isinstance(data, dict):
        raise _unreadable(f"{path}: a mapping is expected", AGAIN)
    return data


def _check_weights(folder: Path) -> None:
    """Every shard that an index names exists and is as long as its header says."""
    for index in folder.glob("*.index.json"):
        shards = sorted(set(_mapping(index).get("weight_map", {}).values()))
        missing = [s for s in shards if not (folder / s).is_file()]
        if missing:
            which = f"{len(missing)} of {len(shards)} weight files missing: {', '.join(missing[:4])}"
            raise _unreadable(f"checkpoint {folder}: {which}", AGAIN)
    config = folder / "config.json"
    if config.is_file() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise _unreadable(f"checkpoint {folder}: no weight file", AGAIN)
    for file in folder.glob("*.safetensors"):
        _check_length(file)


def _check_length(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise _unreadable(f"{file} is cut short", AGAIN)
        header = json.loads(stream.read(length))
    end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise _unreadable(f"{file} is cut short: {size} bytes, its header says {8 + length + end}", AGAIN)
