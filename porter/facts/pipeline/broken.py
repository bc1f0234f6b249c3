"""Code of a pipeline that can't run in Diffusers itself, whatever the request or the checkpoint."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.components import Component
from porter.facts.pipeline.members import Members
from porter.source.library import Library
from porter.source.marks import Mark, mark_of
from porter.source.tree import body, code, find, parameters, self_attribute

_MAPPING = frozenset(dir(dict))


class Broken(Struct, frozen=True):
    """What is wrong, where, and whether every request gets there."""

    message: str
    mark: Mark | None
    always: bool


def broken(
    library: Library, members: Members, parts: Sequence[Component], statements: Sequence[cst.BaseStatement]
) -> list[Broken]:
    """Calls of the pipeline's own methods with keywords that they do not take, and reads of configuration values that the
    component's class does not have, in the statements of a (cleaned) `__call__`."""
    found: dict[str, Broken] = {}
    keys = {c.name: known for c in parts if (known := _configuration(library, c)) is not None}
    for statement, node, always in _evaluated(statements, always=True):
        perhaps = _perhaps_evaluated(node)
        for place, message in (*_keywords(members, node), *_values(keys, node)):
            reached = always and id(place) not in perhaps
            if message not in found or (reached and not found[message].always):
                found[message] = Broken(message, mark_of(statement), reached)
    return list(found.values())


def _evaluated(
    statements: Sequence[cst.BaseStatement], *, always: bool
) -> Iterator[tuple[cst.BaseStatement, cst.CSTNode, bool]]:
    """Each statement with the code it evaluates itself, and whether that is reached without a condition."""
    for each in statements:
        if isinstance(each, cst.If):
            yield each, each.test, always
            yield from _evaluated(body(each), always=False)
            if isinstance(each.orelse, cst.If):
                yield from _evaluated([each.orelse], always=False)
            elif each.orelse is not None:
                yield from _evaluated(body(each.orelse), always=False)
            always = always and not _leaves(each)
        elif isinstance(each, (cst.For, cst.With)):
            yield from _evaluated(body(each), always=always)
        elif isinstance(each, cst.SimpleStatementLine):
            yield each, each, always


def _perhaps_evaluated(node: cst.CSTNode) -> frozenset[int]:
    """Calls and attributes below the second operand of `and` or `or`, or in a case of a conditional expression."""
    parts: list[cst.CSTNode] = [b.right for b in find(node, cst.BooleanOperation)]
    parts += [case for i in find(node, cst.IfExp) for case in (i.body, i.orelse)]
    return frozenset(id(n) for p in parts for n in find(p, cst.Call, cst.Attribute))


def _leaves(node: cst.If) -> bool:
    return any(True for _ in find(node, cst.Return, cst.Continue, cst.Break))


def _keywords(members: Members, node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, str]]:
    for call in find(node, cst.Call):
        method = members.method(self_attribute(call.func) or "")
        if method is None or method.params.star_kwarg is not None:
            continue
        taken = {p.name.value for p in parameters(method)}
        for name in [a.keyword.value for a in call.args if a.keyword is not None]:
            if name not in taken:
                yield call, f"self.{method.name.value} takes no `{name}`"


def _values(keys: dict[str, frozenset[str]], node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, str]]:
    for read in find(node, cst.Attribute):
        owner, name = read.value, read.attr.value
        if not isinstance(owner, cst.Attribute) or owner.attr.value != "config":
            continue
        component = self_attribute(owner.value)
        if component in keys and name not in keys[component] | _MAPPING and not name.startswith("_"):
            yield read, f"the configuration of self.{component} has no `{name}` ({code(read)})"


def _configuration(library: Library, component: Component) -> frozenset[str] | None:
    """Configuration values of a component whose only class is one of Diffusers' models; None if they are not known."""
    if component.role not in ("denoiser", "vae") or len(component.classes) != 1:
        return None
    method = library.method_syntax(component.classes[0], "__init__")
    if not isinstance(method, ast.FunctionDef):
        return None
    return frozenset(a.arg for a in (*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs))
