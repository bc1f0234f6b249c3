"""`manifest.json`: what was ported and what is known about it. Other tools rely on this file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from porter import pins
from porter.evidence import cited

if TYPE_CHECKING:
    from porter.model import Diagnostic
    from porter.pipeline import PipelinePort
    from porter.targets import Target
    from porter.transformer.port import TransformerPort

ENGINE = " ".join(pins.ENGINE)
UNTESTED = "not tested"


class PortEntry(Struct, frozen=True):
    """One port. `module`, `cls` and the process functions are None while only the denoiser is ported."""

    source: str
    arch: str
    folder: str
    module: str | None
    cls: str | None
    pre_process: str | None
    post_process: str | None
    denoisers: Mapping[str, Mapping[str, str]]
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def modules(self) -> list[str]:
        """Modules of the folder that make up this port."""
        return sorted({d["module"] for d in self.denoisers.values()} | ({self.module} if self.module else set()))

    @classmethod
    def of_pipeline(
        cls,
        folder: str,
        port: PipelinePort,
        transformers: Mapping[str, TransformerPort],
        files: Mapping[str, str],
        proven: Mapping[str, Any],
    ) -> PortEntry:
        """Entry of a whole port. Evidence counts only for exactly the code it was gathered on."""
        by_source = {t.source: t for t in transformers.values()}
        denoisers = {d.component: _denoiser(by_source[d.source]) for d in port.denoisers}
        entry = cls(
            port.source, port.arch, folder, port.module, port.cls, port.pre_process, port.post_process, denoisers
        )
        features: dict[str, Mapping[str, Any]] = {}
        for name, feature in port.features.items():
            unsupported = feature.status != "generated"
            features[name] = (
                {"status": feature.status, "reason": feature.reason} if unsupported else {"status": UNTESTED}
            )
        features.update(_proven(entry, files, proven))
        features.update(_derived([by_source[d.source] for d in port.denoisers], features))
        return _with_features(entry, features)

    @classmethod
    def of_target(
        cls,
        target: Target,
        transformers: Mapping[str, TransformerPort],
        files: Mapping[str, str],
        proven: Mapping[str, Any],
        blocked: Diagnostic | None = None,
    ) -> PortEntry:
        """Entry of a port that is a transformer so far, with what keeps its pipeline from being one."""
        denoisers = {component: _denoiser(transformers[q]) for component, q in target.denoisers.items()}
        folder = transformers[next(iter(target.denoisers.values()))].folder
        entry = cls(f"diffusers.{target.name}", target.name, folder, None, None, None, None, denoisers)
        features = _proven(entry, files, proven)
        if blocked is not None:
            place = f" at {blocked.span.file}:{blocked.span.line}" if blocked.span else ""
            features["pipeline"] = {"status": "unsupported", "reason": f"{blocked.code}{place}: {blocked.message}"}
        features.update(_derived([transformers[q] for q in target.denoisers.values()], features))
        return _with_features(entry, features)

    def row(self) -> dict[str, Any]:
        """The entry as the manifest has it, keys in the order of the contract."""
        return {
            "source": self.source,
            "arch": self.arch,
            "folder": self.folder,
            "module": self.module,
            "class": self.cls,
            "pre_process": self.pre_process,
            "post_process": self.post_process,
            "denoisers": self.denoisers,
            "features": self.features,
        }


def _denoiser(port: TransformerPort) -> dict[str, str]:
    return {"source": f"diffusers.{port.class_name}", "module": port.module, "class": port.class_name}


def _derived(ports: Sequence[TransformerPort], known: Mapping[str, Any]) -> dict[str, Any]:
    """What conversion itself found out about the denoisers: a mode that can't be derived is unsupported."""
    reason = next((p.whole_sequence for p in ports if p.whole_sequence is not None), None)
    if reason is not None:
        return {"sequence_parallel": {"status": "unsupported", "reason": reason}}
    return {} if "sequence_parallel" in known else {"sequence_parallel": {"status": UNTESTED}}


def _proven(entry: PortEntry, files: Mapping[str, str], proven: Mapping[str, Any]) -> dict[str, Any]:
    return cited(entry.row(), proven, files.__getitem__)


def _with_features(entry: PortEntry, features: Mapping[str, Mapping[str, Any]]) -> PortEntry:
    from msgspec.structs import replace

    return replace(entry, features=dict(sorted(features.items())))


class Manifest(Struct, frozen=True):
    """The whole catalogue."""

    diffusers: str
    ports: tuple[PortEntry, ...]


def manifest_text(manifest: Manifest) -> str:
    """JSON text, keys in the order of the contract."""
    data = {"schema": 1, "diffusers": manifest.diffusers, "engine": ENGINE, "ports": [p.row() for p in manifest.ports]}
    return _text(data)


def with_ports(text: str, others: Sequence[Mapping[str, Any]]) -> str:
    """The text of a manifest with ports of other folders beside its own, in the same order and manner."""
    data = json.loads(text)
    ports = sorted([*others, *data["ports"]], key=lambda p: (str(p["folder"]), str(p["arch"])))
    return _text({**data, "ports": ports})


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
