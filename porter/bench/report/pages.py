"""The HTML page and the markdown, from templates/bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from porter.bench.report import charts
from porter.bench.report.performance import table
from porter.bench.report.view import LABELS, view
from porter.resources import TEMPLATES


def html(data: Mapping[str, Any], generated: Path) -> str:
    """One page; charts and pictures are inside. Raises ChartsMissing without matplotlib."""
    shown = view(data, generated)
    for row in shown["denoisers"]:
        row["charts"] = _charts(row)
        row["shots"] = _shots(row["pictures"])
    for row in shown["requests"]:
        for case in row["cases"]:
            bars = [
                (LABELS[t.side], {"encode": t.encode, "denoise": t.denoise, "decode": t.decode}) for t in case["raw"]
            ]
            case["chart"] = charts.stacked(bars, "ms") if bars else ""
    return _render("page.html.jinja", escape=True, **shown)


def markdown(data: Mapping[str, Any], generated: Path) -> str:
    """The same, short, for a pull request."""
    return _render("page.md.jinja", escape=False, performance=table(data), **view(data, generated))


def _render(name: str, *, escape: bool, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "bench"), undefined=StrictUndefined, autoescape=escape,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(name).render(**values)


def _charts(row: Mapping[str, Any]) -> dict[str, Any]:
    latency, memory, points = {}, {}, []
    for case in row["cases"]:
        raw = case["raw"]
        if not raw:
            continue
        latency[case["name"]] = charts.bars([(s.side, LABELS[s.side], s.median, s.p10, s.p90) for s in raw], "ms")
        if any(s.peak_gib for s in raw):
            bars = [(s.side, LABELS[s.side], s.peak_gib, s.peak_gib, s.peak_gib) for s in raw]
            memory[case["name"]] = charts.bars(bars, "peak GiB", 2)
        if case["tflop"] and case["operator_gb"]:
            intensity = 1000 * case["tflop"] / case["operator_gb"]
            points += [(s.side, LABELS[s.side], intensity, 1000 * case["tflop"] / s.median) for s in raw]
    ceilings = row["ceilings"]
    layers = {s: [e for _, e in found] for s, found in row["growth"].get("layers", {}).items() if found}
    steps = {s: found for s, found in row["growth"].get("steps", {}).items() if found}
    return {
        "latency": latency, "memory": memory,
        "roofline": charts.roofline(points, ceilings["matmul_tflops"], ceilings["copy_gbs"]) if points and ceilings else "",
        "layers": charts.curves(layers, LABELS, "block") if layers else "",
        "steps": charts.curves(steps, LABELS, "step of the walk") if steps else "",
    }  # fmt: skip


def _shots(pictures: Mapping[str, Any]) -> list[dict[str, str]]:
    """Pictures in the order of the sides, the reference first."""
    if not pictures:
        return []
    shots = [
        {"label": "Diffusers float32", "output": charts.picture(pictures["reference"]), "difference": "", "scale": ""}
    ]
    for side, label in LABELS.items():
        if side in pictures:
            found = pictures[side]
            shots.append({"label": label, "output": charts.picture(found["output"]),
                          "difference": charts.picture(found["difference"]), "scale": f"{found['scale']:.2e}"})  # fmt: skip
    return shots
