"""Values of the pipeline half."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from porter.model import Diagnostic, SiteStatus, Unit

Place = Literal["outputs", "sampling", "prompt", "media", "extra", "refused"]
Status = Literal["generated", "limited", "unsupported"]


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The ported class behind one component: `from .<module> import <cls>` gives it."""

    component: str
    source: str
    module: str
    cls: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """Where one `__call__` parameter is found in a request.

    `key` is the field or dictionary key; `filler` the value that the engine itself puts there when the caller gave none.
    """

    name: str
    place: Place
    key: str
    default: str | None
    filler: object = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Feature:
    """What the generated pipeline offers, before anybody has run it."""

    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PipelinePort:
    """A generated pipeline file: an absolute, line-marked unit and what port.json and manifest.json say about it."""

    source: str
    arch: str
    module: str
    cls: str
    unit: Unit
    parameters: tuple[Parameter, ...]
    features: Mapping[str, Feature]
    pre_process: str | None
    post_process: str | None
    denoisers: tuple[Denoiser, ...]
    denoiser_reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()
    statuses: tuple[SiteStatus, ...] = ()
    siblings: Mapping[str, str] = field(default_factory=dict)
