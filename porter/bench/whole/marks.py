"""Named moments of a request, on the stream of the device, and what of a pipeline sets them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from porter.bench.whole.phases import DECODE, ENCODE


class Marks:
    """Named moments, in the order of the device's stream; on the CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._found: list[tuple[str, Any]] = []

    def add(self, kind: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._found.append((kind, event))
        else:
            self._found.append((kind, time.perf_counter()))

    def times(self) -> list[tuple[str, float]]:
        """(kind, milliseconds since the first mark). Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        first = self._found[0][1]
        return [(k, first.elapsed_time(m) if self._cuda else 1000 * (m - first)) for k, m in self._found]


@contextlib.contextmanager
def watched(
    components: Mapping[str, Any], denoisers: Sequence[str], mark: Callable[[str], None], kept: dict[str, Any]
) -> Iterator[None]:
    """Mark what the components of a pipeline do. `kept` gets the scheduler's last result and everything that was decoded."""
    kept.update(latents=None, decoded=[])
    undo: list[Callable[[], None]] = []
    for name, component in components.items():
        if component is None:
            continue  # a pipeline of two denoisers may have one
        if name in denoisers:
            undo.append(component.register_forward_pre_hook(lambda *_: mark("call")).remove)
        elif _is_autoencoder(component):
            undo += [
                _marked(component, "encode", ENCODE, mark),
                _marked(component, "decode", DECODE, mark, kept["decoded"]),
            ]
        elif isinstance(component, torch.nn.Module) and "encoder" in name:
            undo.append(component.register_forward_pre_hook(lambda *_: mark(ENCODE)).remove)
    undo.append(_stepping(type(components["scheduler"]), mark, kept))
    try:
        yield
    finally:
        for each in undo:
            each()


def _is_autoencoder(component: Any) -> bool:
    return isinstance(component, torch.nn.Module) and all(hasattr(component, n) for n in ("encode", "decode"))


def _marked(
    component: Any, name: str, kind: str, mark: Callable[[str], None], outputs: list[Any] | None = None
) -> Callable[[], None]:
    original = getattr(component, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        mark(kind)
        result = original(*args, **kwargs)
        if outputs is not None:
            outputs.append(result[0] if isinstance(result, tuple) else getattr(result, "sample", result))
        return result

    setattr(component, name, method)
    return lambda: delattr(component, name)


def _stepping(scheduler: Any, mark: Callable[[str], None], kept: dict[str, Any]) -> Callable[[], None]:
    """On the class: a pipeline may step a copy of its scheduler."""
    original = scheduler.step

    @functools.wraps(original)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        kept["latents"] = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", result)
        mark("step")
        return result

    scheduler.step = step
    return lambda: setattr(scheduler, "step", original)
