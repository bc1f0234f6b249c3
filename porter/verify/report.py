"""Results of a run as a table, as JSON, and as feature states for the manifest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.emit.write import write_atomically
from porter.evidence import ORDER
from porter.verify.outcome import ALL_RUNS, BOUND, PRE_PROCESS, CaseResult, RungResult
from porter.verify.parts import parts_of

if TYPE_CHECKING:
    from rich.table import Table

FEATURE_OF_RUNG = {
    "module": "transformer", "weights": "weights", "bf16": "bfloat16", "tp": "tensor_parallel", "sp": "sequence_parallel",
    "pipeline": "pipeline", "cfg": "cfg_parallel", "step": "step_execution", "batch": "request_batch", "cache": "cache_dit",
    "serve": "serving",
}  # fmt: skip
STYLE = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Everything a run found. `seconds` is wall time; `import_seconds` are summed over the processes."""

    subject: str
    command: str
    versions: Mapping[str, str]
    rungs: tuple[RungResult, ...]
    seconds: float
    import_seconds: float

    @property
    def passed(self) -> bool:
        """No rung failed and at least one passed."""
        states = {r.status for r in self.rungs}
        return "failed" not in states and "passed" in states

    @property
    def failed(self) -> bool:
        """A rung failed."""
        return any(r.status == "failed" for r in self.rungs)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "subject": self.subject,
            "passed": self.passed,
            "bound_rel_l2": BOUND,
            "command": self.command,
            "versions": dict(self.versions),
            "seconds": {
                "wall": round(self.seconds, 2),
                "imports_summed_over_processes": round(self.import_seconds, 2),
                "work": {f"{r.rung} {r.subject}": round(r.seconds, 2) for r in self.rungs},
            },
            "rungs": [r.to_json() for r in self.rungs],
        }

    def write(self, path: Path | str) -> Path:
        """Write the JSON report; atomic."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=2, default=_plain) + "\n"
        write_atomically({path.name: text}, path.parent)
        return path

    def table(self, *, cases: bool = False) -> Table:
        """One row per rung; failed cases always below their rung, all cases when `cases`."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"porter verify {self.subject}", title_justify="left", expand=False)
        numbers = {"cases", "worst rel L2", "seconds"}
        for name in ("rung", "subject", "status", "cases", "worst rel L2", "seconds", "note"):
            table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
        for rung in self.rungs:
            good = sum(c.status == "passed" for c in rung.cases)
            worst = "" if rung.worst is None else f"{rung.worst:.1e}"
            status = f"[{STYLE[rung.status]}]{rung.status}[/]"
            table.add_row(
                rung.rung, rung.subject, status, f"{good}/{len(rung.cases)}", worst, f"{rung.seconds:.1f}",
                escape(rung.reason),
            )  # fmt: skip
            for case in rung.cases:
                if case.status == "failed" or cases:
                    error = case.figures.get("rel_l2")
                    number = f"{error:.1e}" if isinstance(error, float) else ""
                    table.add_row(
                        "", f"  {escape(case.name)}", f"[{STYLE[case.status]}]{case.status}[/]", "", number,
                        f"{case.seconds:.1f}", escape(case.message),
                    )  # fmt: skip
        return table

    def by_class(self) -> Table:
        """One row per class with a column per rung, and a row below it for the first failed case of each failed rung."""
        from rich.markup import escape
        from rich.table import Table

        rungs = list(dict.fromkeys(r.rung for r in self.rungs))
        table = Table(title=f"porter verify: {self.subject}", title_justify="left", expand=False)
        for name in ("class", *rungs, "worst rel L2", "seconds"):
            table.add_column(name, justify="left" if name == "class" else "right")
        for subject in dict.fromkeys(r.subject for r in self.rungs):
            own = {r.rung: r for r in self.rungs if r.subject == subject}
            errors = [r.worst for r in own.values() if r.worst is not None]
            cells = [_cell(own.get(rung)) for rung in rungs]
            worst, seconds = f"{max(errors):.1e}" if errors else "", sum(r.seconds for r in own.values())
            table.add_row(subject, *cells, worst, f"{seconds:.1f}")
            for rung in own.values():
                if rung.status == "failed":
                    first = rung.failures()[0]
                    table.add_row(escape(f"  {rung.rung} {first.name}: {first.message}"[:200]))
        return table

    def summary(self) -> str:
        """One line: counts and time."""
        count = {s: sum(r.status == s for r in self.rungs) for s in STYLE}
        return (
            f"{self.subject}: {count['passed']} rungs passed, {count['failed']} failed, {count['skipped']} skipped"
            f" in {self.seconds:.0f} s"
        )


