"""How several requests share a denoising loop: one call with all prompts, or each encoded alone and then joined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import libcst as cst

from porter.facts.pipeline import Guidance, PromptAxis, Regions, Share, prompt_axis
from porter.facts.pipeline.doubling import Doubled, conditions_of, doubled_names
from porter.facts.pipeline.liveness import names_of, uses, writes
from porter.facts.pipeline.members import self_reads
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.model import Parameter
from porter.pipeline.parameters import is_setting, is_text
from porter.pipeline.pieces import Pieces
from porter.source.tree import code, find, same, self_attribute, walk


@dataclass(frozen=True, slots=True)
class Merge:
    """One call of the pipeline takes the prompts of all requests: a shared encoding, padded and masked."""


@dataclass(frozen=True, slots=True)
class Join:
    """Each request is encoded alone, and the inputs of the loop are joined where they have equal shapes.

    `arguments`: what each request brings. Of the inputs of `diffuse`, `rows` are joined (`branches` among them may hold
    both guidance branches), `counts` added up, and on `facts` the requests must agree.
    """

    arguments: tuple[str, ...]
    rows: tuple[str, ...]
    branches: tuple[str, ...]
    counts: tuple[str, ...]
    facts: tuple[str, ...]


def batching(analysis: Analysis, cut: Pieces) -> Merge | Join | Unknown:
    """How requests share a call of the port, or why they can't."""
    if _draws_for_all(analysis):
        return Unknown("the loop draws the noise of all prompts from the first one's generator")
    brought = _brought(analysis)
    axis = prompt_axis(cut.encode, brought, {h.name: h.node for h in analysis.helpers})
    if _shares_encoding(analysis, axis, padded=True):
        return Merge()
    found = _join(analysis, cut, brought, axis)
    return Merge() if isinstance(found, Unknown) and _shares_encoding(analysis, axis, padded=False) else found


def _brought(analysis: Analysis) -> tuple[str, ...]:
    arguments = {a.name.value: a for a in analysis.arguments}
    return tuple(p.name for p in analysis.parameters if _is_brought(p, arguments[p.name]))


def _shares_encoding(analysis: Analysis, axis: PromptAxis, *, padded: bool) -> bool:
    """Whether one call with all prompts gives each what a call of its own gives.

    `padded`: prompts of different lengths are padded to the longest of a call, and masks take that out again. Encoded
    alone they would seldom have the same shape. Otherwise their shapes are equal anyway.
    """
    prompt = next((a for a in analysis.arguments if a.name.value == "prompt"), None)
    if prompt is None or not is_text(prompt) or any(p.place == "media" for p in analysis.parameters):
        return False
    if any(_compares(s, axis) for s in analysis.cut.encode):
        return False
    ragged = [h.node for h in analysis.helpers if _pads_to_longest(h.node)]
    return bool(ragged) is padded and (not ragged or (all(map(_encodes_with_mask, ragged)) and _masked(analysis)))


def _compares(statement: cst.BaseStatement, axis: PromptAxis) -> bool:
    """Whether a number is found by comparing the prompts of a call."""
    calls = (c for c in find(statement, cst.Call) if isinstance(c.func, cst.Name) and c.func.value in ("max", "min"))
    return any(axis.of(n) for call in calls for a in call.args for n in uses(a.value))


def _encodes_with_mask(function: cst.FunctionDef) -> bool:
    calls = [c for c in find(function, cst.Call) if (self_attribute(c.func) or "").startswith("text_encoder")]
    return all(any("mask" in n for a in call.args for n in _said(a)) for call in calls)


def _said(argument: cst.Arg) -> set[str]:
    """The keyword of an argument, and the names in it."""
    keyword = {argument.keyword.value} if argument.keyword is not None else set()
    return (
        keyword
        | {n.value for n in find(argument.value, cst.Name)}
        | {n.attr.value for n in find(argument.value, cst.Attribute)}
    )


def _join(analysis: Analysis, cut: Pieces, brought: tuple[str, ...], axis: PromptAxis) -> Join | Unknown:
    arguments = {a.name.value: a for a in analysis.arguments}
    state = _state_of_a_request(analysis, axis)
    if state is not None:
        return Unknown(f"self.{state} is kept between encoding and denoising and belongs to one request")
    inputs = cut.loop_inputs
    passed = _iterated(analysis) & set(inputs)
    shares = {n: Share.FACT if n in passed else axis.of(n) for n in inputs}
    doubled = _doubled_elsewhere(analysis)
    for name in inputs:
        if name in doubled:
            return Unknown(f"{name} has the prompts along axis {doubled[name]}")
    texts = [n for n in inputs if n in brought and is_text(arguments[n]) and n not in writes(cut.encode)]
    if texts:
        return Unknown(f"the loop itself reads the request's {texts[0]}")
    unsure = [n for n in inputs if Share.UNSURE in shares[n] and Share.ROWS not in shares[n]]
    if unsure:
        return Unknown(f"{unsure[0]} is computed from the number of prompts in a way that is not followed")
    if not cut.returned:
        return Unknown("the loop leaves its result in lists that it fills, whose entries are not those of the prompts")
    if not any(Share.ROWS in share for share in shares.values()):
        return Unknown("nothing that the loop reads has an entry for each prompt")
    kinds = {n: _kind(share) for n, share in shares.items()}
    return Join(
        brought, tuple(n for n in inputs if kinds[n] is Share.ROWS),
        tuple(n for n in inputs if kinds[n] is Share.ROWS and Share.BRANCHES in shares[n]),
        tuple(n for n in inputs if kinds[n] is Share.COUNT), tuple(n for n in inputs if kinds[n] is Share.FACT),
    )  # fmt: skip


