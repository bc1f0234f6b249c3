"""An out-of-tree CPU platform for vLLM-Omni, which has none.

Every CustomOp takes its native branch (`OmniPlatformEnum.OOT`); attention goes to our SDPA back end.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

VIRTUAL_RANKS = 8
"""Ranks that one machine may pretend to have; the engine takes `rank % device_count`."""


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """vLLM's CPU platform with the hooks that the diffusion worker calls on every platform."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_diffusion_attn_backend_cls(
        cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
    ) -> str:
        return "porter.verify.platform.sdpa.CpuSDPABackend"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        return None

    @classmethod
    def get_device_count(cls) -> int:
        return VIRTUAL_RANKS

    @classmethod
    def get_device_version(cls) -> str | None:
        return None

    @classmethod
    def synchronize(cls) -> None:
        return None

    @classmethod
    def empty_cache(cls) -> None:
        return None

    @classmethod
    def reset_peak_memory_stats(cls, *_: Any, **__: Any) -> None:
        return None

    @classmethod
    def max_memory_allocated(cls, *_: Any, **__: Any) -> int:
        return 0

    @classmethod
    def max_memory_reserved(cls, *_: Any, **__: Any) -> int:
        return 0

    @classmethod
    def memory_allocated(cls, *_: Any, **__: Any) -> int:
        return 0

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        import psutil  # type: ignore[import-untyped]

        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        import psutil  # type: ignore[import-untyped]

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def get_default_stage_config_path(cls) -> str:
        return "vllm_omni/deploy"
