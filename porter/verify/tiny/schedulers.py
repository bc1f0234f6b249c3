"""Schedulers. Options are constructor arguments; flow matching uses dynamic shifting, as most pipelines ship it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.verify.tiny import Builder, builds

DEFAULTS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "shift": 3.0,
    },
    "DPMSolverMultistepScheduler": {},
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "FlowMapEulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "CogVideoXDPMScheduler": {},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "HeliosScheduler": {},
    "HeliosDMDScheduler": {},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "CogVideoXDDIMScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "LCMScheduler": {},
    "SCMScheduler": {},
    "DDPMScheduler": {},
}  # fmt: skip


def _builder(name: str) -> Builder:
    @builds(name)
    def build(options: Mapping[str, Any], built: Mapping[str, Any]) -> Any:
        import diffusers

        return getattr(diffusers, name)(**{**DEFAULTS[name], **options})

    return build


for _name in DEFAULTS:
    _builder(_name)