def _cell(rung: RungResult | None) -> str:
    if rung is None:
        return ""
    good = sum(c.status == "passed" for c in rung.cases)
    return f"[{STYLE[rung.status]}]{'-' if rung.status == 'skipped' else f'{good}/{len(rung.cases)}'}[/]"


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)


def command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def feature_states(rungs: tuple[RungResult, ...]) -> dict[str, dict[str, Any]]:
    """States for the manifest's `features` from rung results (of one port).

    validated: all cases passed, with the figures as evidence; limited: some cases failed, and which;
    unsupported: all failed; not tested: skipped, and why.
    """
    states: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        feature = FEATURE_OF_RUNG.get(rung.rung)
        if feature is None:
            continue
        states[feature] = _merge(states.get(feature), _state(rung))
        prepared = next((c for c in rung.cases if c.name == PRE_PROCESS), None)
        if prepared is not None:
            states["pre_process"] = _pre_process(rung, prepared)
    return states


def _pre_process(rung: RungResult, prepared: CaseResult) -> dict[str, Any]:
    """Validated where media were prepared outside of the worker and every request gave Diffusers' values with them."""
    if prepared.status != "passed":
        state = "unsupported" if prepared.status == "failed" else "not tested"
        return {"status": state, "reason": prepared.message}
    if rung.status == "failed":
        return {"status": "limited", "reason": f"fails: {', '.join(c.name for c in rung.failures()[:6])}"}
    return {"status": "validated", "evidence": {"rung": rung.rung, **prepared.figures}}


def _state(rung: RungResult) -> dict[str, Any]:
    if rung.status == "skipped":
        return {"status": "not tested", "reason": rung.reason}
    good = [c for c in rung.cases if c.status == "passed"]
    evidence: dict[str, Any] = {"rung": rung.rung, "cases": len(good), "bound_rel_l2": BOUND}
    if rung.worst is not None and rung.status == "passed":
        evidence["worst_rel_l2"] = float(f"{rung.worst:.2e}")
    for key in ("elements", "elements_per_rank", "sequence", "sequence_per_rank", "calls", "calls_per_rank", "max_abs"):
        value = next((c.figures[key] for c in good if key in c.figures), None)
        if value is not None and rung.rung not in ("module", "weights", "pipeline"):
            evidence[key] = value
    if rung.rung == "tp" and (largest := max(good, key=_block_share, default=None)) is not None:
        evidence |= {k: largest.figures[k] for k in BLOCK_FIGURES if k in largest.figures}
        if _block_share(largest) <= ENOUGH:
            evidence.pop("replicated_in_blocks", None)
    if rung.rung == "pipeline":
        evidence["parts"] = parts_of(rung.cases)
    if rung.rung == "bf16":
        evidence = _bfloat16(rung, len(good))
    if rung.status == "passed":
        return {"status": "validated", "evidence": evidence}
    failed = ", ".join(c.name for c in rung.failures()[:6])
    if good:
        return {"status": "limited", "reason": f"fails: {failed}", "evidence": evidence}
    nothing = {"status": "unsupported", "reason": f"{failed}: {rung.failures()[0].message}"[:300]}
    return nothing | {"evidence": evidence} if "parts" in evidence else nothing


def _bfloat16(rung: RungResult, good: int) -> dict[str, Any]:
    """Errors relative to those of Diffusers: of all runs together, and of the worst case."""
    ratios = {c.name: c.figures["error_ratio"] for c in rung.cases if "error_ratio" in c.figures}
    runs = sum(c.figures.get("seeds", 0) for c in rung.cases)
    return {
        "rung": rung.rung, "cases": good, "runs": runs, "error_ratio": ratios.pop(ALL_RUNS, None),
        "worst_case_ratio": max(ratios.values(), default=None),
    }  # fmt: skip


BLOCK_FIGURES = ("block_elements", "block_elements_per_rank", "replicated_in_blocks")
ENOUGH = 0.6
"""Largest part of the blocks' parameters that a rank of two holds without the evidence saying which are replicated."""


def _block_share(case: CaseResult) -> float:
    """Largest part of the blocks' parameters that one rank holds; 0 where the model names no blocks."""
    ranks = case.figures.get("block_elements_per_rank", ())
    return float(max(ranks, default=0) / case.figures["block_elements"]) if ranks else 0.0


def _merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """A port with several denoisers is as good as its worst one."""
    return new if old is None or ORDER.index(new["status"]) > ORDER.index(old["status"]) else old
