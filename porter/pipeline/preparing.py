"""Media that the engine process prepares: the pre-process function, and the places of the port that take what it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.pipeline.host_media import HostMedia, host_media, host_statements
from porter.facts.pipeline.host_places import Refused, Unit
from porter.facts.pipeline.host_program import changed_by
from porter.facts.pipeline.host_values import INDEX, HostValues, draws_noise
from porter.facts.pipeline.liveness import live_before, uses, writes
from porter.facts.pipeline.members import is_property
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.parameters import declaration, is_setting
from porter.pipeline.pieces import Pieces
from porter.pipeline.reads import kept_constructor
from porter.pipeline.render import render
from porter.source.library import Library
from porter.source.marks import inherit
from porter.source.names import absolute, referenced
from porter.source.tree import (
    children,
    code,
    expression,
    find,
    keyword_argument,
    parameters,
    replace_nodes,
    self_attribute,
    statement,
    transform,
)

PROCESSOR = "diffusers.image_processor.VaeImageProcessor"
ARGUMENT = "prepared_media"
RULE = "take-prepared-media"


class Preparing(Struct, frozen=True):
    """The pre-process function: what it reads once, and its program over the parameters of the call."""

    configs: tuple[tuple[str, bool], ...]
    index: bool
    constructor: tuple[cst.BaseStatement, ...]
    program: tuple[cst.BaseStatement, ...]
    parameters: tuple[str, ...]
    media: HostMedia


def preparing(library: Library, analysis: Analysis, cut: Pieces) -> Preparing | Unknown:
    """What of the request's media the engine process can prepare; Unknown if it is nothing."""
    media = {p.name for p in analysis.parameters if p.place == "media"}
    given = {p.name for p in analysis.parameters if p.place != "refused"}
    own = {n: n for n in _assigned(kept_constructor(analysis))}
    local = given | writes(cut.encode) | {n for h in analysis.helpers for n in writes([h.node])}
    own = {n: f"model_{n}" if n in local else n for n in own}
    plain = HostValues(library, analysis.members, analysis.components, {})
    constructor, known = host_statements([_local(s, own) for s in kept_constructor(analysis)], plain)
    values = HostValues(
        library,
        analysis.members,
        analysis.components,
        {n: k for n, k in own.items() if k in known},
        [h.name for h in analysis.helpers if _is_function(h.node)],
    )
    found = host_media(
        cut.encode,
        given,
        media,
        _processors(library, analysis),
        {h.name: h.node for h in analysis.helpers},
        values,
        {*cut.loop_inputs, *cut.decode_inputs},
    )
    if not found.units:
        return Unknown(_reason(found.refused, analysis))
    needed = live_before(found.program)
    kept = _needed(constructor, needed & set(own.values()))
    nodes = [*kept, *found.program]
    named = {n.value for each in nodes for n in find(each, cst.Name)}
    configs = tuple((c.name, c.optional) for c in analysis.components if f"{c.name}_config" in named)
    return Preparing(
        configs,
        INDEX in named or any(optional for _, optional in configs),
        tuple(kept),
        found.program,
        tuple(p.name for p in analysis.parameters if p.name in needed & given),
        found,
    )


def _reason(refused: Sequence[Refused], analysis: Analysis) -> str:
    if not refused:
        place = f"{analysis.call_span}: " if analysis.call_span else ""
        return f"{place}nothing of the media goes through an image or video processor before a model gets it"
    return "; ".join(dict.fromkeys(stays(r) for r in refused))


def stays(refused: Refused) -> str:
    """One place that the worker keeps, as text."""
    place = f"{refused.mark.file}:{refused.mark.line}: " if refused.mark is not None else ""
    return f"{place}{refused.what} stays in the worker, {refused.reason}"


def _is_function(method: cst.FunctionDef) -> bool:
    """Whether a method reads nothing of its object, draws no noise, and leaves its arguments as they are."""
    if is_property(method) or any(n.value == "self" for n in find(method.body, cst.Name)) or draws_noise(method):
        return False
    given = {p.name.value for p in parameters(method)}
    owners = (changed_by(call) for call in find(method.body, cst.Call))
    return not any(owner is not None and uses(owner) & given for owner in owners)


