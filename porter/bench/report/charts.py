"""Charts as SVG text, drawn by matplotlib without a display. The same data gives the same bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {
    "diffusers-eager": "#9aa5b1", "diffusers-dynamic": "#74828f", "diffusers-tuned": "#52606d", "adapter": "#7c5e99",
    "hand-eager": "#f6c28b", "hand-compiled": "#de7c2b", "hand-static": "#a3540f",
    "port-eager": "#8ec5f0", "port-compiled": "#2374ab", "port-static": "#123f66", "port-graphs": "#0a1f33",
    "reference": "#222222",
}  # fmt: skip
PHASE_COLOURS = {"encode": "#d9b44a", "denoise": "#2374ab", "decode": "#7c5e99"}
MARKS = {"eager": "o", "compiled": "s", "dynamic": "s", "tuned": "D", "static": "D", "graphs": "^"}


class ChartsMissing(Exception):
    """matplotlib is not installed."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ChartsMissing("the page needs matplotlib: pip install 'porter[report]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "porter", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
            "axes.axisbelow": True,
        }
    )  # fmt: skip
    return plt


def _svg(figure: Any) -> str:
    """The drawing alone, without XML head; ids are stable."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def bars(rows: Sequence[tuple[str, str, float, float, float]], unit: str, digits: int = 1) -> str:
    """Horizontal bars: rows of (side, label, value, low, high); low and high are drawn as whiskers."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 0.38 * len(rows) + 0.7))
    values = [r[2] for r in rows]
    whiskers = [[max(0.0, r[2] - r[3]) for r in rows], [max(0.0, r[4] - r[2]) for r in rows]]
    at = list(range(len(rows)))[::-1]
    axes.barh(at, values, xerr=whiskers, color=[COLOURS.get(r[0], "#777") for r in rows], height=0.66,
              error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#333"})  # fmt: skip
    axes.set_yticks(at, [r[1] for r in rows])
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    top = max((r[4] for r in rows), default=1.0) or 1.0
    axes.set_xlim(0, top * 1.16)
    for y, row in zip(at, rows, strict=True):
        axes.text(max(row[2], row[4]) + top * 0.012, y, f"{row[2]:.{digits}f}", va="center", fontsize=8)
    return _svg(figure)


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str) -> str:
    """Horizontal bars made of phases: rows of (label, {phase: value})."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 0.38 * len(rows) + 1.0))
    at = list(range(len(rows)))[::-1]
    left = [0.0] * len(rows)
    for phase, colour in PHASE_COLOURS.items():
        values = [parts[phase] for _, parts in rows]
        axes.barh(at, values, left=left, color=colour, height=0.66, label=phase)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(at, [label for label, _ in rows])
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    top = max(left, default=1.0) or 1.0
    axes.set_xlim(0, top * 1.16)
    for y, total in zip(at, left, strict=True):
        axes.text(total + top * 0.012, y, f"{total:.0f}", va="center", fontsize=8)
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure)


def roofline(points: Sequence[tuple[str, str, float, float]], tflops: float, gbs: float) -> str:
    """(side, label, FLOP per byte, TFLOP/s) below the two measured ceilings, on logarithmic axes."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    ridge = 1000 * tflops / gbs
    low = min([ridge, *(p[2] for p in points)]) / 4
    high = max([ridge, *(p[2] for p in points)]) * 4
    axes.plot(
        [low, ridge, high], [low * gbs / 1000, tflops, tflops], color="#b00", linewidth=1.4, label="measured ceilings"
    )
    seen: set[str] = set()
    for side, label, intensity, rate in points:
        mark = MARKS.get(side.rsplit("-", 1)[-1], "o")
        axes.scatter([intensity], [rate], s=34, color=COLOURS.get(side, "#777"), marker=mark, zorder=3,
                     edgecolors="white", linewidths=0.5, label=None if side in seen else label)  # fmt: skip
        seen.add(side)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte (each operator of eager code on its own)")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def curves(lines: Mapping[str, Sequence[float]], labels: Mapping[str, str], along: str) -> str:
    """One line per side: relative L2 error against float32, logarithmic."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for number, (side, values) in enumerate(lines.items()):
        axes.plot(range(1, len(values) + 1), values, color=COLOURS.get(side, "#777"), marker="." if len(values) < 40 else "",
                  linewidth=3.2 - 0.7 * min(number, 3), label=labels.get(side, side))  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel(along)
    axes.set_ylabel("relative L2 error")
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def picture(pixels: Mapping[str, Any]) -> str:
    """An RGB picture (rows, columns, rgb in base64) as a data address (PNG)."""
    plt = _pyplot()
    import numpy as np

    values = np.frombuffer(base64.b64decode(pixels["rgb"]), dtype=np.uint8)
    stream = io.BytesIO()
    shape = (pixels["rows"], pixels["columns"], 3)
    plt.imsave(stream, values.reshape(shape), format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
