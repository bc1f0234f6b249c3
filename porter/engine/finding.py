"""Which nodes of a unit are sites of a rule. Candidates come from the index, never from a walk per rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import libcst as cst

from porter.engine.index import Index
from porter.engine.patterns import Pattern
from porter.engine.predicates import equals, matches_name, stands_within
from porter.engine.registry import FactSite
from porter.engine.rule import Rule
from porter.engine.site import Site, derives, qualified_bases
from porter.model import Unit, Unknown

Facts = Callable[[str], Iterable[FactSite]]


def sites(rule: Rule, unit: Unit, indexes: list[Index], facts: Facts) -> list[Site]:
    """Every site of a rule in a unit, in source order."""
    found = list(_fact_sites(rule, unit, indexes, facts) if rule.spec.on.fact else _code_sites(rule, unit, indexes))
    within = rule.spec.on.within
    return [s for s in found if within is None or stands_within(within, s, rule)]


def _code_sites(rule: Rule, unit: Unit, indexes: list[Index]) -> Iterator[Site]:
    for index in indexes:
        for nodes, captures in _triggers(rule, index, unit):
            bindings: dict[str, object] = dict(captures)
            if rule.spec.on.bind:
                bindings[rule.spec.on.bind] = nodes[0]
            yield Site(rule.id, unit, index, nodes[0], nodes, bindings)


def _triggers(rule: Rule, index: Index, unit: Unit) -> Iterator[tuple[tuple[cst.CSTNode, ...], dict[str, object]]]:
    on = rule.spec.on
    if on.call is not None:
        nodes = [n for name in rule.absolute_names(on.call) for n in index.calls(name)]
    elif on.reference is not None:
        nodes = [n for name in _referenced(rule.absolute_names(on.reference), index) for n in index.references(name)]
    elif on.decorator is not None:
        nodes = _decorators(index, rule.absolute_names(on.decorator))
    elif on.class_ is not None:
        nodes = _classes(rule, index, unit)
    elif on.method is not None:
        wanted = rule.names(on.method)
        nodes = [n for n in index.of_kind(cst.FunctionDef) if matches_name(n, wanted) and _is_method(n, index)]
    elif on.class_attribute is not None:
        nodes = _class_attributes(index, rule.names(on.class_attribute))
    else:
        assert rule.trigger is not None  # the loader saw to it that one kind is given
        yield from _matches(rule.trigger, index)
        return
    for node in _in_order(nodes, index):
        yield (node,), {}


def _referenced(names: tuple[str, ...], index: Index) -> Iterable[str]:
    """Names that occur; `*` in a name of the rule stands for anything."""
    if not any("*" in n for n in names):
        return names
    return [found for found in sorted(index.referenced_names()) if any(fnmatchcase(found, n) for n in names)]


def _class_attributes(index: Index, names: tuple[str, ...]) -> list[cst.CSTNode]:
    """Statements of class bodies that assign one of these names."""
    found: list[cst.CSTNode] = []
    for owner in index.of_kind(cst.ClassDef):
        for line in owner.body.body:  # type: ignore[attr-defined]
            small = line.body[0] if isinstance(line, cst.SimpleStatementLine) else None
            target: object = None
            if isinstance(small, cst.AnnAssign):
                target = small.target
            elif isinstance(small, cst.Assign) and len(small.targets) == 1:
                target = small.targets[0].target
            if isinstance(target, cst.Name) and matches_name(target, names):
                found.append(line)
    return found


def _in_order(nodes: list[cst.CSTNode], index: Index) -> list[cst.CSTNode]:
    if len(nodes) < 2:
        return nodes
    return sorted({id(n): n for n in nodes}.values(), key=lambda n: index.position[id(n)])


def _decorators(index: Index, names: tuple[str, ...]) -> list[cst.CSTNode]:
    found = []
    for node in index.of_kind(cst.Decorator):
        expression = node.decorator  # type: ignore[attr-defined]
        target = expression.func if isinstance(expression, cst.Call) else expression
        if isinstance(target, cst.Name) and target.value in names:
            found.append(node)
    return found


def _classes(rule: Rule, index: Index, unit: Unit) -> list[cst.CSTNode]:
    wanted = rule.spec.on.class_
    assert wanted is not None
    found: list[cst.CSTNode] = []
    for node in index.of_kind(cst.ClassDef):
        assert isinstance(node, cst.ClassDef)
        if wanted.name is not None and not matches_name(node, rule.names(wanted.name)):
            continue
        if wanted.derives_from is not None:
            ancestors = frozenset(rule.names(wanted.derives_from))
            if not ancestors.intersection(b for b in qualified_bases(node) if b) and not derives(node, ancestors, unit):
                continue
        found.append(node)
    return found


def _is_method(node: cst.CSTNode, index: Index) -> bool:
    block = index.parent(node)
    return block is not None and isinstance(index.parent(block), cst.ClassDef)


def _matches(pattern: Pattern, index: Index) -> Iterator[tuple[tuple[cst.CSTNode, ...], dict[str, object]]]:
    if not all(index.has(name) for name in pattern.required):
        return
    for node in _candidates(pattern, index):
        if len(pattern.nodes) == 1:
            captures = pattern.match(node)
            if captures is not None:
                yield (node,), dict(captures)
        else:
            run = match_run(pattern, node, index)
            if run is not None:
                yield run[0], dict(run[1])


def match_run(
    pattern: Pattern, node: cst.CSTNode, index: Index, bound: dict[str, object] | None = None
) -> tuple[tuple[cst.CSTNode, ...], dict[str, object]] | None:
    """A match of several statements that starts at `node`: the statements and the captures."""
    suite = index.parent(node)
    block = getattr(suite, "body", None)
    if not isinstance(block, (list, tuple)):
        return None
    start = next((i for i, n in enumerate(block) if n is node), None)
    found = pattern.match_run(block, start, bound) if start is not None else None  # type: ignore[arg-type]
    return (tuple(block[start : start + found[1]]), dict(found[0])) if found and start is not None else None


def _candidates(pattern: Pattern, index: Index) -> Iterable[cst.CSTNode]:
    first = pattern.nodes[0]
    if isinstance(first, cst.SimpleStatementLine):
        return [p for n in index.of_kind(pattern.root) if isinstance(p := index.parent(n), cst.SimpleStatementLine)]
    if isinstance(first, cst.Call) and isinstance(first.func, cst.Name) and index.calls(first.func.value):
        return index.calls(first.func.value)
    if isinstance(first, cst.Attribute) and (found := index.attributes(first.attr.value)):
        return found
    return index.of_kind(pattern.root)


def _fact_sites(rule: Rule, unit: Unit, indexes: list[Index], facts: Facts) -> Iterator[Site]:
    on = rule.spec.on
    assert on.fact is not None
    name = on.bind or "site"
    by_name = {i.definition.name: i for i in indexes}
    for found in facts(on.fact):
        index = by_name.get(found.definition)
        if index is None or found.node not in index:
            index = next((i for i in indexes if found.node in i), None)
        if index is None:
            raise LookupError(f"fact {on.fact} gave a node that is not in the unit (definition {found.definition})")
        if not all(_fits(found.fields.get(key), wanted, rule) for key, wanted in on.filter.items()):
            continue
        bindings: dict[str, object] = {f"{name}.{key}": value for key, value in found.fields.items()}
        if on.bind:
            bindings[on.bind] = found.node
        yield Site(rule.id, unit, index, found.node, (found.node,), bindings)


def _fits(value: object, wanted: object, rule: Rule) -> bool:
    if isinstance(value, Unknown):
        return False
    options = wanted if isinstance(wanted, list) else [wanted]
    return any(equals(value, each, rule.symbols) for each in options)
