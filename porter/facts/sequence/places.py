"""Places of a plan: which variables hold tokens where the region starts, and where they are put together."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct


class Gather(Struct, frozen=True):
    """After which statement the result is whole again: the call of a module of the root (`module`), or the end of the last
    loop (None); `variable` holds it and `stream` are its tokens. `also` are further variables, at the same place."""

    statement: cst.BaseStatement
    module: str | None
    variable: str
    stream: str
    also: tuple[Gather, ...] = ()


class Stream(Struct, frozen=True):
    """A variable that holds tokens where the region starts, along `axis` of `rank`; `tokens` names the stream whose tokens they
    are (a mask has those of its text, say)."""

    name: str
    rank: int
    axis: int
    tokens: str
