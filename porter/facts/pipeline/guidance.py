"""How a pipeline guides: the denoiser calls of one step and the expression that combines them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import libcst as cst

from porter.facts.pipeline.liveness import uses, writes
from porter.facts.pipeline.regions import Regions, denoiser_calls, model_aliases
from porter.model import Unknown
from porter.source.tree import arguments, body, expression, normal, same, self_attribute


@dataclass(frozen=True, slots=True)
class Branch:
    """One denoiser call: `result = callee(**arguments)[0]`."""

    callee: cst.BaseExpression
    arguments: Mapping[str, cst.BaseExpression]
    result: str


@dataclass(frozen=True, slots=True)
class Combination:
    """What is done with the two predictions. `scale` and `normalize` are set when it is the textbook formula.

    `statements` bind `result` from the results of both branches and from `reads`.
    """

    statements: tuple[cst.BaseStatement, ...]
    result: str
    reads: tuple[str, ...]
    scale: cst.BaseExpression | None = None
    normalize: bool = False

    @property
    def textbook(self) -> bool:
        return self.scale is not None


@dataclass(frozen=True, slots=True)
class Guidance:
    """One conditional call, and perhaps a second one with its condition and its combination.

    `before` runs ahead of both calls, `before_negative` only when the condition holds.
    """

    before: tuple[cst.BaseStatement, ...]
    positive: Branch
    condition: cst.BaseExpression | None = None
    negative: Branch | None = None
    before_negative: tuple[cst.BaseStatement, ...] = ()
    combination: Combination | None = None
    output_slice: cst.BaseExpression | None = None
    after: tuple[cst.BaseStatement, ...] = field(default=())

    @property
    def idiom(self) -> str:
        return "two calls" if self.negative is not None else "one call"


Names = Callable[[cst.BaseExpression], Sequence[str] | Unknown]
"""Parameter names of a denoiser's forward, for calls that pass positional arguments."""


def guidance(regions: Regions, denoisers: Collection[str], forward_parameters: Names) -> Guidance | Unknown:
    """The guidance idiom of the predict and guide regions; Unknown if it is none that splits into branches."""
    aliases = model_aliases([*regions.encode, regions.loop.node], denoisers)
    calls = [c for s in (*regions.predict, *regions.guide) for c in denoiser_calls(s, denoisers, aliases)]
    if len(calls) > 2:
        return Unknown(f"{len(calls)} denoiser calls in one step")
    positive = _branch(regions.predict[-1], calls[0], forward_parameters)
    if isinstance(positive, Unknown):
        return positive
    rest = list(regions.guide)
    output_slice, rest = _take_slice(rest, positive.result)
    if len(calls) == 1:
        return _one_call(regions, positive, output_slice, rest)
    if not rest or not isinstance(rest[0], cst.If) or rest[0].orelse is not None:
        return Unknown("the second denoiser call is not the body of an if without else")
    return _two_calls(regions, positive, output_slice, rest, calls[1], forward_parameters)


def _one_call(
    regions: Regions, positive: Branch, output_slice: cst.BaseExpression | None, rest: list[cst.BaseStatement]
) -> Guidance | Unknown:
    for statement in rest:
        if isinstance(statement, cst.If) and positive.result in writes([statement]) & uses(statement):
            return Unknown("one call predicts several branches at once (batched guidance)")
    return Guidance(tuple(regions.predict[:-1]), positive, output_slice=output_slice, after=tuple(rest))


def _two_calls(
    regions: Regions,
    positive: Branch,
    output_slice: cst.BaseExpression | None,
    rest: list[cst.BaseStatement],
    call: cst.Call,
    forward_parameters: Names,
) -> Guidance | Unknown:
    guided = rest[0]
    assert isinstance(guided, cst.If)
    inner = body(guided)
    place = next((i for i, s in enumerate(inner) if any(c is call for c in _all_calls(s))), None)
    negative = _branch(inner[place], call, forward_parameters) if place is not None else Unknown("the call is nested")
    if isinstance(negative, Unknown) or place is None:
        return negative if isinstance(negative, Unknown) else Unknown("the call is nested")
    if not same(positive.callee, negative.callee):
        return Unknown("the two calls go to different denoisers")
    if positive.result in {n for s in inner[:place] for n in uses(s)}:
        return Unknown("the second call reads the result of the first")
    sliced, combine = _take_slice(inner[place + 1 :], negative.result)
    if not _same_or_none(sliced, output_slice):
        return Unknown("the two predictions are cut differently")
    result = _result(combine)
    if result != positive.result:
        return Unknown("the guided prediction is stored under another name than the unguided one")
    combination = _combination(combine, positive.result, negative.result, result)
    return Guidance(
        tuple(regions.predict[:-1]), positive, guided.test, negative, tuple(inner[:place]), combination, output_slice,
        tuple(rest[1:]),
    )  # fmt: skip


def _all_calls(node: cst.CSTNode):  # noqa: ANN202 - iterator
    from porter.source.tree import find

    return find(node, cst.Call)


