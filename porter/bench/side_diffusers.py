"""The Diffusers side: a denoiser built as `from_pretrained` does, eager or compiled by blocks. No port; no engine, either,
but for the adapter's side, which is the same class in a process of the engine."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from porter.bench import clock, compiled
from porter.bench.counts import repeated_blocks
from porter.bench.inputs import first_tensor
from porter.bench.weights import random_weight

SHARE_OF_MEMORY = 0.6
"""A float32 reference that needs more than this keeps its blocks in bfloat16 and widens one at a time."""


class DiffusersSubject:
    """A Diffusers denoiser on a device. `facts` say how it was built and what a run chose."""

    def __init__(self, job: Mapping[str, Any], device: torch.device) -> None:
        import diffusers

        self.device = device
        self.reference = bool(job.get("reference"))
        self.dtype = torch.float32 if self.reference else torch.bfloat16
        self.facts: dict[str, Any] = {}
        self._compile = bool(job.get("compile"))
        self._options: dict[str, Any] = {"dynamic": bool(job.get("dynamic")), **(job.get("compile_options") or {})}
        self._first = bool(job.get("first_backend"))
        self._backends: list[str] = list(job.get("backends") or (adapter_backends() if self._first else ["native"]))
        self._chosen: dict[str, str] = {}
        if self.reference:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        cls = getattr(diffusers, job["denoiser"])
        self.model = self._build(cls, job["config"])
        self.facts["parameters"] = sum(p.numel() for p in self.model.parameters())
        if job.get("buffers"):
            names = {n for n, _ in self.model.named_parameters()}
            state = {n: t.cpu() for n, t in self.model.state_dict().items() if n not in names}
            torch.save(state, job["buffers"])
        if self._compile:
            torch._dynamo.config.recompile_limit = 64
            self._compile_blocks(fullgraph=True)

    def _build(self, cls: Any, config: Mapping[str, Any]) -> torch.nn.Module:
        """Parameters in the wanted dtype; those that the class keeps in float32 in float32; buffers as it makes them."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with parameters_on_meta(), self.device:
                model = cls(**config).eval()
        finally:
            torch.set_default_dtype(before)
        keep = tuple(cls._keep_in_fp32_modules or ())
        if not self.reference and not keep:
            model.to(self.dtype)
        narrow = self.reference and self._too_large(model)
        blocks = {id(p) for b in repeated_blocks(model) for p in b.parameters()} if narrow else set()
        for name, owner, key in list(owners(model)):
            wide = any(part in name.split(".") for part in keep)
            dtype = torch.bfloat16 if id(owner._parameters[key]) in blocks else torch.float32 if wide else self.dtype
            weight = random_weight(name, owner._parameters[key].shape, self.device).to(dtype)
            # As `from_pretrained` leaves them: it decides whether torch copies a transposed input before a linear layer.
            owner._parameters[key] = torch.nn.Parameter(weight)
        if narrow:
            self.facts["reference"] = "blocks are stored in bfloat16 and widened to float32 one at a time"
            for block in repeated_blocks(model):
                block.register_forward_pre_hook(_widen)
                block.register_forward_hook(_narrow)
        return model

    def _too_large(self, model: torch.nn.Module) -> bool:
        if self.device.type != "cuda":
            return False
        needed = 4 * sum(p.numel() for p in model.parameters())
        return needed > SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.device)[0]

    def _compile_blocks(self, *, fullgraph: bool) -> None:
        model: Any = self.model
        if not getattr(model, "_repeated_blocks", None):
            model._repeated_blocks = sorted({type(b).__name__ for b in repeated_blocks(model)})
            self.facts["compiled_blocks"] = "the class names none; those of its module lists are compiled"
        model.compile_repeated_blocks(fullgraph=fullgraph, **self._options)
        self.facts["fullgraph"] = fullgraph

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def fit(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return inputs

    def call(self, fitted: Mapping[str, Any]) -> torch.Tensor:
        return first_tensor(self.model(**fitted, return_dict=False))

    def settle(self, case: str, inputs: Mapping[str, Any]) -> None:
        """Choose the fastest attention that takes these inputs; a graph that can't be whole may break."""
        if case in self._chosen:
            self._set(self._chosen[case])
            return
        times, refused = self._tried(inputs)
        if not times and self._compile and self.facts["fullgraph"]:
            self.facts["fullgraph_refused"] = f"whole graphs are refused: {refused}"
            compiled.forget()
            self._compile_blocks(fullgraph=False)
            times, refused = self._tried(inputs)
        if not times:
            raise RuntimeError(f"no attention backend of Diffusers runs {case}: {refused}")
        self._chosen[case] = min(times, key=lambda b: times[b])
        self._set(self._chosen[case])
        self.facts.setdefault("backends", {})[case] = {
            "chosen": self._chosen[case], "ms": {b: round(t, 3) for b, t in times.items()}, "refused": refused
        }  # fmt: skip

    def _tried(self, inputs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
        """Milliseconds by backend, and why others refuse. What was fastest for one case serves the next if it can."""
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        for backend in sorted(self._backends, key=lambda b: b not in self._chosen.values()):
            if times and (self._chosen or self._first):
                break
            try:
                self._set(backend)
                self.call(inputs)
                several = len(self._backends) > 1 and not self._first
                times[backend] = (
                    statistics.median(clock.spans(lambda: self.call(inputs), 4, self.device)) if several else 0.0
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # noqa: BLE001 - a backend that refuses is a finding
                refused[backend] = f"{type(problem).__name__}: {str(problem)[:300]}"
        return times, refused

    def _set(self, backend: str) -> None:
        if self.device.type == "cuda" and not self.reference:
            self.model.set_attention_backend(backend)

    def close(self) -> None:
        del self.model


def adapter_backends() -> list[str]:
    """Attention backends in the order in which the engine's adapter tries them; it keeps the first that can be set."""
    from vllm_omni.diffusion.models.diffusers_adapter import pipeline_diffusers_adapter as adapter

    return [*adapter.CUDA_FLASH_ATTENTION_BACKEND_ATTEMPTS, "native"]


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and real buffers."""
    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        moved = None if param is None else torch.nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, moved)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def owners(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Every parameter as (full name, module that holds it, name there)."""
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}" if prefix else key, module, key


def _widen(module: torch.nn.Module, _args: Any) -> None:
    for _, owner, key in owners(module):
        owner._parameters[key].data = owner._parameters[key].data.float()  # type: ignore[union-attr]


def _narrow(module: torch.nn.Module, _args: Any, _output: Any) -> None:
    for _, owner, key in owners(module):
        owner._parameters[key].data = owner._parameters[key].data.to(torch.bfloat16)  # type: ignore[union-attr]
