"""The engine side: a generated port or the engine's own hand-written one, in the engine's own groups and contexts."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from porter.bench import compiled
from porter.bench.inputs import first_tensor, other_text, tensors_in
from porter.bench.weights import checkpoint
from porter.verify import engine_session
from porter.verify.ports import load_class

GUIDANCE = 4.0


class EngineSubject:
    """A denoiser inside one configured engine environment. Missing weights raise."""

    def __init__(self, job: Mapping[str, Any], device: torch.device) -> None:
        self.device, self.dtype = device, torch.bfloat16
        self.facts: dict[str, Any] = {}
        self._hand: Mapping[str, Any] | None = job.get("hand")
        self._parallel: Mapping[str, Any] = job.get("parallel") or {}
        self._guided = bool(job.get("guided"))
        self._marks: Any = None
        self._stack = contextlib.ExitStack()
        shapes, config = _reference_of(job["denoiser"], job["config"])
        try:
            self.session = self._stack.enter_context(
                engine_session.session(
                    job["arch"], rank=job["rank"], world=job["world"], port=job["port"], config=config,
                    parallel=self._parallel, dtype=self.dtype, diffusion_compile_dynamic=job.get("dynamic", True),
                )
            )  # fmt: skip
            self.model = self._build(job, config)
            self._load(shapes, torch.load(job["buffers"], weights_only=True) if job.get("buffers") else {})
            self._shard_sequence()
            if job.get("compile"):
                self._compile(dict(job.get("compile_options") or {}))
        except BaseException:
            self._stack.close()
            raise
        self.branches = _branches(self.model) if self._guided else None

    def _build(self, job: Mapping[str, Any], config: Mapping[str, Any]) -> torch.nn.Module:
        if self._hand is None:
            cls: Any = load_class(job["generated"], job["folder"], job["module"], job["class"])
            return self.session.build(cls, job["config"])
        cls = getattr(importlib.import_module(self._hand["module"]), self._hand["class"])
        known = inspect.signature(cls).parameters
        kwargs = {k: v for k, v in config.items() if k in known} if "config" in self._hand["constructor"] else {}
        if "od_config" in self._hand["constructor"]:
            kwargs["od_config"] = self.session.od_config
        with self.session.build_context():
            return cls(**kwargs).eval()

    def _load(self, shapes: dict[str, torch.Size], buffers: dict[str, torch.Tensor]) -> None:
        """Fill with NaN, load through the port's own `load_weights`; what is NaN afterwards is missing."""
        engine_session.fill(self.model, float("nan"))
        offered = {n: s for n, s in shapes.items() if self._hand is None or n not in buffers}
        with self.session.build_context():
            self.model.load_weights(checkpoint(offered, buffers, self.device))  # type: ignore[operator]
        missing = [n for n, p in self.model.named_parameters() if torch.isnan(p).any()]
        if missing:
            raise RuntimeError(f"{len(missing)} parameters were not loaded: {', '.join(missing[:6])}")
        self.session.after_loading(self.model)
        backends = {m.attn_backend.get_name() for m in self.model.modules() if hasattr(m, "attn_backend")}
        self.facts |= {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "offered": len(offered),
            "missing": 0,
            "backend": sorted(backends),
            "flash_attention": flash_attention(),
        }

    def _shard_sequence(self) -> None:
        """Apply the engine's sequence-parallel hooks; the engine swallows a failure, so what it did is looked at."""
        if self.session.od_config.parallel_config.sequence_parallel_size <= 1:
            return
        from vllm_omni.diffusion.forward_context import get_forward_context
        from vllm_omni.diffusion.registry import _apply_sequence_parallel_if_enabled

        if not getattr(self.model, "_sp_plan", None):
            raise RuntimeError("the class declares no _sp_plan: it has no sequence parallelism")
        holder = torch.nn.Module()
        holder.transformer = self.model
        with self.session.forward_context():
            _apply_sequence_parallel_if_enabled(holder, self.session.od_config)
            if not get_forward_context().sp_plan_hooks_applied:
                raise RuntimeError("the engine applied no sequence-parallel hook")

    def _compile(self, options: dict[str, Any]) -> None:
        from vllm_omni.diffusion.compile import regionally_compile

        dynamic = self.session.od_config.diffusion_compile_dynamic
        if self._marks is not None:
            self._marks.remove()
            self._marks = None
        if options.pop("graphs", False):  # as the pipeline of a port does it
            dynamic, options["mode"] = False, "reduce-overhead"
            self._marks = self.model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        regionally_compile(self.model, dynamic=dynamic, **options)

    def compile(self, options: dict[str, Any]) -> None:
        """Compile what was built for eager use, or compiled in another mode."""
        compiled.undo(self.model)
        self._compile(options)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The runner's: a fresh forward context, in which all attention counts as divided where there is a plan."""
        with torch.inference_mode(), self.session.forward_context():
            yield

    def settle(self, case: str, inputs: Mapping[str, Any]) -> None:
        """Nothing to choose: the engine's platform has chosen."""

    def fit(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """Inputs as the class takes them, one set per guidance branch; done once, outside of what is timed."""
        given = dict(inputs)
        return tuple(self._fitted(i) for i in ((given, other_text(given)) if self._guided else (given,)))

    def call(self, fitted: tuple[dict[str, Any], ...]) -> torch.Tensor:
        """One forward call, or two branches through the engine's own guidance."""
        if self.branches is None:
            return first_tensor(self.model(**fitted[0]))
        return first_tensor(self.branches.predict_noise_maybe_with_cfg(True, GUIDANCE, *fitted, True))

    def outputs(self, fitted: tuple[dict[str, Any], ...]) -> list[torch.Tensor]:
        """Every tensor that one forward call returns: the tensors themselves, no copies."""
        return tensors_in(self.model(**fitted[0]))

    def _fitted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs under the names of a hand-written class: what it adds is derived. Raises TypeError for what it lacks."""
        if self._hand is None:
            return dict(inputs)
        known = inspect.signature(type(self.model).forward).parameters
        given = {k: v for k, v in inputs.items() if k in known}
        if lost := [k for k, v in inputs.items() if k not in known and v is not None]:
            raise TypeError(f"the hand-written class takes no {', '.join(lost)}")
        for name, meaning in self._hand.get("derived", {}).items():
            given[name] = DERIVED[meaning](inputs)
        return given

    def close(self) -> None:
        del self.model, self.branches
        self._stack.close()


def _text_lengths(inputs: Mapping[str, Any]) -> list[int]:
    text, mask = inputs["encoder_hidden_states"], inputs.get("encoder_hidden_states_mask")
    return mask.sum(dim=1).tolist() if mask is not None else [text.shape[1]] * text.shape[0]


DERIVED = {"text_lengths": _text_lengths}
"""What a hand-written class may want beside Diffusers' inputs (benchmarks/hand_ports.yaml, `derived`)."""


def _reference_of(denoiser: str, config: Mapping[str, Any]) -> tuple[dict[str, torch.Size], dict[str, Any]]:
    """Names and shapes of a checkpoint's tensors, and the whole configuration, from Diffusers' class without weights."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, denoiser)(**config)
    whole = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    return {n: t.shape for n, t in model.state_dict().items()}, whole


def _branches(model: torch.nn.Module) -> Any:
    """The engine's own guidance over two ranks (or one after the other on one), around the denoiser alone."""
    from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin

    class Branches(CFGParallelMixin):
        transformer = staticmethod(model)

        def predict_noise(self, **kwargs: Any) -> torch.Tensor:
            return first_tensor(model(**kwargs))

    return Branches()


def flash_attention() -> str | None:
    """The module whose FlashAttention the engine found, if any."""
    try:
        from vllm_omni.diffusion.attention.backends.utils import fa
    except ImportError:
        return None
    function = getattr(fa, "flash_attn_func", None) or getattr(fa, "flash_attn_varlen_func", None)
    return getattr(function, "__module__", None) if function else None
