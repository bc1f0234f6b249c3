"""Inputs of a forward call: the same values on every side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from porter.verify.cases import ModuleCase, build_inputs

HALF = torch.bfloat16


def write_inputs(case: ModuleCase, path: Path) -> None:
    """Draw and store the inputs of a case. What pipelines cast to the type of their latents becomes bfloat16: `randn`
    and a floating `timestep` without a dtype, and floating masks. All else keeps its dtype."""
    values = build_inputs(case.inputs, case.seed)
    torch.save({name: _halved(value, case.inputs[name], name) for name, value in values.items()}, path)


def _halved(value: Any, spec: Mapping[str, Any], name: str) -> Any:
    if "map" in spec:
        return {k: _halved(v, spec["map"][k], k) for k, v in value.items()}
    if "list" in spec:
        return [_halved(v, s, name) for v, s in zip(value, spec["list"], strict=True)]
    drawn = "randn" in spec or (name == "timestep" and torch.is_tensor(value) and value.is_floating_point())
    floating_mask = "mask" in spec and spec.get("dtype") == "float32"
    return value.to(HALF) if floating_mask or (drawn and "dtype" not in spec) else value


def read_inputs(path: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The stored inputs on a device; what is stored in bfloat16 comes in `dtype`."""
    return _moved(torch.load(path, weights_only=True), device, dtype)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if torch.is_tensor(value):
        return value.to(device, dtype if value.dtype is HALF else value.dtype)
    if isinstance(value, dict):
        return {k: _moved(v, device, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device, dtype) for v in value)
    return value


def other_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with another text: the second branch of guidance. Rows of encoded text are shifted."""
    changed = {k: v for k, v in inputs.items() if k in ("encoder_hidden_states", "pooled_projections")}
    return {**inputs, **{k: v.roll(1, dims=-1) for k, v in changed.items() if torch.is_tensor(v)}}


def other_values(value: Any) -> Any:
    """The same inputs with other values: what was drawn is shifted, along the last dimension."""
    if isinstance(value, dict):
        return {k: other_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(other_values(v) for v in value)
    drawn = torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
    return value.roll(1, dims=-1) if drawn else value


def first_tensor(output: Any) -> torch.Tensor:
    """The sample: the first thing that a denoiser returns."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def tensors_in(output: Any) -> list[torch.Tensor]:
    """All that a denoiser returns, not copied."""
    if torch.is_tensor(output):
        return [output]
    held = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [t for value in held for t in tensors_in(value)]
