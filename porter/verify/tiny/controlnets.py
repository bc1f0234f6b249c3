"""ControlNets. Option `config` holds the constructor's arguments; they must fit the denoiser's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds, random_model

CLASSES = (
    "CosmosControlNetModel",
    "FluxControlNetModel",
    "HunyuanDiT2DControlNetModel",
    "QwenImageControlNetModel",
    "SD3ControlNetModel",
    "SanaControlNetModel",
    "ZImageControlNetModel",
)
SEED = 101


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        return random_model(name, options["config"], SEED)

    return build


for _name in CLASSES:
    _builder(_name)