def _assigned(statements: Sequence[cst.BaseStatement]) -> list[str]:
    found = [self_attribute(t.target) for s in statements for a in find(s, cst.Assign) for t in a.targets]
    return [n for n in dict.fromkeys(found) if n is not None]


def _local(node: cst.BaseStatement, names: dict[str, str]) -> cst.BaseStatement:
    def renamed(original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
        name = self_attribute(original)
        return cst.Name(names[name]) if name in names else updated

    return transform(node, {cst.Attribute: renamed})


def _processors(library: Library, analysis: Analysis) -> frozenset[str]:
    """Attributes that the constructor sets to an image or video processor."""
    found = set()
    for each in kept_constructor(analysis):
        for assign in find(each, cst.Assign):
            calls = [referenced(c.func) for c in find(assign.value, cst.Call)]
            if any(PROCESSOR in (library.canonical(c), *library.ancestors(c)) for c in calls if c is not None):
                found |= {n for t in assign.targets if (n := self_attribute(t.target)) is not None}
    return frozenset(found)


def _needed(statements: Sequence[cst.BaseStatement], live: frozenset[str]) -> list[cst.BaseStatement]:
    out: list[cst.BaseStatement] = []
    wanted = set(live)
    for each in reversed(statements):
        if writes([each]) & wanted:
            wanted = set(live_before([each], wanted))
            out.append(each)
    return list(reversed(out))


def takes_media(analysis: Analysis) -> bool:
    """Whether a request may bring a picture, a video or sound."""
    settings = {a.name.value for a in analysis.arguments if is_setting(a)}
    return any(p.place == "media" and p.name not in settings for p in analysis.parameters)


def pre_process_function(analysis: Analysis, prepared: Preparing, name: str, dummy: bool) -> list[cst.BaseStatement]:
    """The factory of the engine's pre-process function. `dummy`: arguments depend on whether a request is a dummy run."""
    arguments = {a.name.value: a for a in analysis.arguments}
    return render(
        "pipeline/pre_process.py.jinja",
        {"constructor": prepared.constructor, "program": prepared.program},
        name=name,
        cls=analysis.members.cls.name,
        index=prepared.index,
        configs=prepared.configs,
        dummy=dummy,
        signature=[declaration(arguments[n]) for n in prepared.parameters],
    )


def with_prepared(analysis: Analysis, cut: Pieces, found: HostMedia) -> tuple[Analysis, Pieces]:
    """The call and its methods, taking what is prepared where it is there."""
    encode = [new for s in cut.encode for new in _flat(_taking(s, found))]
    cls = analysis.members.cls.name
    called = {n.attr.value for s in found.program for n in find(s, cst.Attribute) if code(n.value) == cls}
    helpers = tuple(
        replace(h, node=_static(h.node))
        if h.name in called
        else replace(h, node=_with_argument(_taking(h.node, found), h.name in found.methods))
        for h in analysis.helpers
    )
    return replace(analysis, helpers=helpers), replace(cut, encode=tuple(encode))


def _static(function: cst.FunctionDef) -> cst.FunctionDef:
    """A method that reads nothing of its object, callable without one."""
    if any(code(d.decorator) in ("staticmethod", "classmethod") for d in function.decorators):
        return function
    (_, *rest), lines = function.params.params, function.leading_lines
    static = cst.Decorator(cst.Name("staticmethod"), leading_lines=lines)
    return function.with_changes(
        params=function.params.with_changes(params=rest), decorators=[static, *function.decorators], leading_lines=[]
    )


def _flat(new: object) -> list[cst.BaseStatement]:
    return list(new) if isinstance(new, cst.FlattenSentinel) else [cast(cst.BaseStatement, new)]


def _with_argument(function: cst.FunctionDef, takes: bool) -> cst.FunctionDef:
    if not takes:
        return function
    kind, empty = absolute("collections.abc.Mapping"), absolute("types.MappingProxyType")
    text = f"def f({ARGUMENT}: {kind}[str, {absolute('typing.Any')}] = {empty}({{}})): pass"
    (new,) = cast(cst.FunctionDef, statement(text)).params.params
    params = function.params
    if params.kwonly_params:
        return function.with_changes(params=params.with_changes(kwonly_params=[*params.kwonly_params, new]))
    return function.with_changes(params=params.with_changes(params=[*params.params, new]))


def _taking(node: cst.CSTNode, found: HostMedia):  # noqa: ANN202 - the same class
    """The node with its units as branches on what is prepared."""
    edits: list[tuple[cst.CSTNode, object]] = []
    units = {id(u.node): u for u in found.units}
    calls = {id(c) for c in found.methods.values()}
    whole = [n for n in _below(node, units) if isinstance(n, cst.BaseStatement)]
    edits += [(n, _branch(units[id(n)])) for n in whole]
    for line in find(node, cst.SimpleStatementLine):
        inner = [c for c in find(line, cst.Call) if id(c) in units]
        if inner:
            edits.append((line, _line(line, [units[id(c)] for c in inner])))
    for call in find(node, cst.Call):
        if id(call) in calls:
            edits.append((call, _passing))
    return replace_nodes(node, edits) if edits else node


def _passing(call: cst.Call) -> cst.Call:
    plain = [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) if a is call.args[-1] else a for a in call.args]
    return call.with_changes(args=[*plain, keyword_argument(ARGUMENT, cst.Name(ARGUMENT))])


