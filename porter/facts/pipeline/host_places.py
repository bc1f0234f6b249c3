"""Places of a call that take prepared media, and places that have to stay in the worker."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct

from porter.source.marks import Mark


class Unit(Struct, frozen=True):
    """One place that takes prepared values: a statement that binds `names`, or a call, whose value has no name."""

    node: cst.CSTNode
    keys: tuple[str, ...]
    names: tuple[str, ...]


class Refused(Struct, frozen=True):
    """A place that has to stay in the worker, and why."""

    mark: Mark | None
    what: str
    reason: str
