"""Run by `test_graphs.py` in a process with the engine's environment."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm_omni.diffusion import compile as engine_compile
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

from porter.verify.manifest import read_manifest
from porter.verify.ports import load_class

GENERATED = Path(__file__).resolve().parents[2] / "generated"
SUBJECTS = ("StableDiffusion3Pipeline", "WanPipeline")  # one denoiser; two, of which one may be absent


class Block(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Denoiser(torch.nn.Module):
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch is asked to compile, by keyword; it stays as it is."""
    asked: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(engine_compile.torch, "compile", compile)
    return asked


def set_up(arch: str, monkeypatch: pytest.MonkeyPatch, *, cuda: bool, **options: Any) -> Denoiser:
    """A pipeline's denoiser after what the engine calls."""
    port = next(p for p in read_manifest(GENERATED).ports if p.arch == arch)
    cls = load_class(GENERATED, port.folder, str(port.module), arch)
    monkeypatch.setattr(sys.modules[cls.__module__], "current_omni_platform", SimpleNamespace(is_cuda=lambda: cuda))
    od_config = OmniDiffusionConfig(model="", model_class_name=arch, **options)
    denoiser = Denoiser()
    cls.setup_compile(
        SimpleNamespace(_dit_modules=cls._dit_modules, od_config=od_config, transformer=denoiser, transformer_2=None)
    )
    return denoiser


GRAPHS = {"additional_config": {"cuda_graphs": True}}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("arch", SUBJECTS)
def test_blocks_are_replayed_and_every_call_of_the_denoiser_is_an_iteration(arch, dynamic, compiled, monkeypatch):
    denoiser = set_up(arch, monkeypatch, cuda=True, diffusion_compile_dynamic=dynamic, **GRAPHS)
    assert compiled == [{"mode": "reduce-overhead", "dynamic": False}] * 2
    marked: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(None))
    assert denoiser(torch.zeros(1)).item() == 2.0 and len(marked) == 1
    denoiser(torch.zeros(1))
    assert len(marked) == 2


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("arch", SUBJECTS)
def test_unasked_the_engine_s_own_way_of_compiling_holds(arch, dynamic, compiled, monkeypatch):
    denoiser = set_up(arch, monkeypatch, cuda=True, diffusion_compile_dynamic=dynamic)
    assert compiled == [{"dynamic": dynamic}] * 2 and not denoiser._forward_pre_hooks


@pytest.mark.parametrize("arch", SUBJECTS)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_backend": "cache_dit"},
        {"enable_cpu_offload": True},
        {"enable_layerwise_offload": True},
        {"enable_distributed_layerwise_offload": True},
        {"enable_sleep_mode": True},
        {"parallel_config": DiffusionParallelConfig(tensor_parallel_size=2), "num_gpus": 2},
        {"parallel_config": DiffusionParallelConfig(ulysses_degree=2), "num_gpus": 2},
        {"parallel_config": DiffusionParallelConfig(cfg_parallel_size=2), "num_gpus": 2},
        {"cuda": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_replayed_that_others_move_or_keep_and_the_log_says_so(arch, options, compiled, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda _self, message, *_a, **_k: said.append(message))
    denoiser = set_up(arch, monkeypatch, **({"cuda": True} | GRAPHS | options))
    assert compiled == [{"dynamic": True}] * 2 and not denoiser._forward_pre_hooks
    assert any("No CUDA graphs" in text for text in said)


def test_a_whole_model_is_compiled_as_the_engine_does_it(compiled, monkeypatch):
    options = {"diffusion_compile_dynamic": False, "diffusion_compile_granularity": "full"}
    denoiser = set_up(SUBJECTS[0], monkeypatch, cuda=True, **options, **GRAPHS)
    assert compiled == [{"dynamic": False}] and not denoiser._forward_pre_hooks
