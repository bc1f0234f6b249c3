"""Guidance objects. Options are constructor arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds

CLASSES = ("ClassifierFreeGuidance", "AdaptiveProjectedMixGuidance")


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        import diffusers

        return getattr(diffusers, name)(**options)

    return build


for _name in CLASSES:
    _builder(_name)
