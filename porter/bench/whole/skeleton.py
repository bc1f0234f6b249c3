"""A checkpoint of real size without its weights: the corpus' tiny one, with the configurations of the real models in it.

So tokenizers, index and scheduler are files that a loader reads, and what would be gigabytes is drawn where it is needed
(`components`). Tokenizers know letters, not words: a text has as many tokens as bytes.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.verify.checkpoint import build_checkpoint
from porter.verify.pipeline_spec import load_spec

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def write_skeleton(pipeline: str, components: Mapping[str, Mapping[str, Any]], out: Path) -> Path:
    """Write the folder. `components` are the numbers of the real models; none: all stay tiny.

    Raises ValueError for a model that has no numbers where others have them: it would stay tiny unnoticed.
    """
    spec = load_spec(pipeline)
    if spec is None:
        raise ValueError(f"there is no tests/corpus/pipelines/{pipeline}.yaml")
    build_checkpoint(pipeline, spec.data, out)
    index = json.loads((out / "model_index.json").read_text())
    for pattern in WEIGHTS:
        for file in out.glob(f"*/{pattern}"):
            file.unlink()
    models = {n for n in index if (out / n / "config.json").is_file()}
    if components and (tiny := models - set(components)):
        raise ValueError(f"there are no real numbers of {', '.join(sorted(tiny))} of {pipeline}")
    for name, numbers in components.items():
        _enlarge(out / name, class_of(out, name), numbers)
    return out


def class_of(checkpoint: Path, component: str) -> type:
    """The class that model_index.json names for a component. Raises KeyError for a component that is not there."""
    library, name = json.loads((checkpoint / "model_index.json").read_text())[component]
    module = importlib.import_module(
        library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    )
    return getattr(module, name)


def _enlarge(folder: Path, cls: Any, numbers: Mapping[str, Any]) -> None:
    """Write a component's configuration anew with the real numbers."""
    from diffusers import ModelMixin, SchedulerMixin

    if issubclass(cls, SchedulerMixin):
        cls(**numbers).save_pretrained(folder)  # type: ignore[attr-defined]
        return
    if issubclass(cls, ModelMixin):
        parameters = inspect.signature(cls.__init__).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        if unknown := set(numbers) - set(parameters):
            raise ValueError(f"{cls.__name__} has no parameter {', '.join(sorted(unknown))}")
        data = {"_class_name": cls.__name__, **defaults, **numbers}
    else:
        tiny = json.loads((folder / "config.json").read_text())
        data = cls.config_class.from_dict(_merged(tiny, numbers)).to_dict()
    (folder / "config.json").write_text(json.dumps(data, indent=2))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`, mappings inside merged; what is None in `new` is left to the class."""
    merged = dict(old)
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged
