"""What Cache-DiT has to know of a pipeline: it reuses results of earlier steps, and counts nothing but calls of a denoiser."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import libcst as cst

from porter.facts.pipeline import Guidance
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.source.tree import find, replace_nodes, same, self_attribute, statement

PREDICT = "predict_noise"
REFUSE = "refuse_cache_dit"

Branches = Literal["", "two", "several"]


def branches_of(analysis: Analysis) -> Branches:
    """How the branches of guidance call one denoiser in a step: two of them, several that a guider makes, or not at all."""
    guide = analysis.guidance
    if not isinstance(analysis.branches, Unknown):
        return "several"
    if not isinstance(guide, Guidance) or guide.negative is None:
        return ""
    return "two" if same(guide.positive.callee, guide.negative.callee) else ""


def with_refusals(node: cst.BaseStatement, denoisers: Collection[str], branches: Branches) -> cst.BaseStatement:
    """The class of a pipeline, with a refusal before each call that Cache-DiT would take for another step: every call beside
    those of guidance branches, and every one but the first where there are no branches."""
    calls = [
        (line, name)
        for method in find(node, cst.FunctionDef)
        if not branches or method.name.value != PREDICT
        for line in find(method, cst.SimpleStatementLine)
        if (name := _called(line, denoisers)) is not None
    ]
    edits: list[tuple[cst.CSTNode, Any]] = [
        (line, cst.FlattenSentinel([statement(f"{REFUSE}(self.{name})"), line]))
        for line, name in (calls if branches else calls[1:])
    ]
    return cst.ensure_type(replace_nodes(node, edits), cst.BaseStatement) if edits else node


def _called(line: cst.CSTNode, denoisers: Collection[str]) -> str | None:
    return next((n for c in find(line, cst.Call) if (n := self_attribute(c.func)) in denoisers), None)


def is_refusing(node: cst.CSTNode) -> bool:
    """Whether the code of a class refuses Cache-DiT somewhere."""
    return any(isinstance(c.func, cst.Name) and c.func.value == REFUSE for c in find(node, cst.Call))
