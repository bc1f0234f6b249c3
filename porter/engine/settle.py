"""What becomes of one site: the first case that fits, or `otherwise`. Every site gets exactly one settlement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import libcst as cst
from msgspec import UNSET, Struct

from porter.engine.edits import Add, Edit, Insert, Replace
from porter.engine.finding import match_run
from porter.engine.lower import lower
from porter.engine.patterns import Pattern
from porter.engine.placement import Clash
from porter.engine.predicates import equals, holds, literal
from porter.engine.registry import OPS
from porter.engine.rule import Rule
from porter.engine.schema import CaseSpec, Keep
from porter.engine.site import Site
from porter.engine.text import CodeError, interpolate, readable
from porter.model import Diagnostic, SiteStatus, Status, Unit, Unknown


class Settlement(Struct, frozen=True):
    """How one site ended: its edits, its findings and its status."""

    site: Site
    edits: tuple[Edit, ...]
    diagnostics: tuple[Diagnostic, ...]
    status: SiteStatus


def settle(site: Site, rule: Rule, unit: Unit) -> Settlement:
    """Decide one site."""
    try:
        return _settle(site, rule, unit)
    except Clash as error:
        return _diagnosed(site, rule, "PORT202", str(error))
    except CodeError as error:
        return _diagnosed(site, rule, "PORT203", f"{rule.id} can't be carried out here: {error}")


def _settle(site: Site, rule: Rule, unit: Unit) -> Settlement:
    spec = rule.spec
    if spec.match is not None:
        narrowed = fit(rule.pattern(spec.match), site, open_call=bool(spec.options))
        if narrowed is None:
            return _otherwise(site, rule)
        site = narrowed
    if spec.options:
        accounted = account(site, rule)
        if isinstance(accounted, Diagnostic):
            return Settlement(site, (), (accounted,), _status(site, rule, "diagnosed", accounted.message))
        site = accounted
    for case in spec.cases:
        here: Site | None = site
        if case.match is not None:
            here = fit(rule.pattern(case.match), site, open_call=bool(spec.options))
        if here is not None and all(holds(p, _asked(here, path), here, rule) for path, p in case.where.items()):
            return _carried_out(case, here, rule, unit)
    return _otherwise(site, rule)


def _asked(site: Site, path: str) -> object:
    try:
        return site.lookup(path.removeprefix("$"))
    except CodeError as error:
        return Unknown(str(error))


def fit(pattern: Pattern, site: Site, *, open_call: bool = False) -> Site | None:
    """The site with the nearest region around its trigger that the pattern matches.

    The trigger must stand in what the pattern spells out or in a `$x`, not among statements that a `$$xs` took.
    """
    around = {id(n) for n in _outwards(site)}
    for node in _outwards(site):
        if len(pattern.nodes) == 1:
            captures = pattern.match(node, site.bindings, open_call=open_call)  # type: ignore[arg-type]
            if captures is not None and not _swallowed(captures, site, around):
                return site.narrowed((node,), captures)
        elif isinstance(node, cst.BaseStatement):
            for start in _starts(node, site):
                run = match_run(pattern, start, site.index, dict(site.bindings))
                if run is not None and any(n is node for n in run[0]) and not _swallowed(run[1], site, around):
                    return site.narrowed(*run)
    return None


def _swallowed(captures: Mapping[str, object], site: Site, around: set[int]) -> bool:
    new = (value for name, value in captures.items() if name not in site.bindings and isinstance(value, tuple))
    return any(isinstance(node, cst.BaseStatement) and id(node) in around for value in new for node in value)


def _outwards(site: Site) -> Iterator[cst.CSTNode]:
    yield site.trigger
    if isinstance(site.trigger, cst.Decorator):
        yield site.trigger.decorator
    yield from site.index.ancestors(site.trigger)


def _starts(node: cst.CSTNode, site: Site) -> list[cst.CSTNode]:
    """The statement and those before it in its block, nearest first: a run may start above the site."""
    block = getattr(site.index.parent(node), "body", None)
    if not isinstance(block, (list, tuple)):
        return [node]
    position = next((i for i, n in enumerate(block) if n is node), 0)
    return list(reversed(block[: position + 1]))


def account(site: Site, rule: Rule) -> Site | Diagnostic:
    """Consume every keyword of the site's call through `options`, or say which one nobody accounted for."""
    call = next((n for n in (site.node, site.trigger) if isinstance(n, cst.Call)), None)
    if call is None:
        raise CodeError("`options` are for calls; this site is none")
    spelled = {a.keyword.value for n in _call_patterns(rule) for a in n.args if a.keyword is not None}
    bindings: dict[str, object] = {}
    given: set[str] = set()
    for arg in call.args:
        if arg.star == "**":
            return _finding(site, rule, "PORT302", f"`**{readable(arg.value)}`: its keywords can't be accounted for")
        if arg.keyword is None or arg.keyword.value in spelled:
            continue
        name = arg.keyword.value
        option = rule.spec.options.get(name)
        if option is None:
            advice = f"if the engine can ignore it, add it under `options: {{{name}: {{ignore: why}}}}` in {rule.file}"
            return _finding(
                site, rule, "PORT302", f"`{name}={readable(arg.value)}`: no option of {rule.id} takes it", advice
            )
        given.add(name)
        if option.must_be is not UNSET and not _allowed(arg.value, option.must_be, rule):
            message = f"`{name}={readable(arg.value)}`: {rule.id} can only take {option.must_be}"
            return _finding(site, rule, "PORT303", message)
        if option.bind:
            bindings[option.bind] = arg.value
    for name, option in rule.spec.options.items():
        if option.bind and name not in given:
            bindings[option.bind] = _default(option.default, site, rule)
    return site.narrowed(site.nodes, bindings)


