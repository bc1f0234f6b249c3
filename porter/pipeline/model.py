"""Values of the pipeline half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct, field

from porter.model import Diagnostic, SiteStatus, Unit

Place = Literal["outputs", "sampling", "prompt", "media", "extra", "refused"]
Status = Literal["generated", "limited", "unsupported"]


class Denoiser(Struct, frozen=True):
    """The ported class behind one component: `from .<module> import <cls>` gives it."""

    component: str
    source: str
    module: str
    cls: str


class Parameter(Struct, frozen=True):
    """Where one `__call__` parameter is found in a request.

    `key` is the field or dictionary key; `filler` the value that the engine itself puts there when the caller gave none.
    """

    name: str
    place: Place
    key: str
    default: str | None
    filler: object = None
    reason: str = ""


class Feature(Struct, frozen=True):
    """What the generated pipeline offers, before anybody has run it."""

    status: Status
    reason: str = ""


class PipelinePort(Struct, frozen=True):
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
