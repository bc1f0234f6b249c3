"""Definitions that one process reads from the source for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from porter.model import Definition
from porter.source.library import Library
from porter.source.shipping import packed, unpacked
from porter.targets import Target
from porter.transformer.port import shared_classes

Parcel = tuple[str, str, str, str, bytes]
"""Canonical name; name, module and file of the definition; its packed tree."""


def shipped(library: Library, target: Target) -> Iterator[Parcel]:
    """Definitions of other files that the ports of a target's denoisers will ask for."""
    for name in dict.fromkeys(n for q in target.denoisers.values() for n in shared_classes(library, q)):
        before = library.entry(name)
        found = library.definition(name)
        if isinstance(found, Definition) and library.entry(name) == before:  # else reading it set its lines right
            yield name, found.name, found.module, found.file, packed(found.node)


class Shipment:
    """What arrives, by name; `arrived` gives what has come since it was asked last."""

    def __init__(self, arrived: Callable[[], list[object]]) -> None:
        self._arrived = arrived
        self._parcels: dict[str, Parcel] = {}

    def definition(self, name: str) -> Definition | None:
        """The definition of that canonical name, if it has come."""
        for parcel in cast(list[Parcel], self._arrived()):
            self._parcels[parcel[0]] = parcel
        if name not in self._parcels:
            return None
        _, short, module, file, tree = self._parcels.pop(name)
        return Definition(short, unpacked(tree), module, file)  # type: ignore[arg-type]