def _below(node: cst.CSTNode, wanted: dict[int, Unit]) -> list[cst.CSTNode]:
    if id(node) in wanted:
        return [node]
    return [n for child in children(node) for n in _below(child, wanted)]


def _branch(unit: Unit) -> cst.If:
    """`if "x" in prepared_media: x = prepared_media["x"]`, else what the source has."""
    node = cast("cst.SimpleStatementLine | cst.If | cst.For", unit.node)
    taken = [statement(f'{name} = {ARGUMENT}["{key}"]') for key, name in zip(unit.keys, unit.names, strict=True)]
    bare = node.with_changes(leading_lines=[])
    orelse = bare if isinstance(bare, cst.If) else cst.Else(cst.IndentedBlock([bare]))
    new = cst.If(
        expression(f'"{unit.keys[0]}" in {ARGUMENT}'),
        cst.IndentedBlock([inherit(s, node, RULE) for s in taken]),
        orelse,
    )
    return cast(cst.If, inherit(new.with_changes(leading_lines=node.leading_lines), node, RULE))


def _line(line: cst.SimpleStatementLine, units: Sequence[Unit]) -> object:
    """A line that makes something of a prepared value: split in two where the value can have the line's own name."""
    name = _own_name(line, units[0]) if len(units) == 1 else None
    if name is not None:
        (unit,) = units
        call = cast(cst.Call, unit.node)
        made = inherit(statement(f"{name} = value", value=call), line, RULE)
        first = _branch(Unit(made, unit.keys, (name,)))
        second = replace_nodes(line, [(call, cst.Name(name))]).with_changes(leading_lines=[])
        return cst.FlattenSentinel([first.with_changes(leading_lines=line.leading_lines), inherit(second, line, RULE)])
    edits: list[tuple[cst.CSTNode, object]] = []
    for unit in units:
        key = unit.keys[0]
        text = f'({ARGUMENT}["{key}"] if "{key}" in {ARGUMENT} else value)'
        edits.append((unit.node, expression(text, value=cast(cst.BaseExpression, unit.node))))
    return inherit(replace_nodes(line, edits), line, RULE)


def _own_name(line: cst.SimpleStatementLine, unit: Unit) -> str | None:
    """The target of `x = <call>.method(...)...` if nothing else in the line reads `x`."""
    assign = line.body[0]
    if len(line.body) != 1 or not isinstance(assign, cst.Assign) or len(assign.targets) != 1:
        return None
    target, value = assign.targets[0].target, assign.value
    if not isinstance(target, cst.Name):
        return None
    rest = replace_nodes(value, [(unit.node, cst.Name("None"))])
    while value is not unit.node:
        if isinstance(value, cst.Call):
            value = value.func
        elif isinstance(value, cst.Attribute):
            value = value.value
        else:
            return None
    return target.value if target.value not in uses(rest) else None


__all__ = ["ARGUMENT", "Preparing", "preparing", "stays", "with_prepared"]
