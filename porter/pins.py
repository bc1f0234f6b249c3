"""The versions that rules, templates and evidence are about."""

from __future__ import annotations

ENGINE = ("vllm-omni", "0.30.0")
DIFFUSERS = ("diffusers", "0.40.0")
