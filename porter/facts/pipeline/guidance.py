"""How a pipeline guides: the denoiser calls of one step and the expression that combines them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import libcst as cst
from msgspec import Struct, field

from porter.facts.pipeline.batched import batched_guidance, halves_first, is_batched
from porter.facts.pipeline.combination import Combination, combination, result_of
from porter.facts.pipeline.denoiser_call import Branch, Names, denoiser_call, renamed, take_process
from porter.facts.pipeline.liveness import uses
from porter.facts.pipeline.regions import Regions, denoiser_calls, model_aliases
from porter.model import Unknown
from porter.source.tree import body, find, normal, same, self_attribute

ALWAYS = cst.Name("True")


class Guidance(Struct, frozen=True):
    """One conditional call, and perhaps a second one with its condition and its combination.

    `before` runs ahead of both calls, `before_negative` only when the condition holds; arguments named in `again` are
    evaluated anew after that. `prepare` and `process` are what each branch does around its call; with `prepare`,
    `arguments` of the branches are the locals that it and `call` read. `after` runs on the guided prediction `result`.
    """

    before: tuple[cst.BaseStatement, ...]
    positive: Branch
    condition: cst.BaseExpression | None = None
    negative: Branch | None = None
    before_negative: tuple[cst.BaseStatement, ...] = ()
    combination: Combination | None = None
    output_slice: cst.BaseExpression | None = None
    after: tuple[cst.BaseStatement, ...] = field(default=())
    again: tuple[str, ...] = ()
    prepare: tuple[cst.BaseStatement, ...] = ()
    call: cst.BaseStatement | None = None
    process: tuple[cst.BaseStatement, ...] = ()

    @property
    def result(self) -> str:
        """The variable that holds the prediction for the scheduler."""
        return self.combination.result if self.combination is not None else self.positive.result

    @property
    def output(self) -> str:
        """The variable that holds one branch's prediction at its end."""
        return (result_of(self.process) if self.process else None) or self.positive.result


def guidance(
    regions: Regions,
    denoisers: Collection[str],
    forward_parameters: Names,
    helpers: Mapping[str, cst.FunctionDef],
) -> Guidance | Unknown:
    """The guidance idiom of the predict and guide regions; Unknown if it is none that splits into branches."""
    aliases = model_aliases([*regions.encode, regions.loop.node], denoisers)
    calls = [c for s in (*regions.predict, *regions.guide) for c in denoiser_calls(s, denoisers, aliases)]
    positive = denoiser_call(regions.predict[-1], calls[0], forward_parameters)
    if isinstance(positive, Unknown):
        return positive
    if is_batched(regions, positive) and (len(calls) == 1 or halves_first(regions, positive)):
        return _batched(regions, positive, helpers)
    if len(calls) > 2:
        return Unknown(f"{len(calls)} denoiser calls in one step")
    if len(calls) == 2:
        return _two_calls(regions, positive, calls[1], forward_parameters)
    output_slice, rest = _take_slice(list(regions.guide), positive.result)
    return Guidance(
        tuple(regions.predict[:-1]), positive, output_slice=output_slice, after=tuple(rest), process=positive.process
    )


def _batched(regions: Regions, positive: Branch, helpers: Mapping[str, cst.FunctionDef]) -> Guidance | Unknown:
    found = batched_guidance(regions, positive, helpers)
    if isinstance(found, Unknown):
        return found
    return Guidance(
        found.before, found.positive, found.condition, found.negative, found.before_negative, found.combination,
        after=found.after, again=found.again, prepare=found.prepare, call=found.call, process=found.process,
    )  # fmt: skip


def _two_calls(regions: Regions, positive: Branch, call: cst.Call, forward_parameters: Names) -> Guidance | Unknown:
    process, rest = take_process(regions.guide, positive.result)
    process = (*positive.process, *process)
    output_slice: cst.BaseExpression | None = None
    if len(process) == 1 and (bound := _bound(process[0], positive.result)) is not None:
        output_slice, process = bound, ()
    if not rest:
        return Unknown("the second denoiser call is not found after the first")
    guided, condition = rest[0], ALWAYS
    inner, after = list(rest), []
    if isinstance(guided, cst.If):
        condition, inner, after = guided.test, body(guided), rest[1:]  # type: ignore[assignment]
    place = next((i for i, s in enumerate(inner) if any(c is call for c in find(s, cst.Call))), None)
    if place is None or isinstance(inner[place], (cst.If, cst.For)):
        return Unknown("the second denoiser call is neither the body of an if nor beside the first one")
    negative = denoiser_call(inner[place], call, forward_parameters)
    if isinstance(negative, Unknown):
        return negative
    if positive.result in {n for s in inner[: place + 1] for n in uses(s)}:
        return Unknown("the second call reads the result of the first")
    more, combine = take_process(inner[place + 1 :], negative.result)
    more = (*negative.process, *more)
    if output_slice is not None:
        if len(more) != 1 or not same(_bound(more[0], negative.result), output_slice):
            return Unknown("the two predictions are cut differently")
    elif _normal(renamed(more, negative.result, positive.result)) != _normal(process):
        return Unknown("the two predictions are processed differently")
    result = result_of(combine)
    if result is None:
        return Unknown("the predictions are not combined")
    if isinstance(guided, cst.If) and not _unguided(guided.orelse, positive.result, result):
        return Unknown("the guided prediction is stored under another name than the unguided one")
    return Guidance(
        tuple(regions.predict[:-1]), positive, condition, negative, tuple(inner[:place]),
        combination(combine, positive.result, negative.result, result), output_slice, tuple(after), process=process,
    )  # fmt: skip


def _unguided(orelse: cst.If | cst.Else | None, positive: str, result: str) -> bool:
    """Whether without guidance the result is the positive prediction itself."""
    if orelse is None:
        return result == positive
    only = body(orelse)[0] if isinstance(orelse, cst.Else) and len(body(orelse)) == 1 else None
    if not isinstance(only, cst.SimpleStatementLine) or not isinstance(only.body[0], cst.Assign):
        return False
    assign = only.body[0]
    return same(assign.targets[0].target, cst.Name(result)) and same(assign.value, cst.Name(positive))


def _normal(statements: Sequence[cst.BaseStatement]) -> list[str]:
    return [normal(part) for s in statements for part in getattr(s, "body", [])]


def _take_slice(
    statements: Sequence[cst.BaseStatement], name: str
) -> tuple[cst.BaseExpression | None, list[cst.BaseStatement]]:
    """The bound of a leading `name = name[:, :bound]`, and the statements after it."""
    rest = list(statements)
    bound = _bound(rest[0], name) if rest else None
    return bound, rest[1:] if bound is not None else rest


def _bound(node: cst.BaseStatement, name: str) -> cst.BaseExpression | None:
    """`bound` of `name = name[:, :bound]`."""
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Assign):
        return None
    value = node.body[0].value
    if not same(node.body[0].targets[0].target, cst.Name(name)):
        return None
    if isinstance(value, cst.Subscript) and same(value.value, cst.Name(name)) and len(value.slice) == 2:
        first, second = value.slice[0].slice, value.slice[1].slice
        if isinstance(first, cst.Slice) and first.lower is first.upper is None and isinstance(second, cst.Slice):
            return second.upper if second.lower is None else None
    return None


def callee_component(callee: cst.BaseExpression) -> str | None:
    """Component name of `self.<name>`; None for a local that may hold one of several."""
    return self_attribute(callee)


__all__ = ["ALWAYS", "Branch", "Combination", "Guidance", "Names", "callee_component", "guidance"]
