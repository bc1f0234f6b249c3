"""Every denoiser and pipeline in scope, what became of it, and what verification found: `tests/corpus/coverage.csv`.

A row for each denoiser class of the corpus, each live pipeline of tiers 1 and 2, and whatever else has a port; also for
those without one, with what blocks them. A test compares the checked-in table with this one, so that new passes and new
failures are both committed knowingly.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from porter.catalogue import LivePipeline, live_pipelines
from porter.evidence import digests, read_evidence, reader, short

ABOUT = ("class", "kind", "tier", "family", "port", "blocked_by", "lines", "rules", "hints", "op_share", "diagnostics")
DENOISER = {
    "weights": "weights", "module": "transformer", "tp": "tensor_parallel", "sp": "sequence_parallel", "bf16": "bfloat16",
}  # fmt: skip
PARTS = ("encode", "latents", "decoded", "defaults", "guidance", "media")
PIPELINE = {
    "cfg": "cfg_parallel",
    "step": "step_execution",
    "batch": "request_batch",
    "cache": "cache_dit",
    "serve": "serving",
}
FIGURES = ("module_cases", "module_error", "tp_error", "rank_share", "sp_error", "bf16_ratio", "latents_error")
COLUMNS = (*ABOUT, *DENOISER, *PARTS, *PIPELINE, *FIGURES, "seconds")
"""`op_share`: part of the rewritten sites that Python ops handled. `rank_share`: largest part of the denoiser's parameters
on one of two ranks. `bf16_ratio`: error in bfloat16 relative to that of Diffusers. Errors are relative L2. `seconds`: work
of the rungs."""

Row = dict[str, str]


def table(generated: Path, corpus: Path, hints: Path, evidence: Path | None = None) -> str:
    """The table as CSV text. Raises OSError or ValueError when the manifest or the catalogue can't be read."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(generated, corpus, hints, evidence))
    return text.getvalue()


def rows(generated: Path, corpus: Path, hints: Path, evidence: Path | None = None) -> list[Row]:
    """Denoisers, then pipelines, by name. `hints` is the folder of rules for single models; `evidence` by default the
    corpus' own."""
    about = _About(generated, corpus, evidence)
    denoisers = _denoiser_rows(about, {path.stem for path in hints.glob("*.yaml")})
    found = (denoisers, _pipeline_rows(about, denoisers))
    return [{"class": name, **kind[name]} for kind in found for name in sorted(kind)]


class _About:
    """What is on file: ports and their records, live pipelines, and the evidence that holds for the code of today."""

    def __init__(self, generated: Path, corpus: Path, evidence: Path | None) -> None:
        self.corpus = corpus
        self.read = reader(generated)
        self.ports = json.loads(self.read("manifest.json"))["ports"]
        self.live = {p.name: p for p in live_pipelines(corpus)}
        self.ops = rules_with_ops()
        self._records = {p["folder"]: json.loads(self.read(f"{p['folder']}/port.json")) for p in self.ports}
        known = read_evidence(evidence or corpus / "evidence.json")
        current = {name: digest for port in self.ports for name, digest in digests(port, self.read).items()}
        self._proven = {n: known[n] for n, digest in current.items() if known.get(n, {}).get("digest") == digest}

    def features(self, name: str) -> dict[str, Any]:
        return dict(self._proven.get(name, {}).get("features", {}))

    def size(self, folder: str, module: str, kind: str, name: str) -> Row:
        """Where a class is, how long, which rules had a part in it, what was diagnosed, how long its rungs took."""
        record = self._records[folder]
        about = record.get(kind, {}).get(name, {})
        traced = record["lines"].get(f"{module}.py", [])
        rules = {rule for *_, names in traced for rule in names if not rule.startswith("template:")}
        sites, by_ops = handled(about.get("sites", {}), self.ops)
        codes = Counter(text.split()[0] for text in about.get("diagnostics", ()))
        seconds = sum(self._proven.get(name, {}).get("seconds", {}).values())
        return {
            "port": folder,
            "lines": str(self.read(f"{folder}/{module}.py").count("\n")),
            "rules": str(len(rules)),
            "op_share": f"{by_ops / sites:.2f}" if sites else "",
            "diagnostics": " ".join(f"{code}:{n}" if n > 1 else code for code, n in sorted(codes.items())),
            "seconds": f"{seconds:.0f}" if seconds else "",
        }


