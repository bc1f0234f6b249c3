"""The README's performance table, from records. Nothing in it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.bench.judge import best, compared, floor_ms, parallel_verdicts, speeds

HEAD = (
    "workload", "layers", "Diffusers eager", "Diffusers tuned", "hand port", "generated port", "against Diffusers",
    "against the hand port", "share of the floor",
)  # fmt: skip


def table(data: Mapping[str, Any]) -> str:
    """Markdown: one row per denoiser and case, milliseconds per forward call, then two cards and where it was measured."""
    lines = [_row(HEAD), _row(["---"] * 2 + ["---:"] * (len(HEAD) - 2))]
    for denoiser, row in data["denoisers"].items():
        for case in row["cases"]:
            cells = _cells(data, row, case)
            if cells:
                lines.append(_row([f"`{denoiser}` {case}", row["size"].removesuffix(" layers"), *cells]))
    text = "\n".join(lines) + "\n" if len(lines) > 2 else ""
    return text + _parallel(data) + f"\n{origin(data)}\n"


def _cells(data: Mapping[str, Any], row: Mapping[str, Any], case: str) -> list[str]:
    found = speeds(row, case)
    if not found:
        return []
    port = best(found, "port-compiled", "port-eager")
    hand = best(found, "hand-compiled", "hand-eager")
    diffusers = best(found, "diffusers-tuned", "diffusers-eager")
    floor = floor_ms(data, row, case)
    cells = [_ms(found.get("diffusers-eager")), _ms(found.get("diffusers-tuned")), _ms(hand), _ms(port)]
    cells += [ratio_text(compared(port, diffusers)), ratio_text(compared(port, hand))]
    return [
        *cells,
        f"{100 * floor / port.busy:.0f} %" if floor and port else "",
    ]


def _parallel(data: Mapping[str, Any]) -> str:
    rows = [v for v in parallel_verdicts(data) if v["stage"] == "compiled" and v.get("speedup")]
    if not rows:
        return ""
    lines = ["", _row(("two cards", "mode", "ms", "speed-up", "by kernels", "apart from one card", "bound", "divided"))]
    lines.append(_row(["---"] * 2 + ["---:"] * 5 + ["---"]))
    for v in rows:
        cells = [f"`{v['denoiser']}` {v['subject']}", v["mode"], f"{v['ms']:.1f}", f"{v['speedup']:.2f}",
                 f"{v['kernel_speedup']:.2f}" if v.get("kernel_speedup") else "",
                 f"{v['apart']:.1e}", f"{v['bound']:.1e}", v["proof"]]  # fmt: skip
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """`0.970 ± 0.010`, ratio and spread of rounds; empty where nothing was compared."""
    if found is None:
        return ""
    spread = "" if found["spread"] is None else f" ± {found['spread']:.3f}"
    return f"{found['ratio']:.3f}{spread}{' (kernels)' if found['by'] == 'kernels' else ''}"


def origin(data: Mapping[str, Any]) -> str:
    """Where, with what and how the figures were measured, in one sentence."""
    device, versions = data["device"], data["versions"]
    shown = ", ".join(
        f"{n} {versions[n]}" for n in ("torch", "diffusers", "vllm-omni", "vllm", "fa3-fwd") if n in versions
    )
    ceilings = data["ceilings"]
    limits = (
        f"; measured ceilings {ceilings['matmul_tflops']:.0f} TFLOP/s and {ceilings['copy_gbs']:.0f} GB/s" if ceilings else ""
    )  # fmt: skip
    commands = " and ".join(f"`{c}`" for c in data.get("commands", [data["command"]]))
    name = device.get("name") or "CPU"
    return (
        f"Median milliseconds of one forward call in bfloat16, random weights. In brackets the time of the kernels, where the "
        f"call waits for launches; such sides are compared by it. {name}, {shown}"
        f"{limits}, {data['when']}. {commands}"
    )


def _ms(found: Any) -> str:
    """Wall milliseconds; beside them the kernels' time where the call waits for launches."""
    if found is None:
        return ""
    return f"{found.median:.2f}" + (f" ({found.kernel:.2f})" if found.launch_bound else "")


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"
