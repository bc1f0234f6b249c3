"""The README's performance table, from records. Nothing in it is typed by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from porter.bench.judge import (
    ERROR_RATIO,
    Speed,
    Verdict,
    attention_of,
    best,
    compared,
    floor_ms,
    parallel_verdicts,
    speeds,
    verdicts,
)
from porter.bench.sides import SIDES, sides_of
from porter.bench.whole.judge import Apart, Times, distances, times

HEAD = (
    "denoiser", "case", "layers", "card", "Diffusers eager", "Diffusers tuned", "engine's adapter",
    "hand port", "hand port, static", "generated port", "generated port, static", "generated port, graphs",
    "against Diffusers", "against the hand port", "share of the floor",
)  # fmt: skip
OTHERS = (
    "denoiser",
    "case",
    "layers",
    "card",
    "Diffusers",
    "generated port",
    "against Diffusers",
    "share of the floor",
)
PARALLEL = ("denoiser", "case", "layers", "cards", "mode", "ms", "speed-up", "by kernels", "apart from one card", "bound",
            "divided")  # fmt: skip
REQUESTS = ("pipeline", "request", "layers", "card", "side", "encode", "denoise", "one step", "decode", "whole",
            "against Diffusers", "peak GiB", "apart", "noise")  # fmt: skip


def table(data: Mapping[str, Any]) -> str:
    """Markdown: milliseconds per forward call, for the first case of each denoiser with all sides, for the others of the
    fastest sides; two cards, whole requests, where measured."""
    first: list[str] = []
    others: list[str] = []
    for denoiser, row in data["denoisers"].items():
        for number, case in enumerate(row["cases"]):
            if best(speeds(row, case), *sides_of("port")) is None:
                continue  # the time was up before the port's turn
            cells = _fastest(data, row, case) if number else _cells(data, row, case)
            (others if number else first).append(
                _row([*_subject(denoiser, case), _layers(row), _card(data, row), *cells])
            )
    text = _lines(HEAD, 4, first) + ("\n" if first and others else "") + _lines(OTHERS, 4, others)
    return text + _parallel(data) + requests(data) + errors(data) + f"\n{origin(data)}\n"


def _lines(head: Sequence[str], left: int, rows: Sequence[str]) -> str:
    """A table whose first columns are text; nothing without rows."""
    return "\n".join([_row(head), _row(["---"] * left + ["---:"] * (len(head) - left)), *rows, ""]) if rows else ""


def _fastest(data: Mapping[str, Any], row: Mapping[str, Any], case: str) -> list[str]:
    found = speeds(row, case)
    port, diffusers = (best(found, *sides_of(subject)) for subject in ("port", "diffusers"))
    return [_ms(diffusers), _ms(port), ratio_text(compared(port, diffusers)), _share(data, row, case, port)]


def _share(data: Mapping[str, Any], row: Mapping[str, Any], case: str, port: Speed | None) -> str:
    floor = floor_ms(data, row, case)
    return f"{100 * floor / port.busy:.0f} %" if floor and port else ""


def _cells(data: Mapping[str, Any], row: Mapping[str, Any], case: str) -> list[str]:
    found = speeds(row, case)
    port, hand, diffusers = (best(found, *sides_of(subject)) for subject in ("port", "hand", "diffusers"))
    cells = [_ms(found.get(side)) for side in ("diffusers-eager", "diffusers-tuned", "adapter")]
    for subject in ("hand", "port"):
        cells += [_ms(best(found, f"{subject}-compiled", f"{subject}-eager")), _ms(found.get(f"{subject}-static"))]
    cells.append(_ms(found.get("port-graphs")))
    cells += [ratio_text(compared(port, diffusers)), ratio_text(compared(port, hand))]
    return [*cells, _share(data, row, case, port)]


def _parallel(data: Mapping[str, Any]) -> str:
    rows = [v for v in parallel_verdicts(data) if v["stage"] == "compiled" and v.get("speedup")]
    if not rows:
        return ""
    lines = ["", _row(PARALLEL)]
    lines.append(_row(["---"] * 5 + ["---:"] * 5 + ["---"]))
    for v in rows:
        row = data["denoisers"][v["denoiser"]]
        name, case = _subject(v["denoiser"], v["case"])
        cells = [name + (" (hand port)" if v["subject"] == "hand" else ""), case, _layers(row), f"2 x {_card(data, row)}",
                 v["mode"], f"{v['ms']:.1f}", f"{v['speedup']:.2f}",
                 f"{v['kernel_speedup']:.2f}" if v.get("kernel_speedup") else "",
                 f"{v['apart']:.1e}", f"{v['bound']:.1e}", v["proof"]]  # fmt: skip
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def requests(data: Mapping[str, Any]) -> str:
    """Whole requests, one row per side: where the milliseconds go, and how far the latents are from Diffusers'."""
    lines = []
    known = {(d.pipeline, d.case, d.side): d for d in distances(data)}
    for pipeline, row in data.get("requests", {}).items():
        for case in row["cases"]:
            found = times(row, case)
            for side, each in found.items():
                lines.append(_row([*_subject(pipeline, case), _layers(row), _card(data, row), SIDES[side].label,
                                   *request_cells(found, each, known.get((pipeline, case, side)))]))  # fmt: skip
    if not lines:
        return ""
    head = ["", _row(REQUESTS), _row(["---"] * 5 + ["---:"] * (len(REQUESTS) - 5))]
    note = (
        "Whole requests: milliseconds until the first step, of all steps, after the last. Against Diffusers: the whole over "
        "that of the fastest Diffusers. Apart: relative L2 of the last latents from Diffusers in the same mode; noise: of "
        "compiled from eager Diffusers."
    )
    return "\n".join([*head, *lines, "", note]) + "\n"


