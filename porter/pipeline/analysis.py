"""From a pipeline class to its cleaned regions: everything the templates print, still as trees."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import cast

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.engine import RuleSet
from porter.facts.pipeline import (
    Component,
    Guidance,
    Members,
    Regions,
    Stages,
    Tail,
    call_state,
    components,
    guidance,
    members,
    regions,
    stages,
    tail,
)  # fmt: skip
from porter.facts.pipeline.broken import broken
from porter.facts.pipeline.guider_loop import GuiderLoop, guider_loop
from porter.facts.pipeline.liveness import uses, writes
from porter.facts.pipeline.members import self_reads
from porter.facts.pipeline.undefined import asked_for, undefined
from porter.model import Diagnostic, PorterError, SiteStatus, Span, Unknown
from porter.pipeline.cleanup import bind_to_port, clean, without_unnamed
from porter.pipeline.fold import ABSENT, PRESENT, Knowledge, fold
from porter.pipeline.helpers import Done, Helper, clean_method, helper_methods
from porter.pipeline.localise import is_self_assignment, localise
from porter.pipeline.model import Parameter
from porter.pipeline.own_guider import own_guider
from porter.pipeline.own_scheduler import own_scheduler
from porter.pipeline.parameters import request_parameters
from porter.pipeline.prune import drop_dead, settle
from porter.pipeline.tables import Tables
from porter.source.library import Library
from porter.source.marks import mark_of
from porter.source.names import referenced
from porter.source.tree import body, find, parameters, self_attribute, strip_docstring, substitute, with_body

NO_LOOP, NO_TAIL, NO_COMPONENTS, BROKEN = "PORT501", "PORT501", "PORT504", "PORT506"


class Analysis(Struct, frozen=True, dict=True):
    """Facts and cleaned code of one pipeline."""

    members: Members
    components: tuple[Component, ...]
    arguments: tuple[cst.Param, ...]
    parameters: tuple[Parameter, ...]
    cut: Regions | Stages
    guidance: Guidance | Unknown
    branches: GuiderLoop | Unknown
    tail: Tail
    constructor: tuple[cst.BaseStatement, ...]
    helpers: tuple[Helper, ...]
    kept_state: frozenset[str]
    call_span: Span | None
    statuses: tuple[SiteStatus, ...]
    diagnostics: tuple[Diagnostic, ...]

    @property
    def regions(self) -> Regions:
        """The five regions, of a call that could be cut so."""
        assert isinstance(self.cut, Regions)
        return self.cut

    @property
    def denoisers(self) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.role == "denoiser")


def analyse(library: Library, name: str, tables: Tables, ruleset: RuleSet | None = None) -> Analysis:
    """Analyse a pipeline class. Raises PorterError with a diagnostic when its shape is not one that can be cut."""
    found = members(library, name)
    if isinstance(found, Unknown):
        raise PorterError(Diagnostic(NO_COMPONENTS, found.reason))
    cleaned = clean(found.classes, ruleset)
    found = Members(cleaned.definitions)
    parts = components(found)
    call = found.method("__call__")
    owner = found.owner_of("__call__")
    if isinstance(parts, Unknown) or call is None or owner is None:
        reason = parts.reason if isinstance(parts, Unknown) else "the class defines no __call__"
        raise PorterError(Diagnostic(NO_COMPONENTS, f"{name}: {reason}", library.span(name)))
    mark = mark_of(call)
    span = Span(owner.file, mark.line) if mark else None
    arguments = parameters(call)[1:]
    mapping = request_parameters(arguments, tables)
    names = [c.name for c in parts if c.role == "denoiser"]
    found = bind_to_port(found, names, [c.name for c in parts if not c.loads])
    call = found.method("__call__") or call
    known = _knowledge(library, found, parts)
    refused = {p.name: _literal(p.default) for p in mapping if p.place == "refused"}
    refused["return_dict"] = True
    unnamed = call.params.star_kwarg
    statements = without_unnamed(strip_docstring(body(call)), unnamed.name.value if unnamed is not None else None)
    bound = frozenset(p.name for p in mapping)
    state = call_state(found, statements)
    done: Done = {}
    elsewhere = _state_read_by_helpers(found, statements, known, frozenset(state.properties), done)
    local = localise(statements, state, bound - refused.keys(), elsewhere)
    opened = _until_written(local.statements, known, refused)
    refused = {n: v for n, v in refused.items() if n not in writes(opened)}
    statements = settle(opened, known.with_local(refused), bound)
    roots, helpers = helper_methods(found, statements, known, frozenset({"__call__"}), done)
    statements = settle(roots, known.with_local(refused), bound)  # type: ignore[arg-type]
    faults = _faults(library, name, found, parts, statements, owner.file)
    found_regions = regions(statements, names)
    if isinstance(found_regions, Unknown):
        cut: Regions | Stages = _stages(name, statements, names, helpers, found_regions.reason, span)
    else:
        cut = own_guider(own_scheduler(found_regions))
    end = tail(cut.decode)
    if isinstance(end, Unknown):
        raise PorterError(Diagnostic(NO_TAIL, f"{name}: {end.reason}", span))
    end = replace(end, statements=tuple(drop_dead(end.statements, uses(end.result))))
    forward = _forward_parameters(library, parts)
    functions = {h.name: h.node for h in helpers}
    guide = guidance(cut, names, forward, functions) if isinstance(cut, Regions) else Unknown(cut.reason)
    return Analysis(
        found, parts, tuple(arguments), mapping, cut, guide,
        guider_loop(cut.predict) if isinstance(cut, Regions) else Unknown(cut.reason), end,
        tuple(_constructor(found, known, [c.name for c in parts])), tuple(helpers), local.kept, span, cleaned.statuses,
        (*cleaned.diagnostics, *faults),
    )  # fmt: skip


def _faults(
    library: Library,
    name: str,
    found: Members,
    parts: Sequence[Component],
    statements: Sequence[cst.BaseStatement],
    file: str,
) -> list[Diagnostic]:
    """What Diffusers itself can't run. Raises PorterError if every request gets there."""
    out = []
    for each in broken(library, found, parts, statements):
        where = Span(file, each.mark.line) if each.mark is not None else None
        if each.always:
            raise PorterError(Diagnostic(BROKEN, f"{name}: Diffusers raises on every request: {each.message}", where))
        out.append(Diagnostic(BROKEN, f"Diffusers raises here: {each.message}", where))
    return out


