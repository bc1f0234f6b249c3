"""What Cache-DiT should give, worked out without it: later steps compute the first block of each list, and add what the other
blocks added in the last step that was computed in full, of the same guidance branch (DBCache with F1B0)."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch


class _Steps:
    """Which step of which loop a call of the denoiser belongs to. Where a time comes again, other times between, a loop has
    begun: another window of the same request, or another request."""

    def __init__(self, steps_done: Callable[[], int]) -> None:
        self.steps_done, self.seen, self.loop = steps_done, -1, 0
        self.times: list[float | None] = []

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """To be called before each call of the denoiser; several calls before the scheduler's next step are one step."""
        done = self.steps_done()
        if done == self.seen:
            return
        self.seen = done
        time = time_of(module, args, kwargs)
        if time is not None and time in self.times[:-1] and time != self.times[-1]:
            self.loop, self.times = self.loop + 1, []
        self.times.append(time)

    @property
    def place(self) -> tuple[int, int]:
        return self.loop, len(self.times) - 1


def time_of(module: torch.nn.Module, args: Any, kwargs: Any) -> float | None:
    """The time that a call of a denoiser is given, the latest where there are several; None if no argument is called so."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    value = next((given[n] for n in ("timestep", "timesteps", "t") if torch.is_tensor(given.get(n))), None)
    return None if value is None else value.max().item()


class _List:
    """One list of blocks, and what it knows of the step that runs. Branches are told apart by their place in the step."""

    def __init__(self, blocks: torch.nn.ModuleList, warmup: int, steps: _Steps) -> None:
        self.blocks, self.warmup, self.steps = blocks, warmup, steps
        self.step = self.branch = -1
        self.place: tuple[int, int] | None = None
        self.first: Any = None
        self.added: dict[int, list[torch.Tensor | None]] = {}

    def _begin(self) -> None:
        if self.place is None or self.steps.place[0] != self.place[0]:
            self.added = {}
        if self.steps.place != self.place:
            self.place, self.branch = self.steps.place, -1
        self.step = self.steps.place[1]
        self.branch += 1

    def forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What block `index` gives in place of `original`."""
        if index == 0:
            self._begin()
            self.first = original(*args, **kwargs)
            return self.first
        last = index == len(self.blocks) - 1
        if self.step < self.warmup:
            out = original(*args, **kwargs)
            if last:
                pairs = zip(_parts(out), _parts(self.first), strict=True)
                self.added[self.branch] = [None if a is None or b is None else a - b for a, b in pairs]
            return out
        if not last:
            return self.first
        pairs = zip(_parts(self.first), self.added[self.branch], strict=True)
        whole = [a if b is None else a + b for a, b in pairs]
        return whole[0] if torch.is_tensor(self.first) else tuple(whole)


def _parts(value: Any) -> list[torch.Tensor | None]:
    """What a block returns; the last one may return nothing for a text that nobody reads."""
    return [value] if torch.is_tensor(value) else list(value)


def lists_of(model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The lists of blocks that a denoiser offers to Cache-DiT; none where it offers nothing."""
    declared = getattr(model, "_cache_dit_adapter_config", None)
    return {} if declared is None else {n: getattr(model, n) for n in declared.block_forward_patterns}


@contextlib.contextmanager
def reusing(models: list[torch.nn.Module], warmup: int, steps_done: Callable[[], int]) -> Iterator[None]:
    """Within, blocks of the models work as Cache-DiT should make them work after `warmup` steps in full."""
    with contextlib.ExitStack() as stack:
        for model in models:
            steps = _Steps(steps_done)
            stack.enter_context(_hooked(model, steps.before))
            for blocks in lists_of(model).values():
                found = _List(blocks, warmup, steps)
                for index, block in enumerate(blocks):
                    stack.enter_context(_instead(block, functools.partial(found.forward, index, block.forward)))
        yield


@contextlib.contextmanager
def _hooked(model: torch.nn.Module, before: Callable[..., None]) -> Iterator[None]:
    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def counted(models: list[torch.nn.Module]) -> Iterator[dict[str, int]]:
    """Within, how often the blocks of the models compute: those that come first in their list, and the others."""
    counts = {"first": 0, "others": 0}

    def forward(kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts[kind] += 1
        return original(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for model in models:
            for blocks in lists_of(model).values():
                for index, block in enumerate(blocks):
                    kind = "others" if index else "first"
                    stack.enter_context(_instead(block, functools.partial(forward, kind, block.forward)))
        yield counts


@contextlib.contextmanager
def _instead(block: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the block computes something else."""
    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
