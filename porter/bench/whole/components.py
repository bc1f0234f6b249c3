"""Models of a pipeline with random weights, drawn on the device: no file of weights is read or written.

While `random_components` holds, `from_pretrained` of Diffusers' and transformers' models reads the configuration alone, and
the engine's loader gets the weights of a denoiser one at a time. Each tensor is seeded by its component and name, so all
sides hold the same ones.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from porter.bench.side_diffusers import owners, parameters_on_meta
from porter.bench.weights import random_weight
from porter.bench.whole.skeleton import class_of


def bare_model(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model of a configuration as its constructor makes it, with all parameters on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parameters_on_meta(), device:
            if _of_diffusers(cls):
                return cls.from_config(json.loads((folder / "config.json").read_text())).eval()
            return cls(cls.config_class.from_pretrained(folder, dtype=dtype)).eval()
    finally:
        torch.set_default_dtype(before)


def random_model(cls: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """What `from_pretrained(folder)` would give in `dtype`, weights random. The folder's name is the component's."""
    model: Any = bare_model(cls, folder, dtype, device)
    keep = tuple((cls._keep_in_fp32_modules if _of_diffusers(cls) else cls._keep_in_fp32_modules_strict) or ())
    if _of_diffusers(cls) and not keep:
        torch.nn.Module.to(model, dtype)  # Diffusers' own would warn of modules that it keeps in float32
    tied = _tied(model)
    for name, owner, key in list(owners(model)):
        if name in tied:
            continue
        wide = any(part in name.split(".") for part in keep)
        weight = random_weight(f"{folder.name}.{name}", owner._parameters[key].shape, device)
        owner._parameters[key] = torch.nn.Parameter(weight.to(torch.float32 if wide else dtype))
    if tied:
        model.tie_weights()
    return model


def random_weights(checkpoint: Path, component: str, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """What the files of a component would hold in bfloat16, one tensor at a time: parameters and persistent buffers."""
    folder = checkpoint / component
    model = bare_model(class_of(checkpoint, component), folder, torch.bfloat16, torch.device("cpu"))
    tied = _tied(model)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if tensor.is_meta:
            yield name, random_weight(f"{component}.{name}", tensor.shape, device)
        else:
            yield name, tensor.to(device, torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


@contextlib.contextmanager
def random_components(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within, loaders of this process build models from configurations. The engine's loader is covered where the engine is
    loaded; a process of Diffusers does not import it."""
    import sys

    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    def from_pretrained(cls: Any, path: str, *_: Any, subfolder: str | None = None, **given: Any) -> torch.nn.Module:
        wanted = given.get("dtype") or given.get("torch_dtype")
        return random_model(
            cls, Path(path, subfolder or ""), wanted if isinstance(wanted, torch.dtype) else dtype, device
        )

    def weights(_self: Any, source: Any, model: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in random_weights(Path(source.model_or_path), source.subfolder, device):
            yield source.prefix + name, tensor

    replaced: list[tuple[type, str, Any]] = [
        (ModelMixin, "from_pretrained", classmethod(from_pretrained)),
        (PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
    ]
    loader = sys.modules.get("vllm_omni.diffusion.model_loader.diffusers_loader")
    if loader is not None:
        replaced.append((loader.DiffusersPipelineLoader, "_get_weights_iterator", weights))
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _of_diffusers(cls: type) -> bool:
    from diffusers import ModelMixin

    return issubclass(cls, ModelMixin)


def _tied(model: Any) -> set[str]:
    """Parameters that share another's storage: files hold the other alone."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})
