"""Helper methods and module-level definitions that the kept code of a pipeline reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.pipeline.liveness import live_before
from porter.facts.pipeline.members import Members, is_property, self_reads
from porter.model import Definition, Unknown
from porter.pipeline.fold import UNKNOWN, Knowledge, unchanged, value_of
from porter.pipeline.prune import settle
from porter.source.library import Library
from porter.source.names import qualified
from porter.source.tree import body, code, find, parameters, self_attribute, strip_docstring, transform, with_body

Node = TypeVar("Node", bound=cst.CSTNode)

Done = dict[tuple, cst.FunctionDef]
"""Methods that are folded already, by name and pinned parameters."""


class Helper(Struct, frozen=True):
    """One method that is carried over; `pinned` are parameters no caller sets any more."""

    name: str
    node: cst.FunctionDef
    pinned: tuple[tuple[str, object], ...] = ()


def helper_methods(
    members: Members,
    roots: Sequence[cst.CSTNode],
    known: Knowledge,
    skip: frozenset[str],
    done: Done | None = None,
) -> tuple[list[cst.CSTNode], list[Helper]]:
    """The roots with shortened calls, and every method reachable from them, cleaned, in source order."""
    pins: dict[str, dict[str, object]] = {}
    done = {} if done is None else done
    stuck: set[tuple[str, str]] = set()
    while True:
        found = _reach(members, roots, known, skip, pins, done)
        nodes = [*roots, *(h.node for h in found.values())]
        wanted = _pins(found, nodes, known, stuck)
        if wanted == pins:
            break
        pins = wanted
    pinned = {name: helper for name, helper in found.items() if helper.pinned}
    helpers = [
        replace(found[n], node=_shorten(_without_arguments(found[n].node, pinned), pins.get(n, {})))
        for n in dict.fromkeys(members.names())
        if n in found
    ]
    return [_without_arguments(r, pinned) for r in roots], helpers


def _reach(
    members: Members,
    roots: Sequence[cst.CSTNode],
    known: Knowledge,
    skip: frozenset[str],
    pins: Mapping[str, Mapping[str, object]],
    done: Done,
) -> dict[str, Helper]:
    found: dict[str, Helper] = {}
    queue = [n for r in roots for n in sorted(self_reads(r))]
    while queue:
        name = queue.pop(0)
        node = members.method(name)
        if node is None or name in found or name in skip:
            continue
        fixed = dict(pins.get(name, {}))
        key = (name, *sorted(fixed.items(), key=str))
        if key not in done:
            done[key] = clean_method(node, known, fixed)
        cleaned = done[key]
        found[name] = Helper(name, cleaned, tuple(fixed.items()))
        queue += sorted(self_reads(cleaned))
    return found


def clean_method(node: cst.FunctionDef, known: Knowledge, fixed: Mapping[str, object]) -> cst.FunctionDef:
    """A method without what Diffusers' runtime needs, its docstring and comments as they were."""
    statements = body(node)
    rest = strip_docstring(statements)
    head = statements[: len(statements) - len(rest)]
    bound = frozenset(p.name.value for p in parameters(node))
    cleaned = settle(rest, known.with_local({**known.local, **fixed}), bound)
    return node if unchanged(rest, cleaned) else with_body(node, [*head, *cleaned])


def _pins(
    found: Mapping[str, Helper], nodes: Sequence[cst.CSTNode], known: Knowledge, stuck: set[tuple[str, str]]
) -> dict[str, dict[str, object]]:
    """Parameters that every explicit argument sets to the same constant, equal to the default."""
    pins: dict[str, dict[str, object]] = {}
    calls: dict[str, list[cst.Call]] = {name: [] for name in found}
    for node in nodes:
        for name, call in _calls_of_methods(node):
            if name in calls:
                calls[name].append(call)
    for name, helper in found.items():
        if is_property(helper.node):
            continue
        read = live_before(strip_docstring(body(helper.node)))
        stuck |= {(name, key) for key, _ in helper.pinned if key in read}
        previous = {key: value for key, value in helper.pinned if (name, key) not in stuck}
        names = [p.name.value for p in parameters(helper.node)][0 if _is_static(helper.node) else 1 :]
        defaults = {p.name.value: p.default for p in parameters(helper.node)}
        given: dict[str, list[object]] = {}
        for call in calls[name]:
            for position, arg in enumerate(call.args):
                key = arg.keyword.value if arg.keyword else names[position] if position < len(names) else ""
                given.setdefault(key, []).append(value_of(arg.value, known) if not arg.star else UNKNOWN)
        pinned = {}
        for key, values in given.items():
            default = defaults.get(key)
            constant = values[0]
            if not isinstance(constant, (bool, int, str, type(None))) or any(v != constant for v in values):
                continue
            if (name, key) in stuck or key not in defaults:  # a keyword the method does not have: the call raises
                continue
            if len(values) == len(calls[name]) or (default is not None and code(default) == str(constant)):
                pinned[key] = constant
        if pinned or previous:
            pins[name] = {**previous, **pinned}
    return pins


@lru_cache(maxsize=4096)
def _calls_of_methods(node: cst.CSTNode) -> tuple[tuple[str, cst.Call], ...]:
    """(x, call) for every `self.x(...)` below a node."""
    return tuple((name, c) for c in find(node, cst.Call) if (name := self_attribute(c.func)) is not None)


def _is_static(node: cst.FunctionDef) -> bool:
    return any(isinstance(d.decorator, cst.Name) and d.decorator.value == "staticmethod" for d in node.decorators)


def _shorten(node: cst.FunctionDef, pins: Mapping[str, object]) -> cst.FunctionDef:
    if not pins:
        return node
    p = node.params

    def keep(some: Iterable[cst.Param]) -> list[cst.Param]:
        return [each for each in some if each.name.value not in pins]

    return node.with_changes(params=p.with_changes(params=keep(p.params), kwonly_params=keep(p.kwonly_params)))


def _without_arguments(node: Node, pinned: Mapping[str, Helper]) -> Node:
    """The node with calls of helpers that do not name parameters which are gone."""

    def shortened(original: cst.Call, updated: cst.Call) -> cst.Call:
        name = self_attribute(original.func) or ""
        if name not in pinned:
            return updated
        node, pins = pinned[name].node, dict(pinned[name].pinned)
        names = [p.name.value for p in parameters(node)][0 if _is_static(node) else 1 :]
        args = [
            arg
            for position, arg in enumerate(updated.args)
            if (arg.keyword.value if arg.keyword else names[position] if position < len(names) else "") not in pins
        ]
        return updated.with_changes(args=args)

    return transform(node, {cst.Call: shortened}) if pinned.keys() & self_reads(node) else node


def module_definitions(library: Library, members: Members, nodes: Sequence[cst.CSTNode]) -> tuple[Definition, ...]:
    """Functions, classes and constants of the pipeline's own files that the nodes use, dependencies first."""
    modules = {c.module for c in members.classes}
    found: dict[str, Definition] = {}

    def visit(node: cst.CSTNode) -> None:
        for name in find(node, cst.Name):
            target = qualified(name.value)
            if target is None or target in found:
                continue
            module, _, last = target.rpartition(".")
            if module not in modules or any(last == c.name for c in members.classes):
                continue
            definition = library.definition(target)
            if not isinstance(definition, Unknown):
                found[target] = definition
                visit(definition.node)
                found[target] = found.pop(target)

    for node in nodes:
        visit(node)
    return tuple(found.values())
