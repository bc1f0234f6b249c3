"""Where a checkpoint says how many samples a second of sound has."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.components import Component
from porter.model import Unknown
from porter.source.library import Library
from porter.source.tree import method, parameters

KEYS = ("output_sampling_rate", "sampling_rate", "sample_rate")
"""Names of the constructor parameter, that of the last stage of sound first."""


class SampleRate(Struct, frozen=True):
    """`<component>/config.json` has it under `key`."""

    component: str
    key: str


def sample_rate(library: Library, components: Sequence[Component]) -> SampleRate | Unknown:
    """The component whose configuration holds the rate of what the pipeline returns."""
    taken = {c.name: _constructor_parameters(library, c) for c in components if c.role in ("vae", "module")}
    for key in KEYS:
        for name, names in taken.items():
            if key in names:
                return SampleRate(name, key)
    return Unknown("no component is built with a sample rate")


def _constructor_parameters(library: Library, component: Component) -> frozenset[str]:
    found: set[str] = set()
    for name in component.classes:
        definition = library.definition(name) if name.startswith("diffusers.") else Unknown("not of Diffusers")
        if isinstance(definition, Unknown) or not isinstance(definition.node, cst.ClassDef):
            continue
        constructor = method(definition.node, "__init__")
        found |= {p.name.value for p in parameters(constructor)} if constructor is not None else set()
    return frozenset(found)
