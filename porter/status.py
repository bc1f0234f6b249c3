"""`porter status`: how far the catalogue is, by tier and family, from the manifest and the evidence, and what blocks it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from porter.catalogue import LivePipeline
from porter.coverage import PARTS, Row

MODES = ("cfg", "step", "batch", "cache", "serve")


@dataclass(frozen=True, slots=True)
class Line:
    """Counts of one tier and family, or of all."""

    tier: str
    family: str
    live: int = 0
    ported: int = 0
    equal: int = 0
    modes: tuple[int, ...] = (0,) * len(MODES)

    def cells(self) -> tuple[str, ...]:
        return (self.tier, self.family, *(str(n) for n in (self.live, self.ported, self.equal, *self.modes)))


HEADINGS = ("tier", "family", "live", "ported", "equal", *MODES)
"""`equal`: every part of the pipeline that was asked about is validated."""


def lines(live: Iterable[LivePipeline], rows: Mapping[str, Row]) -> list[Line]:
    """One line per tier and family, and the sums: of tiers 1 and 2, and of all."""
    pipelines = list(live)
    groups = sorted({(p.tier, p.family) for p in pipelines})
    found = [_line(t, f, [p for p in pipelines if (p.tier, p.family) == (t, f)], rows) for t, f in groups]
    found.append(_line("1+2", "all", [p for p in pipelines if p.in_scope], rows))
    found.append(_line("all", "all", pipelines, rows))
    return found


def _line(tier: str, family: str, pipelines: list[LivePipeline], rows: Mapping[str, Row]) -> Line:
    own = [rows.get(p.name, {}) for p in pipelines]
    ported = [row for row in own if row.get("port", "no") != "no"]
    modes = tuple(sum(row.get(mode) == "validated" for row in ported) for mode in MODES)
    return Line(tier, family, len(pipelines), len(ported), sum(map(is_equal, ported)), modes)


def is_equal(row: Row) -> bool:
    """Whether every part that was asked about is validated, the latents among them."""
    return row.get("latents") == "validated" and all(row.get(part, "validated") == "validated" for part in PARTS)


def blockers(live: Iterable[LivePipeline], rows: Mapping[str, Row]) -> list[tuple[list[str], str]]:
    """Pipelines that are not equal yet and why: those of tiers 1 and 2 one by one, the others by reason."""
    found: list[tuple[list[str], str]] = []
    others: dict[str, list[str]] = {}
    for pipeline in sorted(live, key=lambda p: (p.tier, p.name)):
        row = rows.get(pipeline.name, {})
        if is_equal(row):
            continue
        if pipeline.in_scope or row:
            found.append(([pipeline.name], why(row)))
        else:
            reason = "a UNet" if pipeline.tier == "3" else f"no transformer in a loop of its own (tier {pipeline.tier})"
            others.setdefault(reason, []).append(pipeline.name)
    return found + [(names, reason) for reason, names in others.items()]


def why(row: Row) -> str:
    """What keeps a pipeline from being equal."""
    if row.get("port", "no") == "no":
        return row.get("blocked_by") or "not converted"
    wrong = [f"{part} {row[part]}" for part in PARTS if row.get(part, "validated") != "validated"]
    return ", ".join(wrong) or "not tested"
