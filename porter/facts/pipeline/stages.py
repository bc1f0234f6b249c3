"""The three stages of a `__call__` whose loop can't be cut: everything before, while and after the denoiser runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.members import self_reads
from porter.facts.pipeline.regions import denoiser_calls, is_progress, model_aliases, unwrap_progress
from porter.model import Unknown
from porter.source.tree import body, children, with_body


class Stages(Struct, frozen=True):
    """Statements of each stage, and why they are not cut further."""

    encode: tuple[cst.BaseStatement, ...]
    denoise: tuple[cst.BaseStatement, ...]
    decode: tuple[cst.BaseStatement, ...]
    reason: str


def stages(
    statements: Sequence[cst.BaseStatement],
    denoisers: Collection[str],
    methods: Mapping[str, cst.CSTNode],
    reason: str,
) -> Stages | Unknown:
    """Cut the statements of a (cleaned) `__call__` around all that runs a denoiser, itself or through a method."""
    flat = without_progress(statements)
    aliases = model_aliases(flat, denoisers)
    callers = _callers(methods, denoisers)
    places = [
        i for i, s in enumerate(flat) if any(denoiser_calls(s, denoisers, aliases)) or self_reads(s) & callers
    ]  # fmt: skip
    if not places:
        return Unknown("nothing calls a denoiser")
    first, last = places[0], places[-1] + 1
    if any(_returns(s) for s in flat[:last]):
        return Unknown("the call returns before it denoises")
    return Stages(tuple(flat[:first]), tuple(flat[first:last]), tuple(flat[last:]), reason)


def _returns(node: cst.CSTNode) -> bool:
    """Whether the call itself, not a function that it defines, returns there."""
    return isinstance(node, cst.Return) or (
        not isinstance(node, cst.FunctionDef) and any(_returns(c) for c in children(node))
    )


def _callers(methods: Mapping[str, cst.CSTNode], denoisers: Collection[str]) -> frozenset[str]:
    """Methods that call a denoiser, directly or through another method."""
    found = {n for n, m in methods.items() if any(denoiser_calls(m, denoisers, model_aliases([m], denoisers)))}
    while True:
        more = {n for n, m in methods.items() if n not in found and self_reads(m) & found}
        if not more:
            return frozenset(found)
        found |= more


def without_progress(statements: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """The statements without progress bars, at any depth: one bar can't show rounds of several loops."""
    out: list[cst.BaseStatement] = []
    for statement in unwrap_progress(statements):
        if isinstance(statement, (cst.For, cst.While, cst.With)):
            statement = with_body(statement, without_progress(body(statement)))
            if isinstance(statement, cst.For) and is_progress(statement.iter) and statement.iter.args:  # type: ignore[attr-defined]
                statement = statement.with_changes(iter=statement.iter.args[0].value)  # type: ignore[attr-defined]
        elif isinstance(statement, cst.If):
            statement = _if_without_progress(statement)
        out.append(statement)
    return out


def _if_without_progress(node: cst.If) -> cst.If:
    orelse = node.orelse
    if isinstance(orelse, cst.If):
        orelse = _if_without_progress(orelse)
    elif orelse is not None:
        orelse = with_body(orelse, without_progress(body(orelse)))
    return with_body(node.with_changes(orelse=orelse), without_progress(body(node)))
