"""The guider of one request: it keeps state from step to step, so step execution gives each request a copy of its own."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec.structs import replace

from porter.facts.pipeline import Regions
from porter.facts.pipeline.liveness import uses, writes
from porter.source.marks import inherit
from porter.source.tree import find, same, self_attribute, statement, transform


def own_guider(cut: Regions) -> Regions:
    """The regions with a guider that is a component as a local of the loop, which the end of the encode region binds."""
    names = [n for n in map(self_attribute, _told(cut.predict)) if n is not None]
    taken = {n for s in (*cut.encode, *cut.denoise) for n in (*uses(s), *writes([s]))}
    names = [n for n in dict.fromkeys(names) if n not in taken]
    if not names:
        return cut

    def name(original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
        held = self_attribute(original)
        return cst.Name(held) if held in names else updated

    def local(statements: Sequence[cst.BaseStatement]) -> tuple[cst.BaseStatement, ...]:
        return tuple(transform(s, {cst.Attribute: name}) for s in statements)

    bound = [inherit(statement(f"{n} = self.{n}"), cut.predict[0], "own-guider") for n in names]
    return replace(cut, encode=(*cut.encode, *bound), predict=local(cut.predict), guide=local(cut.guide))


def guiders(cut: Regions) -> tuple[str, ...]:
    """Names of the loop's guiders."""
    return tuple(dict.fromkeys(o.value for o in _told(cut.predict) if isinstance(o, cst.Name)))


def _told(predict: Sequence[cst.BaseStatement]) -> list[cst.BaseExpression]:
    """Objects that are told the step before they prepare the inputs of a prediction."""
    functions = [c.func for s in predict for c in find(s, cst.Call) if isinstance(c.func, cst.Attribute)]
    prepared = [f.value for f in functions if f.attr.value == "prepare_inputs"]
    return [f.value for f in functions if f.attr.value == "set_state" and any(same(f.value, p) for p in prepared)]
