"""One initialised vLLM-Omni environment: configs, process groups, forward contexts, and what is done inside them.

Import only in a process where `platform.bootstrap.activate` ran (or that was started with its environment).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from porter.verify.probes import tensors_of


@dataclass(frozen=True, slots=True)
class LoadAccount:
    """What `load_weights` did. Names are engine parameter names, except `offered` (Diffusers names)."""

    offered: int
    reported: tuple[str, ...]
    missing: tuple[str, ...]
    not_parameters: tuple[str, ...]
    parameters: int
    elements: int


class Session:
    """Contexts of one od_config; made by `session`."""

    def __init__(self, od_config: Any, vllm_config: Any, device: torch.device) -> None:
        self.od_config, self.vllm_config, self.device = od_config, vllm_config, device

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        from vllm_omni.diffusion.forward_context import set_forward_context

        return set_forward_context(vllm_config=self.vllm_config, omni_diffusion_config=self.od_config)

    @contextlib.contextmanager
    def build_context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype
        from vllm_omni.diffusion.config import set_current_diffusion_config

        with (
            self.forward_context(),
            set_current_vllm_config(self.vllm_config),
            set_default_torch_dtype(self.od_config.dtype),
            set_current_diffusion_config(self.od_config),
            self.device,
        ):
            yield

    def build(self, cls: Callable[..., torch.nn.Module], config: Mapping[str, Any]) -> torch.nn.Module:
        """Construct a denoiser as a port's pipeline does."""
        with self.build_context():
            return cls(od_config=self.od_config, quant_config=None, prefix="transformer", **config).eval()

    def load(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> LoadAccount:
        """NaN-fill the parameters, load through the port's own `load_weights`, run the engine's post-load hooks.

        A parameter (or any element of it) that is NaN afterwards was not loaded.
        """
        names = {n for n, _ in module.named_parameters()}
        fill(module, float("nan"))
        reported = self.load_only(module, weights)
        missing = tuple(n for n, p in module.named_parameters() if torch.isnan(p).any())
        count = sum(p.numel() for p in module.parameters())
        self.after_loading(module)
        return LoadAccount(
            len(weights), tuple(sorted(reported)), missing, tuple(sorted(set(reported) - names)), len(names), count
        )

    def after_loading(self, module: torch.nn.Module) -> None:
        """The engine's post-load hooks of quantised and plain layers."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        with self.build_context():
            for child in module.modules():
                method = getattr(child, "quant_method", None)
                if isinstance(method, QuantizeMethodBase):
                    method.process_weights_after_loading(child)

    def load_only(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> set[str]:
        """Call the port's `load_weights` and return what it says it loaded."""
        with self.build_context():
            return set(module.load_weights(iter([(n, w.clone()) for n, w in weights.items()])) or ())

    def call(self, module: torch.nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Every tensor that the denoiser returns for keyword inputs, in order. The context is a new one, as the runner's."""
        with torch.no_grad(), self.forward_context():
            return tensors_of(module(**inputs))


def fill(module: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def _choose_kernels(od_config: Any, vllm_config: Any) -> None:
    """The kernels that a worker chooses for its platform; without this the engine's fused operators stay unused."""
    from vllm_omni.diffusion.worker import diffusion_worker
    from vllm_omni.platforms import current_omni_platform

    vllm_config.kernel_config.ir_op_priority = diffusion_worker._resolve_ir_op_priority(od_config, vllm_config)
    current_omni_platform.init_diffusion_worker_vllm_config(vllm_config)


@contextlib.contextmanager
def session(
    model_class_name: str,
    *,
    rank: int = 0,
    world: int = 1,
    port: int,
    model: str = "",
    config: Mapping[str, Any] | None = None,
    parallel: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Iterator[Session]:
    """Configure the engine and its process groups as `DiffusionWorker.init_device` does, and take them down again."""
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig, TransformerConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    od = OmniDiffusionConfig(
        model=model,
        model_class_name=model_class_name,
        dtype=dtype,
        num_gpus=world,
        enforce_eager=True,
        tf_model_config=TransformerConfig.from_dict(dict(config or {})),
        parallel_config=DiffusionParallelConfig(**dict(parallel or {})),
        **options,
    )
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    if model:
        od.enrich_config()
    device = device_of(rank)
    vllm_config = create_diffusion_vllm_config(device, od)
    if device.type == "cuda":
        _choose_kernels(od, vllm_config)
    groups = od.parallel_config
    with set_forward_context(vllm_config=vllm_config, omni_diffusion_config=od), set_current_vllm_config(vllm_config):
        parallel_state.init_distributed_environment(world_size=world, rank=rank)
        parallel_state.initialize_model_parallel(
            data_parallel_size=groups.data_parallel_size,
            cfg_parallel_size=groups.cfg_parallel_size,
            sequence_parallel_size=groups.sequence_parallel_size,
            ulysses_degree=groups.ulysses_degree,
            ring_degree=groups.ring_degree,
            allgather_degree=groups.allgather_degree,
            tensor_parallel_size=groups.tensor_parallel_size,
            pipeline_parallel_size=groups.pipeline_parallel_size,
        )
    try:
        yield Session(od, vllm_config, device)
    finally:
        parallel_state.destroy_distributed_env()
