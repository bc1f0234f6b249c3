"""The job that looks at replayed calls, over subjects whose faults are those of CUDA graphs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from porter.bench.judge import replayed_wrong  # noqa: E402
from porter.bench.worker import Bench  # noqa: E402


class Subject:
    """Gives what it gets and twice that, with one `fault` of replayed calls."""

    dtype = torch.bfloat16

    def __init__(self, fault: str) -> None:
        self.fault, self.memory, self.first = fault, torch.zeros(2, 8), None

    def context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def settle(self, case: str, inputs: dict[str, Any]) -> None: ...

    def fit(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        return (inputs,)

    def outputs(self, fitted: tuple[dict[str, Any], ...]) -> list[Any]:
        given = fitted[0]["hidden_states"].float()
        if self.fault == "inputs of the recording":
            self.first = given if self.first is None else self.first
            given = self.first
        doubled = 2 * given
        if self.fault == "memory of the next call":
            doubled = self.memory.copy_(doubled)
        if self.fault == "another result":
            self.memory += 1
            doubled = doubled + self.memory
        return [given, doubled]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", None),
        ("memory of the next call", "a result changes"),
        ("inputs of the recording", "other inputs"),
        ("another result", "differs from itself"),
    ],
)
def test_faults_of_replayed_calls_are_seen(fault: str, said: str | None, tmp_path: Path) -> None:
    torch.save(
        {"hidden_states": torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()}, tmp_path / "i.pt"
    )
    bench = Bench("engine", 0)
    bench.device, bench.subject = torch.device("cpu"), Subject(fault)
    found = replayed_wrong({"replays": {"a": bench.replays({"case": "a", "inputs": str(tmp_path / "i.pt")})}}, "a")
    assert found is None if said is None else said in (found or "")
