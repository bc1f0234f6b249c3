"""`port.json`: how a folder came about. Digests, site statuses, symbol decisions, request parameters, line map."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

if TYPE_CHECKING:
    from porter.convert import _Conversion
    from porter.emit.linemap import Finished


def port_record(folder: str, run: _Conversion, finished: Mapping[str, Finished]) -> str:
    """Text of one folder's record."""
    transformers = [t for t in run.transformers.values() if t.folder == folder]
    pipelines = [p for f, p in run.pipelines.values() if f == folder]
    used = {t.source.rpartition(".")[0] for t in transformers} | {_module(run, p.source) for p in pipelines}
    digests = {m.file: m.digest for name in sorted(used) if (m := run.library.module(name)) is not None}
    data: dict[str, Any] = {
        "schema": 1,
        "diffusers": run.library.version,
        "digests": digests,
        "transformers": {
            t.class_name: {
                "source": t.source,
                "merged": {m.name: [[s, i] for s, i in m.sources] for m in t.merges},
                "sites": _statuses(t),
                "symbols": t.decisions,
                "diagnostics": sorted({f"{d.code} {d.message}" for d in t.diagnostics}),
            }
            for t in transformers
        },
        "pipelines": {
            p.arch: {
                "source": p.source,
                "sites": _statuses(p),
                "parameters": [asdict(q) for q in p.parameters],
                "features": {n: asdict(f) for n, f in p.features.items()},
                "diagnostics": sorted({f"{d.code} {d.message}" for d in p.diagnostics}),
            }
            for p in pipelines
        },
        "lines": {n.partition("/")[2]: f.lines.to_json() for n, f in finished.items() if n.startswith(folder + "/")},
    }
    return _compact(data)


def _module(run: _Conversion, public: str) -> str:
    return run.library.canonical(public).rpartition(".")[0]


def _statuses(port: Any) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for status in port.statuses:
        counts.setdefault(status.rule, Counter())[status.status] += 1
    return {rule: dict(sorted(c.items())) for rule, c in sorted(counts.items())}


def _compact(data: dict[str, Any]) -> str:
    """Indented JSON with one run of lines per row: readable in a diff."""
    lines = data.pop("lines")
    text = json.dumps(data, indent=1, sort_keys=False)
    files = []
    for name in sorted(lines):
        rows = ",\n   ".join(json.dumps(row) for row in lines[name])
        files.append(f"  {json.dumps(name)}: [\n   {rows}\n  ]")
    joined = ",\n".join(files)
    return text.rstrip("\n").removesuffix("}").rstrip() + f',\n "lines": {{\n{joined}\n }}\n}}\n'
