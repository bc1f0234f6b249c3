"""Phases of one request, from named moments. No torch here: reports name the phases, too.

Phases follow each other without a gap: a request encodes until its first denoiser call, denoises until the scheduler's last
step, and decodes until it ends. Several requests that are served one after the other add up.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"
PHASES = (ENCODE, DENOISE, DECODE)


@dataclass(frozen=True, slots=True)
class Split:
    """Milliseconds of a request by phase, and of each step."""

    encode: float
    denoise: float
    decode: float
    steps: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        found = {k: round(v, 4) if isinstance(v, float) else [round(s, 4) for s in v] for k, v in asdict(self).items()}
        total = self.encode + self.denoise + self.decode
        return found | {
            "total": round(total, 4),
            "step": round(statistics.median(self.steps), 4) if self.steps else None,
        }


def split(times: Sequence[tuple[str, float]]) -> Split:
    """Phases of a request from its marks: `call` of a denoiser, `step` of a scheduler, begin of an `encode` or `decode`.

    The first mark is the beginning, the last the end. An encoder that runs between a denoiser's call and its step belongs to
    the step.
    """
    spent = dict.fromkeys(PHASES, 0.0)
    phase, since, stepped = ENCODE, times[0][1], times[0][1]
    open_step = False
    steps: list[float] = []
    for kind, at in times[1:-1]:
        if kind == "call":
            open_step = True
            if phase != DENOISE:
                spent[phase] += at - since
                phase, since, stepped = DENOISE, at, at
        elif kind == "step":
            if phase == DENOISE:
                steps.append(at - stepped)
                stepped, open_step = at, False
        elif phase == DENOISE and (kind == DECODE or not open_step):
            done = at if open_step else stepped
            spent[DENOISE] += done - since
            phase, since, open_step = kind, done, False
        elif phase != DENOISE and phase != kind:
            spent[phase] += at - since
            phase, since = kind, at
    end = times[-1][1]
    if phase == DENOISE and not open_step:
        spent[DENOISE] += stepped - since
        phase, since = DECODE, stepped
    spent[phase] += end - since
    return Split(spent[ENCODE], spent[DENOISE], spent[DECODE], steps)
