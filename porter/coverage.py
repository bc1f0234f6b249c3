"""Which classes have a port, and what verification found about each: `tests/corpus/coverage.csv`.

One row for each denoiser class of the corpus and each port of the manifest, so that a class without a port is a row,
too. A test compares the checked-in table with this one: new passes and new failures are both committed knowingly.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "class",
    "port",
    "lines",
    "rules",
    "hint",
    "weights",
    "module",
    "module_cases",
    "module_error",
    "tensor_parallel",
    "tensor_parallel_error",
    "block_share",
    "pipeline",
    "cfg_parallel",
    "step_execution",
    "request_batch",
    "serve",
)
"""Errors are relative L2; `block_share` is the largest part of the repeated blocks' parameters that one of two
ranks holds."""


def table(generated: Path, corpus: Path, hints: Path) -> str:
    """The table as CSV text.

    `generated` holds the manifest, `corpus` the configurations of denoisers, `hints` the rules for single models.
    Raises OSError or ValueError when the manifest can't be read.
    """
    manifest = json.loads((generated / "manifest.json").read_text(encoding="utf-8"))
    hinted = {path.stem for path in hints.glob("*.yaml")}
    rows: dict[str, dict[str, str]] = {path.stem: {"port": "no"} for path in corpus.glob("configs/*.yaml")}
    for port in manifest["ports"]:
        for denoiser in port["denoisers"].values():
            rows[_short(denoiser["source"])] = {"port": port["folder"], **_size(generated, port["folder"], denoiser)}
    for port in manifest["ports"]:
        name = _short(port["source"])
        if name not in rows:
            rows[name] = {"port": port["folder"], **_size(generated, port["folder"], port)}
        rows[name].update(_proof(port["features"]))
        classes = {_short(d["source"]) for d in port["denoisers"].values()}
        if len(classes) == 1:
            denoiser_row = rows[classes.pop()]
            for column, value in _proof(port["features"], _OF_DENOISER).items():
                denoiser_row.setdefault(column, value)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name in sorted(rows):
        writer.writerow({"class": name, "hint": "yes" if name in hinted else "", **rows[name]})
    return text.getvalue()


_OF_DENOISER = ("weights", "transformer", "tensor_parallel")


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _size(generated: Path, folder: str, module: Mapping[str, Any]) -> dict[str, str]:
    """Lines of a module and the number of rules that had a part in them."""
    name = f"{module['module']}.py"
    traced = json.loads((generated / folder / "port.json").read_text(encoding="utf-8"))["lines"].get(name, [])
    rules = {rule for *_, names in traced for rule in names if not rule.startswith("template:")}
    lines = (generated / folder / name).read_text(encoding="utf-8").count("\n")
    return {"lines": str(lines), "rules": str(len(rules))}


def _proof(features: Mapping[str, Mapping[str, Any]], only: tuple[str, ...] | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, state in features.items():
        if only is not None and name not in only:
            continue
        column = "module" if name == "transformer" else name
        evidence = state.get("evidence")
        figures: Mapping[str, Any] = evidence if isinstance(evidence, dict) else {}
        if column in COLUMNS:
            found[column] = str(state.get("status", ""))
        if column in ("module", "tensor_parallel") and "worst_rel_l2" in figures:
            found[f"{column}_error"] = f"{figures['worst_rel_l2']:.1e}"
        if column == "module" and "cases" in figures:
            found["module_cases"] = str(figures["cases"])
        if figures.get("block_elements_per_rank"):
            share = max(figures["block_elements_per_rank"]) / figures["block_elements"]
            found["block_share"] = f"{share:.2f}"
    return found