def _default(value: object, site: Site, rule: Rule) -> object:
    if value is UNSET:
        return None
    return rule.template(value if isinstance(value, str) else repr(value)).expression(site.lookup)


def _call_patterns(rule: Rule) -> list[cst.Call]:
    pattern = rule.pattern(rule.spec.match) if rule.spec.match else rule.trigger
    return [n for n in pattern.nodes if isinstance(n, cst.Call)] if pattern is not None else []


def _allowed(value: cst.BaseExpression, wanted: object, rule: Rule) -> bool:
    return literal(value) if wanted == "literal" else equals(value, wanted, rule.symbols)


def _carried_out(case: CaseSpec, site: Site, rule: Rule, unit: Unit) -> Settlement:
    found = tuple(
        Diagnostic(code, interpolate(message, site.lookup), site.span, rule.id) for code, message in case.report.items()
    )
    if case.keep is not None:
        return Settlement(site, (), found, _status(site, rule, "waived", interpolate(case.keep, site.lookup)))
    edits: list[Edit] = []
    if case.op is not None:
        result = OPS[case.op](site, unit, _arguments(case.args, site))
        if isinstance(result, Diagnostic):
            return Settlement(site, (), (result,), _status(site, rule, "diagnosed", result.message))
        edits += result
    for spec in case.edit:
        edits += lower(spec, site, rule)
    for edit in edits:  # code that can't be built must be found here, where the site can still be reported
        _buildable(edit, site)
    status: Status = case.status if case.edit or case.op else "diagnosed"
    return Settlement(site, tuple(edits), found, _status(site, rule, status))


def _buildable(edit: Edit, site: Site) -> None:
    """Raise CodeError for code that lacks a value, and for statements beside or instead of a whole definition."""
    if not isinstance(edit, (Replace, Insert, Add)):
        return
    made = edit.code.build(lambda node: node, lambda node: False)
    root = site.index.root
    if isinstance(edit, Insert) and edit.anchor is root:
        raise CodeError("nothing can be inserted beside a whole definition; an op can return AddDefinition")
    if isinstance(edit, Replace) and edit.nodes[0] is root and len(made) != 1:
        raise CodeError("a definition can only be replaced by one definition")


def _arguments(args: dict[str, object], site: Site) -> dict[str, object]:
    """Arguments of an op: `$x` and `${x.field}` that make up a whole value become what they are bound to."""
    result: dict[str, object] = {}
    for name, value in args.items():
        if isinstance(value, str) and value.startswith("$"):
            value = site.lookup(value.lstrip("$").strip("{}"))
        result[name] = value
    return result


def _otherwise(site: Site, rule: Rule) -> Settlement:
    if isinstance(rule.otherwise, Keep):
        return Settlement(site, (), (), _status(site, rule, "waived", rule.otherwise.keep))
    shown = readable(site.trigger).splitlines() or [""]
    text = shown[0] if len(shown) == 1 and len(shown[0]) <= 100 else shown[0][:97] + "..."
    return _diagnosed(site, rule, rule.otherwise, f"`{text}`: no case of {rule.id} fits")


def _diagnosed(site: Site, rule: Rule, code: str, message: str) -> Settlement:
    found = _finding(site, rule, code, message)
    return Settlement(site, (), (found,), _status(site, rule, "diagnosed", message))


def _finding(site: Site, rule: Rule, code: str, message: str, advice: str | None = None) -> Diagnostic:
    return Diagnostic(code, message, site.span, rule.id, advice=advice)


def _status(site: Site, rule: Rule, status: Status, detail: str = "") -> SiteStatus:
    return SiteStatus(rule.id, site.span, status, detail)
