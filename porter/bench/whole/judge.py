"""What the figures of whole requests say: times by phase, and whether a port gives what Diffusers gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from porter.bench.sides import SIDES, same_mode
from porter.bench.whole.phases import PHASES

RATIO = 2.0
"""A port may be from Diffusers in the same mode by so many times what compiled Diffusers is from eager Diffusers: both are
bfloat16 roundings of one computation."""
NOISE = ("diffusers-tuned", "diffusers-eager")


@dataclass(frozen=True, slots=True)
class Times:
    """Median milliseconds of a side's requests of one case; `spread` is (largest - least) / median of the totals."""

    side: str
    encode: float
    denoise: float
    decode: float
    total: float
    step: float
    steps: int
    rounds: int
    spread: float | None
    peak_gib: float


@dataclass(frozen=True, slots=True)
class Apart:
    """Relative L2 distances of a side from Diffusers in the same mode. `good` is None where the noise is not known."""

    pipeline: str
    case: str
    side: str
    latents: float
    decoded: float | None
    noise: float | None
    good: bool | None


def times(row: Mapping[str, Any], case: str) -> dict[str, Times]:
    """Times of all sides that were timed, in the order of SIDES."""
    found = {}
    for name in SIDES:
        rounds = row["sides"].get(name, {}).get("rounds", {}).get(case)
        if rounds:
            found[name] = _times(name, rounds)
    return found


def _times(side: str, rounds: list[Mapping[str, Any]]) -> Times:
    totals = [r["total"] for r in rounds]
    steps = [s for r in rounds for s in r["steps"]]
    phases = {p: statistics.median(r[p] for r in rounds) for p in PHASES}
    total = statistics.median(totals)
    return Times(
        side, **phases, total=total, step=statistics.median(steps) if steps else math.nan, steps=len(rounds[0]["steps"]),
        rounds=len(rounds), spread=(max(totals) - min(totals)) / total if len(totals) > 1 else None,
        peak_gib=max(r["peak_gib"] for r in rounds),
    )  # fmt: skip


def distances(data: Mapping[str, Any]) -> Iterator[Apart]:
    """Every side of the engine that gave something to compare. Only ports are judged by it."""
    for pipeline, row in data.get("requests", {}).items():
        for case, sides in row["agreement"].items():
            noise = sides.get(NOISE[0], {}).get(NOISE[1], {}).get("latents")
            for side in SIDES:
                others = sides.get(side, {})
                apart = others.get(same_mode(side, others) or "")
                if apart is None:
                    continue
                latents = apart["latents"]
                # A dry run compiles with a backend that changes nothing: there is no noise to measure by.
                good = None if not noise else latents <= RATIO * noise
                if not math.isfinite(latents):
                    good = False
                yield Apart(pipeline, case, side, latents, apart.get("decoded"), noise, good)


def failed(data: Mapping[str, Any]) -> bool:
    """Whether a port gives something else than Diffusers, or nothing that could be compared."""
    for pipeline, row in data.get("requests", {}).items():
        judged = [d for d in distances(data) if d.pipeline == pipeline and SIDES[d.side].subject == "port"]
        if any(d.good is False for d in judged) or {d.case for d in judged} != set(row["cases"]):
            return True
    return False


def lines(data: Mapping[str, Any]) -> Iterator[str]:
    """A few lines for a terminal."""
    for pipeline, row in data.get("requests", {}).items():
        for case in row["cases"]:
            for t in times(row, case).values():
                yield (f"{pipeline} {case} ({row['size']}) {t.side}: {t.total:.1f} ms = encode {t.encode:.1f} + "
                       f"{t.steps} steps {t.denoise:.1f} ({t.step:.2f} each) + decode {t.decode:.1f}; "
                       f"{t.peak_gib:.1f} GiB")  # fmt: skip
    for d in distances(data):
        noise = "unknown" if d.noise is None else f"{d.noise:.1e}"
        decoded = "" if d.decoded is None else f", decoded {d.decoded:.1e}"
        yield f"{d.pipeline} {d.case} {d.side}: latents apart {d.latents:.1e}{decoded} (Diffusers' own noise {noise})"
