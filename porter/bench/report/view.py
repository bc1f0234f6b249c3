"""What a page shows, as plain values: one view for the HTML and the markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.bench.agreement import first_divergence
from porter.bench.judge import (
    ERROR_RATIO,
    PARALLEL_RATIO,
    Speed,
    attention_of,
    best,
    ceilings_of,
    compared,
    floor_ms,
    parallel_verdicts,
    speeds,
    verdicts,
)
from porter.bench.report.performance import machine, ratio_text, request_cells
from porter.bench.sides import REFERENCE, SIDES, same_mode, sides_of
from porter.bench.whole.judge import RATIO, distances, times
from porter.verify.manifest import read_manifest
from porter.verify.outcome import VerifyError

LABELS = {name: side.label for name, side in SIDES.items()}


def view(data: Mapping[str, Any], generated: Path) -> dict[str, Any]:
    """Everything that the templates name."""
    device = data["device"]
    return {
        "device": device.get("name") or "CPU (no accelerator)",
        "memory": f"{device['memory_gib']:.0f} GiB" if device.get("memory_gib") else "",
        "versions": data["versions"],
        "commands": data.get("commands", [data["command"]]),
        "when": data["when"],
        "ceilings": data["ceilings"],
        "bound": ERROR_RATIO,
        "parallel_bound": PARALLEL_RATIO,
        "problems": data["problems"],
        "machines": [(machine(run), run["command"]) for run in data.get("machines", [data])],
        "summary": [_summary(data, name, row) for name, row in data["denoisers"].items() if row["sides"]],
        "denoisers": [_denoiser(data, name, row) for name, row in data["denoisers"].items()],
        "parallel": [_parallel(v) for v in parallel_verdicts(data) if v["mode"] not in ("one", "one-guided")],
        "requests": [_request(data, name, row) for name, row in data.get("requests", {}).items()],
        "request_bound": RATIO,
        "features": _features({name.split(",")[0] for name in data["denoisers"]}, generated),
    }


def _request(data: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Whole requests of one pipeline."""
    known = {(d.case, d.side): d for d in distances(data) if d.pipeline == name}
    cases = []
    for case, call in row["cases"].items():
        found = times(row, case)
        rows = []
        for side, each in found.items():
            apart = known.get((case, side))
            rows.append({"side": LABELS[side], "cells": request_cells(found, each, apart),
                         "decoded": _error(apart.decoded) if apart else "", "good": apart.good if apart else None,
                         "judged": apart is not None and SIDES[side].subject == "port",
                         "spread": "" if each.spread is None else f"{100 * each.spread:.1f} %"})  # fmt: skip
        shown = {k: v for k, v in call.items() if "prompt" not in k.split("_")}
        cases.append({"name": case, "rows": rows, "raw": list(found.values()),
                      "call": ", ".join(f"{k} {v}" for k, v in shown.items())})  # fmt: skip
    sides = [
        {"label": LABELS[s], "failures": side["failures"],
         "parameters": f"{side['facts']['parameters']:,}" if "parameters" in side["facts"] else "",
         "attention": ", ".join(side["facts"].get("backend", []))
         or ", ".join(f"{c}: {b['chosen']}" for c, b in side["facts"].get("backends", {}).items()),
         "first": "; ".join(f"{c} {r['first_seconds']:.1f} s" for c, r in side["runs"].items())}
        for s, side in row["sides"].items()
    ]  # fmt: skip
    return {"name": name, "size": row["size"], "device": row.get("device", ""), "cases": cases, "sides": sides}


