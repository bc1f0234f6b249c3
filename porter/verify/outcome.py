"""What a rung returns: frozen results, one per case and one per rung. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


class Again(StrEnum):
    """Which rungs of a class a sweep runs: those not proven for its code, those it knows nothing about, or all."""

    unproven = "unproven"
    unknown = "unknown"
    all = "all"


ALL_RUNS = "all runs"
"""Name of the result that sums up the runs of all cases."""

PRE_PROCESS = "pre-process"
"""Name of the result that says whether media were prepared before they reached the worker."""

BOUND = 1e-5
"""Largest relative L2 error of a float32 comparison. A correct port is bit-exact or near 1e-6."""


class VerifyError(Exception):
    """Verification could not be carried out. `advice` says what to do about it, `code` names an entry of the catalogue."""

    def __init__(self, message: str, advice: str = "", code: str = "") -> None:
        super().__init__(message if not advice else f"{message}\n  {advice}")
        self.message = message
        self.advice = advice
        self.code = code


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One comparison. `figures` are plain numbers or short texts; `where` names the place of a fault when known."""

    name: str
    status: Status
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    where: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RungResult:
    """All cases of one rung for one subject (a denoiser or a pipeline class name).

    `seconds` is work without imports. `reason` explains a skip.
    """

    rung: str
    subject: str
    status: Status
    cases: tuple[CaseResult, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    @property
    def worst(self) -> float | None:
        """Largest relative L2 error among the cases, None where no case has one."""
        errors = [c.figures["rel_l2"] for c in self.cases if isinstance(c.figures.get("rel_l2"), float)]
        return max(errors) if errors else None

    def failures(self) -> tuple[CaseResult, ...]:
        return tuple(c for c in self.cases if c.status == "failed")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"worst_rel_l2": self.worst}


def rung_of(rung: str, subject: str, cases: list[CaseResult], seconds: float) -> RungResult:
    """Sum cases up: failed if one failed, skipped if none ran."""
    states = {c.status for c in cases}
    if not cases:
        return RungResult(rung, subject, "skipped", (), seconds, "no case")
    status: Status = "failed" if "failed" in states else "passed" if "passed" in states else "skipped"
    reason = next((c.message for c in cases if c.status == "skipped"), "") if status == "skipped" else ""
    return RungResult(rung, subject, status, tuple(cases), seconds, reason)


def skipped(rung: str, subject: str, reason: str) -> RungResult:
    return RungResult(rung, subject, "skipped", reason=reason)
