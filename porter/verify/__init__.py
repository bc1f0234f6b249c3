"""Verification of ports on the real engine beside Diffusers.

Importing this package imports neither torch nor the engine, so that a command line can say clearly what is missing.
`verify` is the door; the rungs are in `porter.verify.rungs`, one module each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from porter.verify.environment import EnvironmentProblem, check_environment
from porter.verify.outcome import CaseResult, RungResult, Status, VerifyError

if TYPE_CHECKING:
    from porter.verify.report import VerifyReport
    from porter.verify.run import verify

__all__ = [
    "CaseResult",
    "EnvironmentProblem",
    "RungResult",
    "Status",
    "VerifyError",
    "VerifyReport",
    "check_environment",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "verify":
        from porter.verify.run import verify

        return verify
    if name == "VerifyReport":
        from porter.verify.report import VerifyReport

        return VerifyReport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
