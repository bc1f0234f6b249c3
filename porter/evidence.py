"""What verification found, bound to the code it ran: `tests/corpus/evidence.json`.

`porter verify --record` writes it; a conversion copies it into the manifest's `features` for every port whose code is
still the same, and says "not tested" for the others. So a claim can't outlive the code it was made about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PROVENANCE = "# Ported by"
"""Start of the header line that names the rule set; it changes with every rule, the code below it is what was run."""


def code_digest(folder: str, modules: Iterable[str], read: Callable[[str], str]) -> str:
    """SHA-256 over the code of one port; `read` gives the text of a file by its path below `generated/`."""
    total = hashlib.sha256()
    for module in sorted(set(modules)):
        lines = read(f"{folder}/{module}.py").split("\n")
        total.update("\n".join(line for line in lines if not line.startswith(PROVENANCE)).encode())
    return total.hexdigest()


def features_of(record: Mapping[str, Any] | None, digest: str) -> dict[str, Any]:
    """Features proven for exactly this code."""
    if not record or record.get("digest") != digest:
        return {}
    return dict(record["features"])


def remember(path: Path, generated: Path, states: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Add feature states, {arch: {feature: state}}, of ports below `generated`. What was found about other code goes."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    manifest = json.loads((generated / "manifest.json").read_text(encoding="utf-8"))
    for port in manifest["ports"]:
        found = states.get(port["arch"])
        if not found:
            continue
        modules = [d["module"] for d in port["denoisers"].values()] + ([port["module"]] if port["module"] else [])
        digest = code_digest(port["folder"], modules, lambda name: (generated / name).read_text(encoding="utf-8"))
        features = {**features_of(known.get(port["arch"]), digest), **{k: dict(v) for k, v in found.items()}}
        known[port["arch"]] = {"digest": digest, "features": dict(sorted(features.items()))}
    from porter.emit.write import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path.name: json.dumps(dict(sorted(known.items())), indent=1) + "\n"}, path.parent)
