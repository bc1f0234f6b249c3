"""Tiny random components, keyed by the class names of transformers and diffusers. No denoiser or pipeline is named here.

A builder takes its options and the components built before it, and returns the component. Add one with `@builds`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from porter.verify.outcome import VerifyError

Builder = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
BUILDERS: dict[str, Builder] = {}
MODULES = (
    "tokenizers",
    "text_encoders",
    "image_encoders",
    "autoencoders",
    "schedulers",
    "controlnets",
    "video_autoencoders",
    "audio",
    "vision_language",
    "guiders",
)


def builds(*class_names: str) -> Callable[[Builder], Builder]:
    """Register a builder for component classes."""

    def register(builder: Builder) -> Builder:
        for name in class_names:
            BUILDERS[name] = builder
        return builder

    return register


def build_component(class_name: str, options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """Build one component. `built` has those that exist already, by component name.

    Raises VerifyError for a class that nobody wrote a builder for.
    """
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    builder = BUILDERS.get(class_name)
    if builder is None:
        raise VerifyError(
            f"no tiny builder for a component of class {class_name}",
            f"add one to porter/verify/tiny (known: {', '.join(sorted(BUILDERS))}), or choose another class in the"
            " pipeline's file under tests/corpus/pipelines",
        )
    return builder(options, built)


def random_model(class_name: str, config: Mapping[str, Any], seed: int) -> Any:
    """A Diffusers model with all weights random (no zero-init is left); drawn as `baseline.randomize` does."""
    import diffusers

    return random_weights(getattr(diffusers, class_name)(**config), seed)


def random_weights(model: Any, seed: int) -> Any:
    """The model with all weights random."""
    import torch

    model = model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.copy_(1 + 0.1 * draw if "norm" in name and name.endswith("weight") else 0.2 * draw)
            else:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
    return model


def tokenizer_of(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
    """The tokenizer that belongs to a text encoder, or that of its processor: option `tokenizer`, else the same suffix."""
    found = built[options.get("tokenizer", "tokenizer")]
    return getattr(found, "tokenizer", found)
