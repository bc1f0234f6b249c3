"""A generated port, or the engine's own pipeline, in the engine's runner, loaded as its worker loads it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from porter.bench import compiled
from porter.bench.side_engine import flash_attention
from porter.bench.whole.components import random_components
from porter.verify import engine_pipeline
from porter.verify.engine_requests import requests_of


class EnginePipeline:
    """A runner that loaded a pipeline with random components. Weights that are missing raise, by the engine's own check."""

    def __init__(self, job: Mapping[str, Any], device: torch.device) -> None:
        import vllm_omni.diffusion.model_loader.diffusers_loader  # noqa: F401 - its weights are drawn, too

        self.device = device
        self.denoisers = tuple(job["denoisers"])
        self._stack = contextlib.ExitStack()
        try:
            with random_components(device):
                self.session, self.runner = self._stack.enter_context(engine_pipeline.loaded(job))
        except BaseException:
            self._stack.close()
            raise
        self.pipe: Any = self.runner.pipeline
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(disable=True)
        modules = list(self.pipe.modules())
        self.facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.pipe.parameters()),
            "backend": sorted({m.attn_backend.get_name() for m in modules if hasattr(m, "attn_backend")}),
            "flash_attention": flash_attention(),
        }

    def components(self) -> Mapping[str, Any]:
        return {"scheduler": self.pipe.scheduler, **dict(self.pipe.named_children())}

    def serve(self, call: Mapping[str, Any]) -> None:
        """Through the runner: one request for each prompt, in one batch where the pipeline takes one."""
        from vllm_omni.diffusion.registry import get_diffusion_pre_process_func

        requests, _ = requests_of({**call, "kwargs": {"output_type": "pt", **call["kwargs"]}})
        prepare = get_diffusion_pre_process_func(self.session.od_config)
        if prepare is not None:
            requests = [prepare(r) or r for r in requests]
        for result in engine_pipeline.request_mode(self.runner, requests, batched=len(requests) > 1):
            engine_pipeline.tensor_of(result)

    def compile(self, options: Mapping[str, Any]) -> None:
        """As the runner does when it is not told to stay eager; on the CPU with the options of a dry run. What an earlier
        mode compiled is compiled anew."""
        from vllm_omni.diffusion.compile import regionally_compile

        options = dict(options)
        od_config = self.session.od_config
        dynamic = od_config.diffusion_compile_dynamic = options.pop("dynamic", True)
        od_config.additional_config["cuda_graphs"] = options.pop("graphs", False)
        compiled.undo(self.pipe)
        if not options and hasattr(self.pipe, "setup_compile"):
            self.pipe.setup_compile()
            return
        for name in getattr(self.pipe, "_dit_modules", None) or self.denoisers:
            if (model := getattr(self.pipe, name, None)) is not None:
                setattr(self.pipe, name, regionally_compile(model, dynamic=dynamic, **options))

    def settle(self, case: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Nothing to choose: the engine's platform has chosen."""
        return run()

    def close(self) -> None:
        del self.pipe, self.runner
        self._stack.close()
