"""Diffusers' pipeline with random components, eager or with its denoisers compiled by blocks. No port, no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from porter.bench import compiled
from porter.bench.counts import repeated_blocks
from porter.bench.whole.components import random_components
from porter.verify.stand_ins import provide_noted

NATIVE = "native"


class DiffusersPipeline:
    """As `from_pretrained(torch_dtype=torch.bfloat16).to(device)` gives it."""

    def __init__(self, job: Mapping[str, Any], device: torch.device) -> None:
        import diffusers

        provide_noted(job["checkpoint"])
        self.device = device
        self.denoisers = tuple(job["denoisers"])
        self._backends: tuple[str, ...] = (NATIVE,)
        self._options: dict[str, Any] = {}
        self._compiled = self._fullgraph = False
        self._chosen: dict[str, str] = {}
        with random_components(device):
            cls = getattr(diffusers, job["pipeline"])
            self.pipe = cls.from_pretrained(job["checkpoint"], torch_dtype=torch.bfloat16, local_files_only=True)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        models = [c for c in self.pipe.components.values() if isinstance(c, torch.nn.Module)]
        self.facts: dict[str, Any] = {"parameters": sum(p.numel() for m in models for p in m.parameters())}

    def components(self) -> Mapping[str, Any]:
        return self.pipe.components

    def serve(self, call: Mapping[str, Any]) -> None:
        seeds = call["seed"] if isinstance(call["seed"], list) else [call["seed"]]
        generators = [torch.Generator(self.device).manual_seed(s) for s in seeds]  # where the engine makes its own
        kwargs = {"output_type": "pt", **call["kwargs"]}
        self.pipe(**kwargs, generator=generators if len(seeds) > 1 else generators[0])

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile the repeated blocks as whole graphs, and prefer the attention `backends`."""
        self._backends = tuple(options.get("backends") or self._backends)
        self._options = {k: v for k, v in options.items() if k != "backends"}
        self._compiled = True
        torch._dynamo.config.recompile_limit = 64
        self._compile_blocks(fullgraph=True)

    def _compile_blocks(self, *, fullgraph: bool) -> None:
        for model in self._models():
            if not getattr(model, "_repeated_blocks", None):
                model._repeated_blocks = sorted({type(b).__name__ for b in repeated_blocks(model)})
                self.facts["compiled_blocks"] = "the class names none; those of its module lists are compiled"
            model.compile_repeated_blocks(fullgraph=fullgraph, **self._options)
        self._fullgraph = self.facts["fullgraph"] = fullgraph

    def settle(self, case: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run with the first attention that takes the case; a graph that can't be whole may break."""
        if case in self._chosen or not self._compiled:
            self._set(self._chosen.get(case, NATIVE))  # what another pipeline set stays set in the process
            return run()
        refused: dict[str, str] = {}
        found = self._tried(case, run, refused)
        if found is None and self._fullgraph:
            self.facts["fullgraph_refused"] = f"whole graphs are refused: {refused}"
            compiled.forget()
            self._compile_blocks(fullgraph=False)
            found = self._tried(case, run, refused)
        if found is None:
            raise RuntimeError(f"no attention backend of Diffusers runs {case}: {refused}")
        self.facts.setdefault("backends", {})[case] = {"chosen": self._chosen[case], "refused": refused}
        return found

    def _tried(self, case: str, run: Callable[[], dict[str, Any]], refused: dict[str, str]) -> dict[str, Any] | None:
        for backend in self._backends:
            try:
                self._set(backend)
                found = run()
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # noqa: BLE001 - a backend that refuses is a finding
                refused[backend] = f"{type(problem).__name__}: {str(problem)[:300]}"
            else:
                self._chosen[case] = backend
                return found
        return None

    def _set(self, backend: str) -> None:
        if self.device.type == "cuda":
            for model in self._models():
                model.set_attention_backend(backend)

    def _models(self) -> list[Any]:
        return [m for n in self.denoisers if (m := self.pipe.components.get(n)) is not None]

    def close(self) -> None:
        del self.pipe
