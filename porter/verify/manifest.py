"""generated/manifest.json: which ports exist, and what is known about their features. No torch here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porter.emit.write import write_atomically
from porter.evidence import cited, read_evidence, reader
from porter.verify.outcome import VerifyError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Denoiser:
    """One denoiser class of a port. `component` is its name in the pipeline (transformer, transformer_2, ...)."""

    component: str
    source: str
    folder: str
    module: str
    cls: str

    @property
    def source_class(self) -> str:
        return self.source.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class Port:
    """One row of the manifest. `module`, `cls` and the process functions are None until the pipeline converts."""

    source: str
    arch: str
    folder: str
    module: str | None
    cls: str | None
    pre_process: str | None
    post_process: str | None
    denoisers: tuple[Denoiser, ...]
    features: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source_class(self) -> str:
        return self.source.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class Manifest:
    path: Path
    diffusers: str
    engine: str
    ports: tuple[Port, ...]

    def denoisers(self) -> dict[str, Denoiser]:
        """Each denoiser class once, by the name of its Diffusers class."""
        found: dict[str, Denoiser] = {}
        for port in self.ports:
            for denoiser in port.denoisers:
                found.setdefault(denoiser.source_class, denoiser)
        return found


def _port(row: Mapping[str, Any], where: str) -> Port:
    missing = [k for k in ("source", "arch", "folder", "denoisers") if k not in row]
    if missing:
        raise VerifyError(f"{where}: a port lacks {', '.join(missing)}", "run porter convert again")
    denoisers = tuple(
        Denoiser(name, d["source"], d.get("folder", row["folder"]), d["module"], d["class"])
        for name, d in row["denoisers"].items()
    )
    return Port(
        row["source"], row["arch"], row["folder"], row.get("module"), row.get("class"),
        row.get("pre_process"), row.get("post_process"), denoisers, row.get("features", {}),
    )  # fmt: skip


def read_manifest(generated: Path | str) -> Manifest:
    """Read and check `generated/manifest.json`. Raises VerifyError with one clear sentence."""
    path = Path(generated) / "manifest.json"
    if not path.is_file():
        raise VerifyError(
            f"{path} does not exist", "run porter convert first, or give the folder it wrote to", "PORT013"
        )
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not valid JSON: {error.msg}"
        raise VerifyError(message, "run porter convert again", "PORT013") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise VerifyError(
            f"{path}: schema {SCHEMA} is needed", "it was written by another version of porter", "PORT013"
        )
    ports = tuple(_port(row, str(path)) for row in data.get("ports", ()))
    return Manifest(path, data.get("diffusers", ""), data.get("engine", ""), ports)


def find(manifest: Manifest, name: str) -> tuple[Port | None, tuple[Denoiser, ...]]:
    """The port or denoiser that `name` (a Diffusers class) means. Raises VerifyError listing what there is."""
    for port in manifest.ports:
        if name in (port.source_class, port.arch, port.source):
            return port, port.denoisers
    denoiser = manifest.denoisers().get(name.rsplit(".", 1)[-1])
    if denoiser is not None:
        return None, (denoiser,)
    known = {p.source_class for p in manifest.ports} | set(manifest.denoisers())
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], sorted(known), n=3)
    advice = (
        f"near it: {', '.join(close)}" if close else f"porter status --ports --out {manifest.path.parent} lists them"
    )
    raise VerifyError(f"no port of {name} in {manifest.path}", advice, "PORT013")


def refresh_features(generated: Path | str, evidence: Path | str) -> None:
    """Let the manifest cite what the evidence says about today's code; other features stay. Atomic."""
    path = Path(generated) / "manifest.json"
    data = json.loads(path.read_text())
    known = read_evidence(Path(evidence))
    for row in data["ports"]:
        old = row.get("features", {})
        found = cited(row, known, reader(Path(generated)))
        # What conversion could not derive was skipped by the run: its reason stands.
        found = {
            n: f
            for n, f in found.items()
            if f["status"] != "not tested" or old.get(n, {}).get("status") != "unsupported"
        }
        features = {**old, **found}
        row["features"] = dict(sorted(features.items()))
    write_atomically({path.name: json.dumps(data, indent=2) + "\n"}, path.parent)