def _kind(share: Share) -> Share:
    return next((kind for kind in (Share.ROWS, Share.COUNT, Share.FACT) if kind in share), Share.NOTHING)


def _is_brought(parameter: Parameter, argument: cst.Param) -> bool:
    """Whether a parameter is not a setting, but something that a request brings."""
    if parameter.place in ("refused", "outputs"):
        return False
    text = code(argument.annotation.annotation) if argument.annotation is not None else ""
    if is_setting(argument):
        return False
    return parameter.place in ("prompt", "media") or parameter.name == "generator" or "Tensor" in text


def _doubled_elsewhere(analysis: Analysis) -> dict[str, int]:
    """Variables whose guidance branches, and so whose prompts, lie along another axis than the first."""
    guide = analysis.guidance
    if not isinstance(guide, Guidance) or guide.condition is None:
        return {}
    conditions = conditions_of(guide.condition, analysis.cut.encode)
    found = doubled_names(analysis.cut.encode, conditions, {h.name: h.node for h in analysis.helpers})
    return {n: value.dim for n, value in found.items() if isinstance(value, Doubled) and value.dim}


def _iterated(analysis: Analysis) -> set[str]:
    """Names whose entries loops of the denoising go through, the time steps first of all."""
    cut = analysis.cut
    nodes: Iterable[cst.CSTNode] = [cut.loop.node] if isinstance(cut, Regions) else cut.denoise
    loops = [loop.iter for node in nodes for loop in find(node, cst.For)]
    counting = [c for each in loops for c in find(each, cst.Call) if same(c.func, cst.Name("range"))]
    return {"timesteps"} | {n for each in loops for n in uses(each)} - {n for each in counting for n in uses(each)}


def _state_of_a_request(analysis: Analysis, axis: PromptAxis) -> str | None:
    """An attribute that encoding sets from what a request brings, and that later code reads."""
    read = _read_from(analysis, [*analysis.cut.denoise, *analysis.tail.statements])
    return next((n for n in sorted(analysis.kept_state & read) if axis.of(f"self.{n}")), None)


def _read_from(analysis: Analysis, statements: Iterable[cst.CSTNode]) -> set[str]:
    """Attributes and methods of the pipeline that statements read, by themselves or in methods that they call."""
    read = {n for each in statements for n in self_reads(each)}
    methods = {h.name: h.node for h in analysis.helpers}
    pending = sorted(read & methods.keys())
    while pending:
        more = self_reads(methods[pending.pop()]) - read
        read |= more
        pending += sorted(more & methods.keys())
    return read


def _draws_for_all(analysis: Analysis) -> bool:
    """Whether the loop, or a method that it calls, takes the first of several generators for all prompts."""
    read = _read_from(analysis, analysis.cut.denoise)
    reached = [*analysis.cut.denoise, *(h.node for h in analysis.helpers if h.name in read)]
    firsts = (s for each in reached for s in find(each, cst.Subscript))
    return any(
        isinstance(s.value, cst.Name) and s.value.value == "generator" and code(s).endswith("[0]") for s in firsts
    )


def _masked(analysis: Analysis) -> bool:
    guide = analysis.guidance
    names = list(guide.positive.arguments) if isinstance(guide, Guidance) else []
    if not names:
        calls = [c for s in analysis.cut.denoise for c in find(s, cst.Call)]
        names = [a.keyword.value for c in calls for a in c.args if a.keyword]
    return any("mask" in n for n in names)


def _pads_to_longest(function: cst.FunctionDef) -> bool:
    """A tokenizer call whose result an encoder reads pads to the longest prompt."""
    encoded: set[str] = set()
    for call in find(function, cst.Call):
        if (self_attribute(call.func) or "").startswith("text_encoder"):
            encoded |= {n for a in call.args for n in uses(a.value)}
    bound: dict[str, list[cst.BaseExpression]] = {}
    for assign in find(function, cst.Assign):
        for target in assign.targets:
            for name in names_of(target.target):
                bound.setdefault(name, []).append(assign.value)
    seen: set[str] = set()
    while encoded - seen:
        name = (encoded - seen).pop()
        seen.add(name)
        for value in bound.get(name, []):
            encoded |= uses(value)
    return any(_longest(node) for name in seen for value in bound.get(name, []) for node in walk(value))


def _longest(node: cst.CSTNode) -> bool:
    if not isinstance(node, cst.Call) or not (self_attribute(node.func) or "").startswith("tokenizer"):
        return False
    for arg in node.args:
        if arg.keyword is not None and arg.keyword.value == "padding":
            return code(arg.value) != '"max_length"'
    return False
