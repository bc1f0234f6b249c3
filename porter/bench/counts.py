"""Operations, bytes and tokens of one forward call, counted while it runs once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VIEWS = frozenset(
    {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze",
     "squeeze", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "as_strided", "empty", "empty_like"}
)  # fmt: skip


class ByteCounter(TorchDispatchMode):
    """Sums what each operator reads and writes, every operator on its own; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.moved += _size(args) + _size(kwargs) + _size(result)
        return result


def _size(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_size(v) for v in value)
    return 0


def count(
    module: torch.nn.Module, call: Callable[[], torch.Tensor], inputs: dict[str, Any]
) -> dict[str, float | int | None]:
    """`tflop` and, in GB: `operator_gb` (each operator of eager code on its own), `least_gb` (weights, inputs and output
    once). `tokens`: batch times the longest sequence that enters a repeated block."""
    tokens: list[int] = []
    hooks = [b.register_forward_pre_hook(_watch(tokens), with_kwargs=True) for b in repeated_blocks(module)]
    try:
        with warnings.catch_warnings(), FlopCounterMode(display=False) as flops, ByteCounter() as traffic:
            warnings.simplefilter("ignore")
            output = call()
    finally:
        for hook in hooks:
            hook.remove()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return {
        "tflop": flops.get_total_flops() / 1e12,
        "operator_gb": traffic.moved / 1e9,
        "least_gb": (weights + _size(inputs) + _size(output)) / 1e9,
        "tokens": max(tokens, default=0) or None,
    }


def repeated_blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The elements of the module's own lists of blocks, those of inner lists left out."""
    return [b for child in module.children() if isinstance(child, torch.nn.ModuleList) for b in child]


def _watch(seen: list[int]) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        ordered = [kwargs[k] for k in ("hidden_states",) if k in kwargs] + list(args) + list(kwargs.values())
        for value in ordered:
            if torch.is_tensor(value) and value.dim() >= 3:
                seen.append(value.shape[0] * value.shape[1] if value.dim() == 3 else value[:, 0].numel())
                return

    return hook


def sequence_of(module: torch.nn.Module, call: Callable[[], object]) -> int:
    """The largest number of tokens (with the batch) that one of the repeated blocks receives during `call`."""
    tokens: list[int] = []
    hooks = [b.register_forward_pre_hook(_watch(tokens), with_kwargs=True) for b in repeated_blocks(module)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return max(tokens, default=0)