def in_stages(analysis: Analysis, reason: str) -> Analysis:
    """The analysis of the same call in three stages, for a loop whose regions can't be made into methods."""
    cut = analysis.regions
    whole = [*cut.encode, cut.loop.node, *analysis.tail.statements]
    names = [c.name for c in analysis.denoisers]
    found = _stages(analysis.members.cls.name, whole, names, analysis.helpers, reason, analysis.call_span)
    return replace(analysis, cut=found, guidance=Unknown(reason), branches=Unknown(reason))


def _stages(
    name: str,
    statements: Sequence[cst.BaseStatement],
    denoisers: Sequence[str],
    helpers: Sequence[Helper],
    reason: str,
    span: Span | None,
) -> Stages:
    found = stages(statements, denoisers, {h.name: h.node for h in helpers}, reason)
    if isinstance(found, Unknown):
        raise PorterError(Diagnostic(NO_LOOP, f"{name}: {reason}; {found.reason}", span))
    return found


def _until_written(
    statements: Sequence[cst.BaseStatement], known: Knowledge, refused: Mapping[str, object]
) -> list[cst.BaseStatement]:
    """Statements in which a refused parameter has its default, up to where the call itself gives it another value."""
    out: list[cst.BaseStatement] = []
    left = dict(refused)
    for each in statements:
        out += fold([each], known.with_local(left))
        left = {n: v for n, v in left.items() if n not in writes([each])}
    return out


def _literal(default: str | None) -> object:
    """The value a refused parameter always has: its default, None for one that is no literal."""
    try:
        value = ast.literal_eval(default or "None")
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, (bool, int, str)) else None


def _knowledge(library: Library, found: Members, parts: Sequence[Component]) -> Knowledge:
    never = undefined(library, found, asked_for(found) - {c.name for c in parts})
    present = {c.name: PRESENT for c in parts if c.loads and not c.optional}
    return Knowledge(attributes={**dict.fromkeys(never, ABSENT), **present})


def _state_read_by_helpers(
    found: Members, statements: Sequence[cst.BaseStatement], known: Knowledge, skip: frozenset[str], done: Done
) -> frozenset[str]:
    """Names every reachable helper method reads on `self`."""
    _, helpers = helper_methods(found, statements, known, skip | {"__call__"}, done)
    return frozenset(n for h in helpers for n in self_reads(h.node))


def _constructor(found: Members, known: Knowledge, components: Sequence[str]) -> list[cst.BaseStatement]:
    """What the constructor does besides registering components; its parameters are the port's attributes."""
    init = found.method("__init__")
    if init is None:
        return []
    attributes = {n: cst.Attribute(cst.Name("self"), cst.Name(n)) for n in components}
    own = [s for s in strip_docstring(body(init)) if not _registers(s)]
    renamed = [cast(cst.BaseStatement, substitute(s, dict(attributes))) for s in own]
    cleaned = body(clean_method(with_body(init, renamed), known, {}))
    return [s for s in cleaned if not is_self_assignment(s)]


def _registers(statement: cst.BaseStatement) -> bool:
    for call in find(statement, cst.Call):
        if self_attribute(call.func) in ("register_modules", "register_to_config"):
            return True
        if isinstance(call.func, cst.Attribute) and call.func.attr.value == "__init__":
            return True
    return False


def _forward_parameters(library: Library, parts: Sequence[Component]):  # noqa: ANN202 - a closure
    def names(callee: cst.BaseExpression) -> Sequence[str] | Unknown:
        component = next((c for c in parts if c.name == self_attribute(callee)), None)
        component = component or next((c for c in parts if c.role == "denoiser"), None)
        if component is None or not component.classes:
            return Unknown("the class of the denoiser is not known")
        definition = library.definition(component.classes[0])
        if isinstance(definition, Unknown):
            return definition
        forward = next(
            (m for m in body(definition.node) if isinstance(m, cst.FunctionDef) and m.name.value == "forward"), None
        )
        if forward is None:
            return Unknown(f"{component.classes[0]} defines no forward")
        return [p.name.value for p in parameters(forward)][1:]

    return names


def step_call(regions_: Regions) -> cst.Call | None:
    """The scheduler call of the step region."""
    for statement in regions_.step:
        for call in find(statement, cst.Call):
            if isinstance(call.func, cst.Attribute) and call.func.attr.value == "step":
                return call
    return None


def output_module(end: Tail) -> str | None:
    """Module of the output class."""
    return end.output.rpartition(".")[0] if end.output else None


__all__ = ["Analysis", "analyse", "output_module", "referenced", "step_call"]
