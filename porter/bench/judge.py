"""Verdicts over a record: agreement against bounds, speed against the spread of repeated rounds. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.bench.sides import REFERENCE, SIDES, same_mode, sides_of
from porter.bench.whole import judge as whole

ERROR_RATIO = 1.1
"""A port's bfloat16 error against float32 may be so many times Diffusers' own in the same mode."""
REPLAY_BOUND = 1.0e-2
"""How far a call that is repeated may be from itself, relative L2: kernels that add in any order differ by bfloat16's noise."""
LAUNCH_BOUND = 1.15
"""A call that takes so many times its kernels' time waits for launches."""
PARALLEL_RATIO = 1.5
"""Two cards against one may differ so many times Diffusers' own bfloat16 error (measured: 0.3 to 0.5 of it)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison of a port's output with the float32 reference, beside Diffusers' own error."""

    denoiser: str
    case: str
    side: str
    error: float
    baseline: float | None
    apart: float | None
    """Relative L2 distance from Diffusers in the same mode."""
    against: str | None = None
    """The side of Diffusers that `baseline` is of."""

    @property
    def ratio(self) -> float | None:
        return None if not self.baseline else self.error / self.baseline

    @property
    def good(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= ERROR_RATIO


@dataclass(frozen=True, slots=True)
class Speed:
    """Milliseconds of one side and case over all rounds. `spread` is the relative distance of the rounds' medians; one
    round has none."""

    side: str
    case: str
    median: float
    p10: float
    p90: float
    spread: float | None
    rounds: int
    peak_gib: float
    kernel: float | None = None
    """Milliseconds that kernels ran, without the gaps between launches; median of the rounds' profiles."""
    kernel_spread: float | None = None

    @property
    def launch_bound(self) -> bool:
        """Whether the card waited for Python: then the wall clock judges the machine's processor."""
        return self.kernel is not None and self.median > LAUNCH_BOUND * self.kernel

    @property
    def busy(self) -> float:
        """Milliseconds to judge the card by: of the kernels where the call waits for launches."""
        return self.kernel if self.kernel is not None and self.launch_bound else self.median


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """Every port side and case for which a reference exists."""
    found = []
    for denoiser, row in data["denoisers"].items():
        for case, sides in row["agreement"].items():
            for side, errors in sides.items():
                if side in sides_of("diffusers") or REFERENCE.name not in errors:
                    continue
                other = same_mode(side, sides)
                own = sides.get(other or "", {}).get(REFERENCE.name)
                found.append(Verdict(denoiser, case, side, errors[REFERENCE.name], own, errors.get(other or ""), other))
    return found


def replayed_wrong(side: Mapping[str, Any], case: str) -> str | None:
    """What is wrong with calls that were replayed as CUDA graphs; None where nothing is."""
    found = side.get("replays", {}).get(case)
    if found is None:
        return "replayed calls were not looked at"
    if found["held"] != 0:
        return f"a result changes by {found['held']:.1e} when the next call is replayed"
    if not found["again"] <= REPLAY_BOUND:
        return f"a call that is replayed differs from itself by {found['again']:.1e}"
    if not found["other"] > REPLAY_BOUND:
        return f"other inputs change a replayed call by {found['other']:.1e} only"
    return None


def speed(row: Mapping[str, Any], side: str, case: str) -> Speed | None:
    """The figures of a side, None where it was not timed."""
    rounds = row["sides"].get(side, {}).get("rounds", {}).get(case)
    if not rounds:
        return None
    samples = sorted(s for r in rounds for s in r["samples"])
    medians = [r["median"] for r in rounds]
    kernels = [r["kernel_ms"] for r in rounds if r.get("kernel_ms")]
    tenth = len(samples) // 10
    return Speed(
        side, case, statistics.median(samples), samples[tenth], samples[-1 - tenth],
        _spread(medians), len(rounds), max(r["peak_gib"] for r in rounds),
        statistics.median(kernels) if kernels else None, _spread(kernels),
    )  # fmt: skip


def _spread(medians: list[float]) -> float | None:
    return max(medians) / min(medians) - 1 if len(medians) > 1 and min(medians) > 0 else None


def speeds(row: Mapping[str, Any], case: str) -> dict[str, Speed]:
    """All timed sides of a case, in the order of the sides."""
    return {side: found for side in SIDES if (found := speed(row, side, case)) is not None}


def best(found: Mapping[str, Speed], *sides: str) -> Speed | None:
    """The fastest of some sides."""
    return min((found[s] for s in sides if s in found), key=lambda s: s.busy, default=None)


def compared(port: Speed | None, other: Speed | None) -> dict[str, Any] | None:
    """Ratio (below 1: the port is faster), the spread that it must exceed, what was compared, and what may be said.

    Medians of the wall clock; where a side waits for launches, the time of its kernels.
    """
    if port is None or other is None:
        return None
    by_kernels = bool((port.launch_bound or other.launch_bound) and port.kernel and other.kernel)
    ratio = (port.kernel or 0) / (other.kernel or 1) if by_kernels else port.median / other.median
    spreads = (port.kernel_spread, other.kernel_spread) if by_kernels else (port.spread, other.spread)
    known = [s for s in spreads if s is not None]
    found = {
        "ratio": ratio,
        "spread": max(known) if len(known) == 2 else None,
        "by": "kernels" if by_kernels else "wall",
    }
    if found["spread"] is None:
        return found | {"say": "one round, so no claim"}
    same = abs(ratio - 1) <= max(known)
    return found | {"say": "equal within the spread" if same else "faster" if ratio < 1 else "slower"}


def ceilings_of(data: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, float]:
    """Ceilings measured in the run of a denoiser."""
    return row.get("ceilings") or data["ceilings"]


def floor_ms(data: Mapping[str, Any], row: Mapping[str, Any], case: str) -> float | None:
    """The least time that the measured ceilings allow: operations over the matrix rate, least bytes over copy rate."""
    counts, ceilings = row["counts"].get(case), ceilings_of(data, row)
    if not counts or not ceilings:
        return None
    return max(counts["tflop"] / ceilings["matmul_tflops"], counts["least_gb"] / ceilings["copy_gbs"]) * 1000


def attention_of(side: Mapping[str, Any]) -> list[str]:
    """Attention kernels that a profile saw, else the backend that the engine named."""
    seen = [kind for profile in side.get("profiles", {}).values() for kind in profile["attention"]]
    return list(dict.fromkeys(seen)) or list(side.get("facts", {}).get("backend", []))


def parallel_verdicts(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two cards against one: {denoiser, subject, mode, compiled, apart, bound, speedup, sharded, good}."""
    rows = []
    for denoiser, row in data["denoisers"].items():
        for subject, modes in row.get("parallel", {}).items():
            for mode, found in modes.items():
                for stage in ("eager", "compiled"):
                    part = found.get(stage)
                    if not part or "apart" not in part:
                        continue
                    alone = modes.get("one-guided" if mode == "cfg" else "one", {}).get(stage, {})
                    kernels = by_kernels(part.get("rounds", []), alone.get("rounds", []))
                    good = part["apart"] <= found["bound"] and found["sharded"]
                    case = found.get("case") or next(iter(row["cases"]), "")
                    rows.append({"denoiser": denoiser, "case": case, "subject": subject, "mode": mode, "stage": stage,
                                 **kernels, **part, "bound": found["bound"], "sharded": found["sharded"], "good": good,
                                 "proof": found["proof"]})  # fmt: skip
    return rows


def by_kernels(
    rounds: Sequence[Sequence[Mapping[str, Any]]], alone: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, float]:
    """{kernel_ms, kernel_speedup}; the least over ranks and rounds, because a rank that waits for its peer spends the
    time inside a kernel of the collective. Empty where kernels were not timed."""
    least = [
        min((r["kernel_ms"] for a in part for r in a if r.get("kernel_ms")), default=None) for part in (rounds, alone)
    ]
    if least[0] is None or least[1] is None:
        return {}
    return {"kernel_ms": least[0], "kernel_speedup": least[1] / least[0]}


def passed(data: Mapping[str, Any]) -> bool:
    """No side failed, every port agrees, and every parallel mode that ran agrees and was sharded; whole requests as well."""
    judged = [v for v in verdicts(data) if SIDES[v.side].subject == "port"]
    parallel = [v for v in parallel_verdicts(data) if v["subject"] == "port"]
    ran = bool(judged or parallel or data.get("requests")) and not whole.failed(data)
    good = all(v.good is not False and v.error == v.error for v in judged) and all(v["good"] for v in parallel)
    return ran and good and not data["problems"]


def short_table(data: Mapping[str, Any]) -> str:
    """A few columns for a terminal: error ratio, milliseconds by side."""
    lines = []
    for denoiser, row in data["denoisers"].items():
        for case in row["cases"]:
            timed = ", ".join(f"{s.side} {s.median:.2f}" for s in speeds(row, case).values())
            ratios = [v for v in verdicts(data) if v.denoiser == denoiser and v.case == case and v.ratio is not None]
            errors = ", ".join(f"{v.side} {v.error:.2e} ({v.ratio:.2f} of Diffusers)" for v in ratios)
            lines.append(f"{denoiser} {case} ({row['size']}): {timed or 'not timed'} ms; error {errors or 'unknown'}")
    for v in parallel_verdicts(data):
        gain = f", {v['speedup']:.2f} times as fast" if v.get("speedup") else ""
        lines.append(f"{v['denoiser']} {v['subject']} {v['mode']} {v['stage']}: apart {v['apart']:.1e}"
                     f" (bound {v['bound']:.1e}){gain}; {v['proof']}")  # fmt: skip
    lines += whole.lines(data)
    lines += [f"{p['where']}: {p['message']}" for p in data["problems"]]
    return "\n".join(lines)