def _summary(data: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    judged = [v for v in verdicts(data) if v.denoiser == name and v.side.startswith("port")]
    worst = max((v for v in judged if v.ratio is not None), key=lambda v: v.ratio or 0.0, default=None)
    case = next(iter(row["cases"]), "")
    found = speeds(row, case)
    port = best(found, *sides_of("port"))
    floor = floor_ms(data, row, case)
    attention = [a for s in sides_of("port") for a in attention_of(row["sides"].get(s, {}))]
    return {
        "name": name, "size": row["size"], "case": case,
        "ratio": f"{worst.ratio:.3f}" if worst and worst.ratio is not None else "unknown",
        "good": worst.good if worst else None,
        "diffusers": ratio_text(compared(port, best(found, *sides_of("diffusers")))),
        "hand": ratio_text(compared(port, best(found, *sides_of("hand")))),
        "floor": f"{100 * floor / port.busy:.0f} %" if floor and port else "",
        "attention": ", ".join(dict.fromkeys(attention)) or "unknown",
    }  # fmt: skip


def _denoiser(data: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    judged = [v for v in verdicts(data) if v.denoiser == name]
    grown = row.get("growth", {})
    return {
        "name": name,
        "size": row["size"],
        "device": row.get("device", ""),
        "ceilings": ceilings_of(data, row),
        "config": json.dumps(row["config"]) if row["config"] else "the constructor's defaults",
        "cases": [_case(data, row, case) for case in row["cases"]],
        "agreement": [
            {"case": v.case, "side": LABELS[v.side], "error": _error(v.error), "own": _error(v.baseline),
             "ratio": f"{v.ratio:.3f}" if v.ratio is not None else "", "good": v.good, "apart": _error(v.apart)}
            for v in judged
        ],
        "noise": _noise(row),
        "divergence": {LABELS[s]: first_divergence(grown, s, b) for s in grown.get("layers", {})
                       if (b := same_mode(s, grown["layers"]))},
        "growth": grown,
        "pictures": row.get("pictures", {}),
        "sides": [_side(name, s) for name, s in row["sides"].items()],
    }  # fmt: skip


def _case(data: Mapping[str, Any], row: Mapping[str, Any], case: str) -> dict[str, Any]:
    counts, found = row["counts"].get(case, {}), speeds(row, case)
    floor = floor_ms(data, row, case)
    return {
        "name": case,
        "inputs": ", ".join(f"{k} {_shape(v)}" for k, v in row["cases"][case].items()),
        "tokens": counts.get("tokens"),
        "tflop": counts.get("tflop"),
        "least_gb": counts.get("least_gb"),
        "operator_gb": counts.get("operator_gb"),
        "floor": floor,
        "speeds": [_speed(ceilings_of(data, row), counts, floor, s) for s in found.values()],
        "raw": list(found.values()),
        "claims": _claims(found),
    }


def _speed(
    ceilings: Mapping[str, float], counts: Mapping[str, Any], floor: float | None, found: Speed
) -> dict[str, Any]:
    rate = counts["tflop"] / found.busy * 1000 if counts else None
    ceiling = ceilings.get("matmul_tflops")
    return {
        "side": LABELS[found.side], "ms": f"{found.median:.2f}",
        "kernel": "" if found.kernel is None else f"{found.kernel:.2f}", "bound": found.launch_bound,
        "low": f"{found.p10:.2f}", "high": f"{found.p90:.2f}",
        "spread": "" if found.spread is None else f"{100 * found.spread:.1f} %",
        "rounds": found.rounds, "peak": f"{found.peak_gib:.2f}",
        "tokens": f"{1000 * counts['tokens'] / found.median:,.0f}" if counts.get("tokens") else "",
        "rate": f"{rate:.1f}" if rate is not None else "",
        "share": f"{100 * rate / ceiling:.0f} %" if rate is not None and ceiling else "",
        "floor": f"{100 * floor / found.busy:.0f} %" if floor else "",
    }  # fmt: skip


def _claims(found: Mapping[str, Speed]) -> list[str]:
    """Sentences that the spread of the rounds allows."""
    pairs = (("port-graphs", "hand-static"), ("port-graphs", "diffusers-tuned"),
             ("port-static", "hand-static"), ("port-static", "diffusers-tuned"), ("port-compiled", "hand-compiled"),
             ("port-compiled", "diffusers-tuned"), ("port-eager", "hand-eager"), ("port-eager", "diffusers-eager"))  # fmt: skip
    texts = []
    for own, other in pairs:
        judged = compared(found.get(own), found.get(other))
        if judged:
            texts.append(f"{LABELS[own]} / {LABELS[other]}: {ratio_text(judged)}, {judged['say']}")
    return texts


def _side(name: str, side: Mapping[str, Any]) -> dict[str, Any]:
    facts = side["facts"]
    compiled: dict[str, Any] = next(reversed(side["compiled"].values()), {}) if side["compiled"] else {}
    profile = next(iter(side["profiles"].values()), None)
    chosen = {case: found["chosen"] for case, found in facts.get("backends", {}).items()}
    return {
        "name": name,
        "label": REFERENCE.label if name == REFERENCE.name else LABELS[name],
        "parameters": f"{facts['parameters']:,}" if "parameters" in facts else "",
        "missing": facts.get("missing"),
        "backend": ", ".join(facts.get("backend", [])) or ", ".join(f"{c}: {b}" for c, b in chosen.items()),
        "attention": ", ".join(attention_of(side)),
        "first": "; ".join(f"{c} {r['first_seconds']:.1f} s" for c, r in side["runs"].items()),
        "graphs": compiled.get("graphs", 0), "breaks": compiled.get("breaks", 0),
        "recompiles": compiled.get("recompiles", 0),
        "reasons": [*compiled.get("break_reasons", []), *compiled.get("recompile_reasons", [])],
        "notes": [str(facts[k]) for k in ("reference", "compiled_blocks", "fullgraph_refused") if k in facts],
        "profile": profile,
        "failures": side["failures"],
    }  # fmt: skip


def _noise(row: Mapping[str, Any]) -> list[str]:
    """How far Diffusers is from itself: compiled against eager."""
    texts = []
    for case, sides in row["agreement"].items():
        apart = sides.get("diffusers-tuned", {}).get("diffusers-eager")
        if apart is not None:
            texts.append(f"{case}: {_error(apart)}")
    return texts


def _parallel(v: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": v["denoiser"], "subject": v["subject"], "mode": v["mode"], "stage": v["stage"],
        "ms": f"{v['ms']:.2f}" if v.get("ms") else "", "speedup": f"{v['speedup']:.2f}" if v.get("speedup") else "",
        "kernels": f"{v['kernel_speedup']:.2f}" if v.get("kernel_speedup") else "",
        "apart": _error(v["apart"]), "bound": _error(v["bound"]), "good": v["good"], "proof": v["proof"],
    }  # fmt: skip


def _features(denoisers: set[str], generated: Path) -> list[dict[str, str]]:
    try:
        ports = read_manifest(generated).ports
    except VerifyError:
        return []
    rows = []
    for port in ports:
        if not {d.source_class for d in port.denoisers} & denoisers:
            continue
        for feature, state in port.features.items():
            evidence = state.get("evidence") or state.get("reason") or ""
            text = evidence if isinstance(evidence, str) else ", ".join(f"{k} {v}" for k, v in evidence.items())
            rows.append({"port": port.source_class, "feature": feature, "status": state["status"], "evidence": text})
    return rows


def _shape(spec: Any) -> str:
    if isinstance(spec, dict):
        kind = next(iter(spec))
        return f"{spec[kind]}" if kind in ("randn", "zeros", "ones", "randint") else f"{kind} {spec[kind]}"[:60]
    return str(spec)[:60]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
