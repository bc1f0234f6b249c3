"""Who runs a workload. Each side is a process of its own: the engine switches off cuDNN attention where it is imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from porter.resources import BENCHMARKS
from porter.verify.manifest import Manifest
from porter.verify.outcome import VerifyError

BACKENDS = ("_flash_3", "native")
"""Diffusers' attention backends that the tuned side tries: FlashAttention 3, and torch's choice (cuDNN on Hopper)."""


@dataclass(frozen=True, slots=True)
class Side:
    """`program` is the worker's side: diffusers, engine, or adapter (Diffusers' class in a process of the engine).

    `label` is for people; `subject` is reference, diffusers, hand or port. Compiled code is `static` where it is made for
    each shape anew; the engine's runner compiles for all shapes at once, unless `diffusion_compile_dynamic` is off. Where they
    are asked for, a port's blocks are replayed as CUDA `graphs`.
    """

    name: str
    label: str
    program: str
    subject: str
    compiled: bool = False
    static: bool = False
    graphs: bool = False


REFERENCE = Side("reference", "Diffusers float32", "diffusers", "reference")
SIDES = {
    s.name: s
    for s in (
        Side("diffusers-eager", "Diffusers eager", "diffusers", "diffusers"),
        Side("diffusers-dynamic", "Diffusers compiled for all shapes", "diffusers", "diffusers", compiled=True),
        Side(
            "diffusers-tuned",
            "Diffusers compiled, best attention",
            "diffusers",
            "diffusers",
            compiled=True,
            static=True,
        ),
        Side("adapter", "engine's Diffusers adapter", "adapter", "diffusers"),
        Side("hand-eager", "engine's hand port eager", "engine", "hand"),
        Side("hand-compiled", "engine's hand port compiled", "engine", "hand", compiled=True),
        Side("hand-static", "engine's hand port compiled, static shapes", "engine", "hand", compiled=True, static=True),
        Side("port-eager", "generated port eager", "engine", "port"),
        Side("port-compiled", "generated port compiled", "engine", "port", compiled=True),
        Side("port-static", "generated port compiled, static shapes", "engine", "port", compiled=True, static=True),
        Side(
            "port-graphs",
            "generated port compiled, CUDA graphs",
            "engine",
            "port",
            compiled=True,
            static=True,
            graphs=True,
        ),
    )
}


def sides_of(subject: str) -> tuple[str, ...]:
    """Names of all sides of a subject; the adapter is none of Diffusers' own."""
    return tuple(s.name for s in SIDES.values() if s.subject == subject and s.program != "adapter")


def same_mode(side: str, present: Collection[str]) -> str | None:
    """The side of Diffusers whose rounding a side is judged by: in the same mode, among those `present`.

    Compiled code rounds less often than eager code, and code for all shapes more often than code for one. Where Diffusers
    was not compiled for all shapes, its static code is what there is. None for Diffusers' own sides.
    """
    if side not in SIDES or side in sides_of("diffusers"):
        return None
    own = SIDES[side]
    compiled = ["diffusers-tuned"] if own.static else ["diffusers-dynamic", "diffusers-tuned"]
    return next((name for name in (compiled if own.compiled else ["diffusers-eager"]) if name in present), None)


def hand_ports(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """benchmarks/hand_ports.yaml: denoiser -> the engine's own class. Raises VerifyError for a broken row."""
    path = path or BENCHMARKS / "hand_ports.yaml"
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, row in rows.items():
        if missing := {"arch", "module", "class", "constructor"} - set(row):
            raise VerifyError(f"{path}: {name} lacks {', '.join(sorted(missing))}")
        if unknown := set(row) - {"arch", "module", "class", "constructor", "derived"}:
            raise VerifyError(f"{path}: {name} has unknown keys {', '.join(sorted(unknown))}")
    return rows


def load_job(
    side: Side,
    denoiser: str,
    config: Mapping[str, Any],
    *,
    manifest: Manifest,
    generated: Path,
    buffers: str,
    cuda: bool,
) -> dict[str, Any] | None:
    """The worker's `load` job of a side; None where the side does not exist for this denoiser."""
    job: dict[str, Any] = {"job": "load", "denoiser": denoiser, "config": dict(config)}
    if side.compiled:
        options = ({"graphs": True} if side.graphs else {}) if cuda else {"backend": "eager"}
        job |= {"compile": True, "dynamic": not side.static, "compile_options": options}
    if side.subject == "reference":
        return job | {"reference": True, "buffers": buffers}
    if side.program == "adapter":
        return job | {"first_backend": True, "backends": [] if cuda else ["native"]}
    if side.subject == "diffusers":
        return job | {"backends": list(BACKENDS if side.compiled and cuda else ("native",))}
    row = subject_of(side.subject, denoiser, manifest, generated)
    return None if row is None else job | row | {"buffers": buffers, "rank": 0, "world": 1}


def subject_of(subject: str, denoiser: str, manifest: Manifest, generated: Path) -> dict[str, Any] | None:
    """What an engine worker needs to find a hand-written (`hand`) or generated (`port`) class."""
    if subject == "hand":
        hand = hand_ports().get(denoiser)
        return None if hand is None else {"arch": hand["arch"], "hand": hand}
    found = manifest.denoisers().get(denoiser)
    if found is None:
        return None
    arch = next(p.arch for p in manifest.ports if any(d.source == found.source for d in p.denoisers))
    return {
        "arch": arch, "generated": str(generated.resolve()), "folder": found.folder, "module": found.module,
        "class": found.cls,
    }  # fmt: skip