def _same_or_none(left: cst.BaseExpression | None, right: cst.BaseExpression | None) -> bool:
    return same(left, right)


def _branch(statement: cst.BaseStatement, call: cst.Call, forward_parameters: Names) -> Branch | Unknown:
    if not isinstance(statement, cst.SimpleStatementLine) or not isinstance(statement.body[0], cst.Assign):
        return Unknown("the denoiser call is not a plain assignment")
    assign = statement.body[0]
    target = assign.targets[0].target
    if not isinstance(target, cst.Name) or len(assign.targets) != 1:
        return Unknown("the denoiser's result is unpacked")
    if not _is_first_output(assign.value, call):
        return Unknown("the denoiser's result is processed in the same statement")
    names: Sequence[str] | Unknown = ()
    if any(a.keyword is None and not a.star for a in call.args):
        names = forward_parameters(call.func)
    if isinstance(names, Unknown):
        return names
    bound = arguments(call, names)
    if bound is None:
        return Unknown("the denoiser call unpacks its arguments")
    return Branch(call.func, bound, target.value)


def _is_first_output(value: cst.BaseExpression, call: cst.Call) -> bool:
    """`call(...)[0]` or `call(...).sample`."""
    if isinstance(value, cst.Subscript) and value.value is call and len(value.slice) == 1:
        index = value.slice[0].slice
        return isinstance(index, cst.Index) and isinstance(index.value, cst.Integer) and index.value.value == "0"
    return isinstance(value, cst.Attribute) and value.value is call and value.attr.value == "sample"


def _take_slice(
    statements: Sequence[cst.BaseStatement], name: str
) -> tuple[cst.BaseExpression | None, list[cst.BaseStatement]]:
    """The bound of a leading `name = name[:, :bound]`, and the statements after it."""
    rest = list(statements)
    if rest and isinstance(rest[0], cst.SimpleStatementLine) and isinstance(rest[0].body[0], cst.Assign):
        assign = rest[0].body[0]
        value = assign.value
        if isinstance(value, cst.Subscript) and same(value.value, cst.Name(name)) and len(value.slice) == 2:
            first, second = value.slice[0].slice, value.slice[1].slice
            if isinstance(first, cst.Slice) and first.lower is first.upper is None and isinstance(second, cst.Slice):
                if second.lower is None and second.upper is not None and same(assign.targets[0].target, value.value):
                    return second.upper, rest[1:]
    return None, rest


def _result(statements: Sequence[cst.BaseStatement]) -> str | None:
    last = statements[-1] if statements else None
    if isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[0], cst.Assign):
        target = last.body[0].targets[0].target
        return target.value if isinstance(target, cst.Name) else None
    if isinstance(last, cst.If):
        return _result(body(last))
    return None


def _combination(statements: Sequence[cst.BaseStatement], positive: str, negative: str, result: str) -> Combination:
    values: list[cst.BaseExpression] = []
    for s in statements:
        if not isinstance(s, cst.SimpleStatementLine) or not isinstance(s.body[0], cst.Assign):
            values = []
            break
        target = s.body[0].targets[0].target
        values.append((target.value if isinstance(target, cst.Name) else "", s.body[0].value))
    bound = {positive, negative} | set(writes(statements))
    reads = tuple(sorted({n for s in statements for n in uses(s)} - bound))
    scale = _textbook_scale(values[0][1], positive, negative) if values else None
    if scale is not None and len(values) == 1:
        return Combination(tuple(statements), result, reads, scale)
    if scale is not None and _is_norm_rescale(values[1:], values[0][0], positive):
        return Combination(tuple(statements), result, reads, scale, normalize=True)
    return Combination(tuple(statements), result, reads)


def _textbook_scale(value: cst.BaseExpression, positive: str, negative: str) -> cst.BaseExpression | None:
    """`s` of `negative + s * (positive - negative)`."""
    difference = normal(expression(f"{positive} - {negative}"))
    if not isinstance(value, cst.BinaryOperation) or not isinstance(value.operator, cst.Add):
        return None
    product = value.right
    if not same(value.left, cst.Name(negative)) or not isinstance(product, cst.BinaryOperation):
        return None
    if not isinstance(product.operator, cst.Multiply):
        return None
    for scale, other in ((product.left, product.right), (product.right, product.left)):
        if normal(other) == difference and not {positive, negative} & uses(scale):
            return scale
    return None


def _is_norm_rescale(values: Sequence[tuple[str, cst.BaseExpression]], combined: str, positive: str) -> bool:
    """The three statements of the engine's own `cfg_normalize_function`."""
    if len(values) != 3:
        return False
    (condition, first), (norm, second), (_, third) = values
    wanted = [
        f"torch·norm({positive}, dim=-1, keepdim=True)",
        f"torch·norm({combined}, dim=-1, keepdim=True)",
        f"{combined} * ({condition} / {norm})",
    ]
    return [normal(v) for v in (first, second, third)] == [normal(expression(w)) for w in wanted]


def callee_component(callee: cst.BaseExpression) -> str | None:
    """Component name of `self.<name>`; None for a local that may hold one of several."""
    return self_attribute(callee)
