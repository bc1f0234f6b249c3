"""Op: heads are normed and turned by one call."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, inserted, removed, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.normed_rotation import Stream
from porter.facts.rotation import Turn
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

CALL = absolute("porter_template.norm_and_rotate")


@op("norm_and_rotate")
def norm_and_rotate(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Each stream of tokens is normed and turned, by its part of the table, ahead of the statement that joins them."""
    streams, turn, gone, place = (site.lookup(f"rotation.{n}") for n in ("streams", "turn", "gone", "place"))
    assert isinstance(streams, tuple) and isinstance(turn, Turn) and isinstance(gone, tuple)
    assert isinstance(place, cst.BaseStatement)
    lines = []
    for position, stream in enumerate(streams):
        assert isinstance(stream, Stream)
        split = f"{streams[0].query}.shape[1]" if len(streams) > 1 else ""
        cos, sin = turn.waves(stop=split) if position == 0 else turn.waves(start=split)
        q, k = stream.norms
        call = f"{CALL}({stream.query}, {stream.key}, self.{q}, self.{k}, {cos}, {sin})"
        lines.append(tree.statement(f"{stream.query}, {stream.key} = {call}"))
    if place in gone:
        return [replaced(place, *lines), removed(*(s for s in gone if s is not place))]
    return [inserted(place, lines, after=False), removed(*gone)]