def _denoiser_rows(about: _About, hinted: set[str]) -> dict[str, Row]:
    scope = {d for p in about.live.values() if p.in_scope for d in p.denoisers}
    scope |= {path.stem for path in about.corpus.glob("configs/*.yaml")}
    found: dict[str, Row] = {name: {"port": "no", "blocked_by": "no port"} for name in scope}
    for port in about.ports:
        for denoiser in port["denoisers"].values():
            name = short(denoiser["source"])
            row = about.size(port["folder"], denoiser["module"], "transformers", denoiser["class"])
            found[name] = row | _proof_of_denoiser(about.features(name))
    hint = {name: {"hints": "1"} if name in hinted else {} for name in found}
    return {name: {"kind": "denoiser", **row, **hint[name]} for name, row in found.items()}


def _pipeline_rows(about: _About, denoisers: Mapping[str, Row]) -> dict[str, Row]:
    ports = {short(p["source"]): p for p in about.ports if short(p["source"]) not in denoisers}
    found: dict[str, Row] = {}
    for name in {p.name for p in about.live.values() if p.in_scope} | set(ports):
        live, port = about.live.get(name), ports.get(name)
        row = {"kind": "pipeline"} | ({"tier": live.tier, "family": live.family} if live else {})
        if port is not None and port["module"] is not None:
            row |= about.size(port["folder"], port["module"], "pipelines", port["arch"])
            row |= _proof_of_pipeline({**port["features"], **about.features(name)})
        else:
            row |= {"port": "no", "blocked_by": _blocked(port, live, denoisers)}
        found[name] = row
    return found


def _blocked(port: Mapping[str, Any] | None, live: LivePipeline | None, denoisers: Mapping[str, Row]) -> str:
    """Why a pipeline has no port: what its conversion said, or a denoiser that has none."""
    if port is not None:
        return str(port["features"].get("pipeline", {}).get("reason", "")) or "the pipeline is not converted"
    lacking = [d for d in (live.denoisers if live else ()) if denoisers.get(d, {}).get("port") == "no"]
    return f"no port of {', '.join(lacking)}" if lacking else "not converted"


def rules_with_ops(rules: Path | None = None) -> frozenset[str]:
    """Rules some case of which is a Python op."""
    from porter.engine.load import load_rules
    from porter.resources import RULES

    return frozenset(r.spec.rule for r in load_rules(rules or RULES).rules if any(c.op for c in r.spec.cases))


def handled(sites: Mapping[str, Mapping[str, int]], ops: Iterable[str]) -> tuple[int, int]:
    """Sites that rules rewrote, and how many of them by rules with ops; `sites` is {rule: {status: number}}."""
    counts = {rule: states.get("applied", 0) + states.get("inferred", 0) for rule, states in sites.items()}
    return sum(counts.values()), sum(counts.get(rule, 0) for rule in ops)


def _evidence(features: Mapping[str, Any], feature: str) -> Mapping[str, Any]:
    found = features.get(feature, {}).get("evidence")
    return found if isinstance(found, dict) else {}


def _proof_of_denoiser(features: Mapping[str, Any]) -> Row:
    row = {column: features[f]["status"] for column, f in DENOISER.items() if f in features}
    module, tp = _evidence(features, "transformer"), _evidence(features, "tensor_parallel")
    if "cases" in module:
        row["module_cases"] = str(module["cases"])
    sp = _evidence(features, "sequence_parallel")
    for column, figures in (("module_error", module), ("tp_error", tp), ("sp_error", sp)):
        if "worst_rel_l2" in figures:
            row[column] = f"{figures['worst_rel_l2']:.1e}"
    if tp.get("elements"):
        row["rank_share"] = f"{max(tp['elements_per_rank']) / tp['elements']:.2f}"
    ratio = _evidence(features, "bfloat16").get("error_ratio")
    return row | ({"bf16_ratio": f"{ratio:.2f}"} if ratio is not None else {})


def _proof_of_pipeline(features: Mapping[str, Any]) -> Row:
    row = {column: features[f]["status"] for column, f in PIPELINE.items() if f in features}
    figures = _evidence(features, "pipeline")
    row |= {part: status for part, status in figures.get("parts", {}).items() if part in PARTS}
    return row | ({"latents_error": f"{figures['worst_rel_l2']:.1e}"} if "worst_rel_l2" in figures else {})
