"""What rung `cache` makes of the records of one request: without Cache-DiT, by hand, and with it."""

from __future__ import annotations

from typing import Any

import pytest

from porter.verify.pipeline_spec import RequestCase
from porter.verify.rungs.cache import _reused, _two_requests

torch = pytest.importorskip("torch")


def found(*, steps: int = 4, blocks: int = 12, computed: int = 3, by_hand: int = 3, off: float = 0.0) -> dict[str, Any]:
    def record(others: int, value: float) -> dict[str, Any]:
        return {"steps": [0] * steps, "calls": steps, "blocks": {"first": steps, "others": others}, "error": None,
                "output": torch.full((2, 2), value)}  # fmt: skip

    return {"plain": record(blocks, 5.0), "by_hand": record(by_hand, 1.0), "reused": record(computed, 1.0 + off)}


@pytest.mark.parametrize(
    ("records", "status", "said"),
    [
        (found(), "passed", ""),
        (found(off=1e-3), "failed", "worked out without Cache-DiT"),
        (found(computed=6), "failed", "blocks computed"),
        (found(computed=12, by_hand=12), "failed", "nothing was reused"),
        (found(steps=1), "skipped", "nothing to reuse"),
        (found(blocks=0, computed=0, by_hand=0), "skipped", "nothing to reuse"),
    ],
)
def test_a_request_passes_only_if_something_was_reused_and_rightly(
    records: dict[str, Any], status: str, said: str
) -> None:
    result = _reused(RequestCase("plain", {}), records)
    assert result.status == status and said in result.message


def test_an_error_of_any_run_fails_the_request() -> None:
    records = found()
    records["by_hand"]["error"] = {"type": "ValueError", "message": "no", "trace": ""}
    assert _reused(RequestCase("plain", {}), records).status == "failed"


def asked(calls: int, value: float, error: str = "") -> dict[str, Any]:
    problem = {"type": "NotImplementedError", "message": error, "trace": ""} if error else None
    return {"calls": calls, "error": problem, "each": [[torch.full((2, 2), value)]]}


@pytest.mark.parametrize(
    ("calls", "second", "error", "name", "status"),
    [
        (8, 2.0, "", "one after the other", "passed"),
        (4, 2.0, "", "in one loop", "passed"),
        (8, 2.1, "", "one after the other", "failed"),
        (4, 2.0, "Cache-DiT is on, and no", "in one loop", "skipped"),
        (8, 2.0, "no such thing", "one after the other", "failed"),
    ],
)
def test_two_requests_of_a_batch_give_what_each_gives_alone(
    calls: int, second: float, error: str, name: str, status: str
) -> None:
    alone = [asked(4, 1.0), asked(4, 2.0)]
    both = asked(calls, 1.0, error) | {"each": [[torch.full((2, 2), 1.0)], [torch.full((2, 2), second)]]}
    result = _two_requests(both, alone)
    assert result.status == status and name in result.name
