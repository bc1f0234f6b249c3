"""What verification found, bound to the code it ran: `tests/corpus/evidence.json`.

One record per Diffusers class: what was found about a denoiser is bound to its own file, what was found about a pipeline
to its file and those of its denoisers. So each denoiser is proven once, whichever ports use it, and a change in one
pipeline leaves the proof of all others alone. `porter verify` writes records; a conversion copies those whose code is
still the same into the manifest's `features` and says "not tested" for the others. A claim can't outlive its code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from porter.model import Diagnostic, PorterError

PROVENANCE = "# Ported by"
"""Start of the header line that names the rule set; it changes with every rule, the code below it is what was run."""

ORDER = ("validated", "not tested", "limited", "unsupported")
"""Statuses from best to worst: a port with several denoisers is as good as its worst one."""

Read = Callable[[str], str]
"""Gives the text of a file by its path below `generated/`."""

_RELATIVE = re.compile(r"^from \.(\w+) import ", re.MULTILINE)


class Finding(Struct, frozen=True):
    """What one run found about a class: feature states, seconds of work per feature, digest of the cases it ran."""

    features: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    cases: str = ""


def code_digest(folder: str, modules: Iterable[str], read: Read) -> str:
    """SHA-256 over the code of modules of a folder and of what they import from it."""
    total = hashlib.sha256()
    for _, text in sorted(_closure(folder, modules, read).items()):
        lines = text.split("\n")
        total.update("\n".join(line for line in lines if not line.startswith(PROVENANCE)).encode())
    return total.hexdigest()


def _closure(folder: str, modules: Iterable[str], read: Read) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = read(f"{folder}/{module}.py")
            waiting += _RELATIVE.findall(found[module])
    return found


def short(source: str) -> str:
    """The class name of a qualified one."""
    return source.rpartition(".")[2]


def digests(port: Mapping[str, Any], read: Read) -> dict[str, str]:
    """Digest of each class of a manifest row (`folder`, `source`, `module`, `denoisers`): denoisers, then the pipeline."""
    denoisers = port["denoisers"].values()
    found = {short(d["source"]): code_digest(port["folder"], [d["module"]], read) for d in denoisers}
    if port["module"]:
        modules = [port["module"], *(d["module"] for d in denoisers)]
        found[short(port["source"])] = code_digest(port["folder"], modules, read)
    return found


def features_of(record: Mapping[str, Any] | None, digest: str) -> dict[str, Any]:
    """Features proven for exactly this code."""
    if not record or record.get("digest") != digest:
        return {}
    return dict(record["features"])


def cited(port: Mapping[str, Any], known: Mapping[str, Any], read: Read) -> dict[str, Any]:
    """Features of a manifest row that hold for its code: of its denoisers, the worst of each, and of its pipeline."""
    found = {name: features_of(known.get(name), digest) for name, digest in digests(port, read).items()}
    own = found.pop(short(port["source"])) if port["module"] else {}
    names = {feature for states in found.values() for feature in states}
    merged = {
        feature: max(
            (states.get(feature, {"status": "not tested", "reason": f"{cls} was not run"}) for cls, states in found.items()),
            key=lambda state: ORDER.index(state["status"]),
        )
        for feature in names
    }  # fmt: skip
    return dict(sorted({**merged, **own}.items()))


def read_evidence(path: Path | None) -> dict[str, Any]:
    """All records by class name; none where there is no file. Raises PorterError (PORT013) if it is not evidence."""
    if path is None or not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PorterError(Diagnostic("PORT013", f"{path} is no evidence: {error}")) from None
    if not isinstance(data, dict):
        raise PorterError(Diagnostic("PORT013", f"{path} is no evidence: it has no records by class name"))
    return data


def remember(path: Path, generated: Path, findings: Mapping[str, Finding]) -> None:
    """Add findings about classes of ports below `generated`. What was found about other code goes."""
    known = read_evidence(path)
    manifest = json.loads((generated / "manifest.json").read_text(encoding="utf-8"))
    current: dict[str, str] = {}
    for port in manifest["ports"]:
        if findings.keys() & {short(port["source"]), *(short(d["source"]) for d in port["denoisers"].values())}:
            current.update(digests(port, reader(generated)))
    for name, found in findings.items():
        if name in current:
            known[name] = _record(known.get(name), current[name], found)
    from porter.emit.write import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path.name: json.dumps(dict(sorted(known.items())), indent=1) + "\n"}, path.parent)


def reader(generated: Path) -> Read:
    """Texts of the files of a folder."""
    return lambda name: (generated / name).read_text(encoding="utf-8")


def _record(old: Mapping[str, Any] | None, digest: str, found: Finding) -> dict[str, Any]:
    kept: Mapping[str, Any] = old if old and old.get("digest") == digest else {}
    features = {**kept.get("features", {}), **{k: dict(v) for k, v in found.features.items()}}
    cases = {**kept.get("cases", {}), **dict.fromkeys(found.features, found.cases)}
    seconds = {**kept.get("seconds", {}), **{k: round(v, 1) for k, v in found.seconds.items()}}
    return {
        "digest": digest,
        "features": dict(sorted(features.items())),
        "cases": dict(sorted(cases.items())),
        "seconds": dict(sorted(seconds.items())),
    }