def request_cells(found: Mapping[str, Times], each: Times, apart: Apart | None) -> list[str]:
    """Figures of one side of a request, from `encode` on."""
    fastest = min((t.total for s, t in found.items() if SIDES[s].subject == "diffusers"), default=None)
    steps = f"{each.denoise:.1f} ({each.steps})"
    return [
        f"{each.encode:.1f}", steps, f"{each.step:.2f}", f"{each.decode:.1f}", f"{each.total:.1f}",
        f"{each.total / fastest:.3f}" if fastest and SIDES[each.side].subject != "diffusers" else "",
        f"{each.peak_gib:.1f}", "" if apart is None else f"{apart.latents:.1e}",
        "" if apart is None or apart.noise is None else f"{apart.noise:.1e}",
    ]  # fmt: skip


def errors(data: Mapping[str, Any]) -> str:
    """One paragraph: how many denoisers keep the bound on bfloat16 errors, which do not, and how many use FlashAttention."""
    ports = [v for v in verdicts(data) if SIDES[v.side].subject == "port" and v.ratio is not None]
    # Diffusers' code for one shape rounds less often than code for all: it judges the other only where nothing better did.
    exact = {_compared(v) for v in ports if v.against == "diffusers-dynamic"}
    ports = [v for v in ports if v.against == "diffusers-dynamic" or _compared(v) not in exact]
    worst: dict[str, float] = {}
    for verdict in ports:
        name = verdict.denoiser.split(",")[0]
        worst[name] = max(worst.get(name, 0.0), verdict.ratio or 0.0)
    if not worst:
        return ""
    over = [f"`{name}` {ratio:.2f}" for name, ratio in sorted(worst.items()) if ratio > ERROR_RATIO]
    flash = {d.split(",")[0] for d, row in data["denoisers"].items()
             if any("flash" in a.lower() for s in sides_of("port") if s in row["sides"]
                    for a in attention_of(row["sides"][s]))}  # fmt: skip
    text = (
        f"Errors in bfloat16 against float32, layers of real size on a card: {len(worst) - len(over)} of {len(worst)} "
        f"denoisers lose at most {ERROR_RATIO} times what Diffusers loses in the same mode (median of the worst cases "
        f"{statistics.median(worst.values()):.2f}); FlashAttention is used by {len(flash & set(worst))}."
    )
    return f"\n{text}{' Above it: ' + ', '.join(over) + '.' if over else ''}\n"


def _compared(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.denoiser.split(",")[0], verdict.case, verdict.side


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """`0.970 ± 0.010`, ratio and spread of rounds; empty where nothing was compared."""
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    return f"{found['ratio']:.3f}{spread}{' (kernels)' if found['by'] == 'kernels' else ''}"


def _subject(denoiser: str, case: str) -> tuple[str, str]:
    return f"`{denoiser.split(',')[0]}`", case


def _layers(row: Mapping[str, Any]) -> str:
    return str(row["size"]).removesuffix(" layers")


def _card(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return str(row.get("device") or data["device"].get("name") or "CPU").removeprefix("NVIDIA ")


def origin(data: Mapping[str, Any]) -> str:
    """What the figures are, and where and with what they were measured: one line for each kind of record."""
    lines = [
        "Median milliseconds of one forward call in bfloat16, random weights. In brackets the time of the kernels, where the "
        "call waits for launches; such sides are compared by it. Ports are compiled for all shapes at once, as the engine does "
        "it by itself; static: for one shape, as Diffusers' tuned side; graphs: static, and replayed as CUDA "
        "graphs, if a port is asked for them. Ratios are of the fastest "
        "sides; below 1: the port is faster; ± is the spread of the rounds. The records hold the commands.",
        "",
    ]
    machines = dict.fromkeys(
        f"- {machine(m)}" for m in data.get("machines", [data])
    )  # many records of one kind read alike
    return "\n".join([*lines, *machines])


def machine(run: Mapping[str, Any]) -> str:
    """Cards, date, versions and measured ceilings of one record."""
    versions, ceilings = run["versions"], run["ceilings"]
    shown = [f"{n} {versions[n]}" for n in ("torch", "diffusers", "vllm-omni", "vllm", "fa3-fwd") if n in versions]
    limits = f"{ceilings['matmul_tflops']:.0f} TFLOP/s and {ceilings['copy_gbs']:.0f} GB/s measured" if ceilings else ""
    cards = run["device"].get("devices", 1)
    name = run["device"].get("name") or "CPU"
    parts = [f"{cards} x {name}" if cards > 1 else name, run["when"], *shown, limits]
    return ", ".join(p for p in parts if p)


def _ms(found: Any) -> str:
    """Wall milliseconds; beside them the kernels' time where the call waits for launches."""
    if found is None:
        return ""
    return f"{found.median:.2f}" + (f" ({found.kernel:.2f})" if found.launch_bound else "")


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"
