"""The pieces of a pipeline whose denoising is one piece: loops in loops, several schedulers, several results."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.facts.pipeline.liveness import always_writes, live_before, uses, writes
from porter.facts.pipeline.stages import Stages
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.pieces import Pieces, bound_before, initialise, ordered
from porter.pipeline.predicting import returns
from porter.pipeline.refused import without_refused
from porter.source.marks import inherit
from porter.source.tree import body, find, statement


def whole_pieces(analysis: Analysis) -> Pieces:
    """Pieces of a call in three stages: `diffuse` runs the second one from start to end."""
    cut = analysis.cut
    assert isinstance(cut, Stages)
    decode = analysis.tail.statements
    before, written = bound_before(analysis), writes(cut.denoise) | _changed(cut.denoise)
    after = live_before([*decode, returns(analysis.tail.result)]) & (before | written)
    returned = ordered(after & written, cut.denoise)
    inputs = ordered(live_before(cut.denoise, returned) & before, cut.denoise)
    decode_inputs = ordered(after - written, decode)
    unsure = [n for n in returned if n not in {*inputs, *_written(cut.denoise)}]
    denoise = [
        *(inherit(statement(f"{n} = None"), cut.denoise[0], "initialise-optional") for n in unsure),
        *cut.denoise,
    ]
    reads = {n for s in (*cut.encode, *cut.denoise, *decode) for n in uses(s)}
    encode = initialise(cut.encode, analysis, [n for n in (*inputs, *decode_inputs) if n in reads])
    return Pieces(
        encode=tuple(encode), predict=(), overrides=(), step=(), step_scheduler=(), decode=tuple(decode), noise="",
        extras=(), carried=(), returned=tuple(returned), loop_inputs=tuple(inputs), predict_inputs=(),
        decode_inputs=tuple(decode_inputs), step_inputs=(), splits=False, sample=None, stepwise=Unknown(cut.reason),
        denoise=tuple(without_refused(s) for s in denoise),
    )  # fmt: skip


def _changed(statements: Sequence[cst.BaseStatement]) -> frozenset[str]:
    """Names of tensors of which the statements set a part."""
    targets = (t.target for s in statements for a in find(s, cst.Assign) for t in a.targets)
    parts = (t.value for t in targets if isinstance(t, cst.Subscript))
    return frozenset(p.value for p in parts if isinstance(p, cst.Name))


def _written(statements: Sequence[cst.BaseStatement]) -> frozenset[str]:
    """Names that the statements bind for sure, if every loop runs at least once."""
    found = set(always_writes(statements))
    for each in statements:
        if isinstance(each, (cst.For, cst.While, cst.With)):
            found |= _written(body(each))
    return frozenset(found)
