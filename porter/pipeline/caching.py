"""What Cache-DiT has to know of a pipeline: it reuses results of earlier steps, and counts nothing but calls of a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import libcst as cst

from porter.facts.pipeline import Guidance
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.source.tree import body, find, replace_nodes, same, self_attribute, statement

PREDICT = "predict_noise"
ONE_STEP = "denoise_step"
REFUSE = "refuse_cache_dit"
BEGIN = "begin_anew"
STEPS = frozenset({"step", "scheduler_step_maybe_with_cfg", "predict_guided_noise"})
"""Methods that a loop of steps calls: the scheduler's own, the engine's for ranks of guidance, and the one of this template."""

Branches = Literal["", "two", "several"]


def branches_of(analysis: Analysis) -> Branches:
    """How the branches of guidance call one denoiser in a step: two of them, several that a guider makes, or not at all."""
    guide = analysis.guidance
    if not isinstance(analysis.branches, Unknown):
        return "several"
    if not isinstance(guide, Guidance) or guide.negative is None:
        return ""
    return "two" if same(guide.positive.callee, guide.negative.callee) else ""


def told_of_cache(node: cst.BaseStatement, denoisers: Collection[str], branches: Branches) -> cst.BaseStatement:
    """The class of a pipeline, with what Cache-DiT has to be told: where a loop of steps begins, and what it must refuse."""
    edits = [*_beginnings(node, denoisers), *_refusals(node, denoisers, branches)]
    lines: dict[int, tuple[cst.CSTNode, list[str]]] = {}
    for place, said in edits:
        lines.setdefault(id(place), (place, []))[1].append(said)
    planned = [(place, _after(tuple(dict.fromkeys(said)))) for place, said in lines.values()]
    return cst.ensure_type(replace_nodes(node, planned), cst.BaseStatement)


def _after(said: tuple[str, ...]) -> Callable[[Any], cst.FlattenSentinel[cst.CSTNode]]:
    """A statement after some others; its comments and empty lines come first."""

    def edit(place: Any) -> cst.FlattenSentinel[cst.CSTNode]:
        first, *others = map(statement, said)
        first = first.with_changes(leading_lines=place.leading_lines)
        return cst.FlattenSentinel([first, *others, place.with_changes(leading_lines=())])

    return edit


def _refusals(
    node: cst.BaseStatement, denoisers: Collection[str], branches: Branches
) -> Iterator[tuple[cst.CSTNode, str]]:
    """A refusal before each call that Cache-DiT would take for another step: every call beside those of guidance branches, and
    every one of a denoiser but its first where there are no branches."""
    known: set[str] = set()
    for method in find(node, cst.FunctionDef):
        if branches and method.name.value == PREDICT:
            continue
        for place, call in _calls(method):
            name = self_attribute(call.func)
            if name is None or name not in denoisers:
                continue
            if branches or name in known:
                yield place, f"{REFUSE}(self.{name})"
            known.add(name)


def _calls(method: cst.FunctionDef) -> Iterator[tuple[cst.BaseStatement, cst.Call]]:
    """Every call of a method with the statement before which something can be done first: its line, or the statement whose
    header it is in."""
    before: dict[int, cst.BaseStatement] = {}  # nothing can stand before an elif but its if
    for place in find(method, cst.SimpleStatementLine, cst.If, cst.While, cst.For, cst.With):
        first = before.get(id(place), place)
        if isinstance(place, cst.If) and place.orelse is not None:
            before[id(place.orelse)] = first
        for part in _own_parts(place):
            yield from ((first, call) for call in find(part, cst.Call))


def _own_parts(place: cst.CSTNode) -> Sequence[cst.CSTNode]:
    """What a statement computes itself, without the statements in it."""
    if isinstance(place, (cst.If, cst.While)):
        return [place.test]
    if isinstance(place, cst.For):
        return [place.iter]
    return place.items if isinstance(place, cst.With) else [place]


def _beginnings(node: cst.BaseStatement, denoisers: Collection[str]) -> Iterator[tuple[cst.CSTNode, str]]:
    """Before each innermost loop of steps: each denoiser begins anew. A loop of steps predicts noise or asks a scheduler for a
    step; that of step execution goes over requests."""
    methods = [m for m in find(node, cst.FunctionDef) if m.name.value != ONE_STEP]
    for loop in (loop for method in methods for loop in _step_loops(method)):
        if not any(_step_loops(inside) for inside in body(loop)):
            yield from ((loop, f"{BEGIN}(self.{name})") for name in sorted(denoisers))


def _step_loops(node: cst.CSTNode) -> list[cst.For | cst.While]:
    return [loop for loop in find(node, cst.For, cst.While) if any(_is_step(c) for c in find(loop, cst.Call))]


def _is_step(call: cst.Call) -> bool:
    return isinstance(call.func, cst.Attribute) and call.func.attr.value in STEPS


def said_of_cache(node: cst.CSTNode) -> frozenset[str]:
    """The functions of the template that the code of a class calls."""
    called = {c.func.value for c in find(node, cst.Call) if isinstance(c.func, cst.Name)}
    return frozenset(called & {REFUSE, BEGIN})
