"""Rung `gpu` of `porter verify --device cuda`: ports in bfloat16 at real layer sizes lose no more than Diffusers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from porter.bench.drive import Options, Say, bench
from porter.bench.failures import flash_problem
from porter.bench.judge import ERROR_RATIO, Verdict, attention_of, replayed_wrong, speed, verdicts
from porter.bench.sides import SIDES as SIDES_BY_NAME
from porter.verify.bench import Clock
from porter.verify.environment import versions
from porter.verify.outcome import CaseResult, RungResult, VerifyError, rung_of
from porter.verify.report import VerifyReport, command_line

RUNG = "gpu"
PORTS = ("port-eager", "port-compiled", "port-graphs")
SIDES = ("diffusers-eager", "diffusers-dynamic", "diffusers-tuned", *PORTS)


def verify_on_card(
    names: Sequence[str], generated: Path, *, record: Path, rungs: Sequence[str] | None, threads: int, say: Say,
    device: str = "cuda", tiny: bool = False,
) -> VerifyReport:  # fmt: skip
    """Run the rung for every denoiser of the named classes; `record` gets the figures, in the format of porter bench.

    Raises VerifyError: no card, wrong driver, no engine, another rung, an unknown class.
    """
    if rungs and set(rungs) != {RUNG}:
        raise VerifyError(f"on a card there is one rung, {RUNG}", "the others run with --device cpu")
    clock = Clock()
    options = Options(device=device, generated=generated, out=record, sides=SIDES, rounds=1, threads=threads, tiny=tiny)
    data = bench(names, options, say)
    results = tuple(rung_of_denoiser(data, name) for name in data["denoisers"])
    return VerifyReport(", ".join(names), command_line(), versions(), results, clock(), 0.0)


def rung_of_denoiser(data: Mapping[str, Any], denoiser: str) -> RungResult:
    """Cases of one denoiser: each side of the port and each case of the workload, and what failed."""
    row = data["denoisers"][denoiser]
    results = []
    for side in PORTS:
        found = row["sides"].get(side, {"failures": ["did not start"], "facts": {}, "runs": {}})
        flash = flash_problem(found["facts"], data["device"]) if found["facts"].get("backend") else None
        judged = {v.case: v for v in verdicts(data) if v.denoiser == denoiser and v.side == side}
        for case in row["cases"]:
            name = f"{case} {side.removeprefix('port-')}"
            if case in judged:
                results.append(_case(name, judged[case], row, found, flash))
            else:
                message = next((f for f in found["failures"] if case in f), "; ".join(found["failures"])) or "not run"
                results.append(CaseResult(name, "failed", message))
    return rung_of(RUNG, denoiser, results, sum(c.seconds for c in results))


def _case(
    name: str, verdict: Verdict, row: Mapping[str, Any], side: Mapping[str, Any], flash: str | None
) -> CaseResult:
    figures: dict[str, Any] = {
        "rel_l2": verdict.error, "diffusers_rel_l2": verdict.baseline, "error_ratio": verdict.ratio,
        "layers": row["size"], "attention": attention_of(side), "not_loaded": side["facts"].get("missing"),
    }  # fmt: skip
    if (timed := speed(row, verdict.side, verdict.case)) is not None:
        figures["ms"] = timed.median
    replayed = replayed_wrong(side, verdict.case) if SIDES_BY_NAME[verdict.side].graphs else None
    problems = [p for p in (flash, replayed) if p]
    if verdict.ratio is None:
        problems.append("Diffusers has no figure to compare with")
    elif not verdict.good:
        problems.append(f"the error is {verdict.ratio:.2f} times that of Diffusers in bfloat16 (bound {ERROR_RATIO})")
    return CaseResult(name, "failed" if problems else "passed", "; ".join(problems), figures)
