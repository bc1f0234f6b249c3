"""The scheduler of one request: step execution gives each request a copy of its own."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec.structs import replace

from porter.facts.pipeline import Regions
from porter.facts.pipeline.liveness import uses
from porter.source.tree import find, self_attribute, transform

SCHEDULER = "scheduler"
"""The loop's name for it."""


def own_scheduler(cut: Regions) -> Regions:
    """The regions with `self.scheduler` as a local in the prediction, if that reads more of it than its configuration."""
    prediction = (*cut.predict, *cut.guide)
    reads = {n.attr.value for s in prediction for n in find(s, cst.Attribute) if self_attribute(n.value) == SCHEDULER}
    if reads <= {"config", "order"} or any(SCHEDULER in uses(s) for s in cut.denoise):
        return cut

    def local(statements: Sequence[cst.BaseStatement]) -> tuple[cst.BaseStatement, ...]:
        return tuple(transform(s, {cst.Attribute: scheduler_name}) for s in statements)

    return replace(cut, predict=local(cut.predict), guide=local(cut.guide))


def scheduler_name(original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
    """`self.scheduler` -> `scheduler`."""
    return cst.Name(SCHEDULER) if self_attribute(original) == SCHEDULER else updated
