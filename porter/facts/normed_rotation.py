"""Queries and keys whose heads are normed and then turned: what one kernel can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.facts.module_tree import ClassModules, ModuleSite, module_tree
from porter.facts.rotation import Turn, angles_come_twice, assigned, pair_rotation
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

NORMS = ("torch.nn.RMSNorm", "diffusers.models.normalization.RMSNorm")
CAT = absolute("torch.cat")


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens whose queries and keys are normed by norms of their own; `lines` are the statements that do so."""

    query: str
    key: str
    norms: tuple[str, str]
    lines: tuple[cst.BaseStatement, ...]


@fact("normed_rotation", fields=["streams", "turn", "gone", "place"])
def normed_rotations(unit: Unit) -> Iterator[FactSite]:
    """Statements `q = norm(q)`, `k = norm(k)`, then `q = rotate(q, table)`, `k = rotate(k, table)`, with nothing but joining
    the streams of tokens between them.

    `streams` are the streams, in the order in which they are joined; `gone` the statements that norm and rotate; the
    site and `place` the statement at which all values exist and nothing has read them.
    """
    modules = module_tree(unit)
    twice: bool | None = None
    for name, held in modules.items():
        assert isinstance(held.definition.node, cst.ClassDef)
        for function in held.definition.node.body.body:
            for suite in tree.suites(function) if isinstance(function, cst.FunctionDef) else ():
                for position in range(len(suite) - 1):
                    found = _at(suite, position, unit, held, modules)
                    if found is None:
                        continue
                    if twice is None and found["turn"].real:  # type: ignore[attr-defined]
                        twice = angles_come_twice(unit)  # of the whole model, so asked once
                    if twice or not found["turn"].real:  # type: ignore[attr-defined]
                        yield FactSite(found["place"], name, found)  # type: ignore[arg-type]


def _at(
    suite: list[cst.BaseStatement], position: int, unit: Unit, held: ClassModules, modules: Mapping[str, ClassModules]
) -> dict[str, object] | None:
    pair = [assigned(suite[position]), assigned(suite[position + 1])]
    if pair[0] is None or pair[1] is None:
        return None
    turns = [pair_rotation(value, unit) for _, value in pair]  # type: ignore[misc]
    if turns[0] is None or turns[1] is None or not tree.same(turns[0].table, turns[1].table):
        return None
    names = [n for n, _ in pair]  # type: ignore[misc]
    if any(tree.code(t.tensor) != n for t, n in zip(turns, names, strict=True)):  # type: ignore[union-attr]
        return None
    before = suite[:position]
    joined = _joined(before, names)
    parts, end = joined or ([(names[0], names[1])], position)
    streams = [_stream(suite, end, position, q, k, held, modules) for q, k in parts]
    if any(s is None for s in streams):
        return None
    lines = [line for s in streams if s is not None for line in s.lines]
    return {
        "streams": tuple(streams), "turn": turns[0], "place": suite[end],
        "gone": (*lines, suite[position], suite[position + 1]),
    }  # fmt: skip


def _joined(before: list[cst.BaseStatement], names: list[str]) -> tuple[list[tuple[str, str]], int] | None:
    """Names of the streams joined along the tokens to what is turned, and the position of the first statement doing it."""
    found = []
    for name in names:
        at = _last(before, name)
        value = assigned(before[at]) if at is not None else None
        parts = _parts(value[1]) if value is not None else None
        if at is None or parts is None or any(name in _names(s) for s in before[at + 1 :]):
            return None
        found.append((at, parts))
    (first, queries), (second, keys) = found
    if len(queries) != len(keys) or len(queries) != 2:
        return None
    return list(zip(queries, keys, strict=True)), min(first, second)


def _parts(value: cst.BaseExpression) -> list[str] | None:
    if tree.call_name(value) != CAT or not isinstance(value, cst.Call):
        return None
    given = tree.arguments(value, ("tensors", "dim"))
    if given is None or not isinstance(given.get("tensors"), cst.List) or tree.code(given["dim"]) != "1":
        return None
    elements = [e.value for e in given["tensors"].elements]  # type: ignore[union-attr]
    return (
        [e.value for e in elements if isinstance(e, cst.Name)]
        if all(isinstance(e, cst.Name) for e in elements)
        else None
    )


def _stream(
    suite: list[cst.BaseStatement], end: int, turned: int, query: str, key: str, held: ClassModules,
    modules: Mapping[str, ClassModules],
) -> Stream | None:  # fmt: skip
    """The stream whose query and key are normed ahead of position `end` and read by nothing before it."""
    lines, norms = [], []
    for name in (query, key):
        at = _last(suite[:end], name)
        value = assigned(suite[at]) if at is not None else None
        norm = _norm(value[1], name) if value is not None else None
        if at is None or norm is None or any(name in _names(s) for s in suite[at + 1 : end]):
            return None
        lines.append(suite[at])
        norms.append(norm)
    epsilon = [_epsilon(held, n, modules) for n in norms]
    if epsilon[0] is None or epsilon[0] != epsilon[1]:
        return None
    joins = suite[end:turned]
    if any({query, key} & _names(s) and assigned(s) is None for s in joins):
        return None
    return Stream(query, key, (norms[0], norms[1]), tuple(lines))


def _norm(value: cst.BaseExpression, name: str) -> str | None:
    """`attribute` for `self.attribute(name)`."""
    if isinstance(value, cst.Call) and len(value.args) == 1 and tree.code(value.args[0].value) == name:
        return tree.self_attribute(value.func)
    return None


def _epsilon(held: ClassModules, attribute: str, modules: Mapping[str, ClassModules]) -> str | None:
    """Epsilon of a root-mean-square norm that has weights and no bias, the same one wherever the constructor chooses."""
    found = {_of_one(site, held, modules) for site in held.at(attribute)}
    return found.pop() if len(found) == 1 else None


def _of_one(site: ModuleSite, held: ClassModules, modules: Mapping[str, ClassModules]) -> str | None:
    if site.cls not in NORMS:
        return None
    given = tree.arguments(site.call, ("dim", "eps", "elementwise_affine", "bias")) or {}
    affine = tree.code(given["elementwise_affine"]) if "elementwise_affine" in given else "True"
    if "bias" in given or "eps" not in given or not (affine == "True" or _always(held, affine, modules)):
        return None
    return tree.code(given["eps"])


def _always(held: ClassModules, parameter: str, modules: Mapping[str, ClassModules]) -> bool:
    """Whether a parameter of the constructor is True wherever the class is built."""
    init = tree.method(held.definition.node, "__init__")  # type: ignore[arg-type]
    default = next((p.default for p in tree.parameters(init) if p.name.value == parameter), None) if init else None
    if default is None or tree.code(default) != "True":
        return False
    built = [s.call for m in modules.values() for sites in m.sites.values() for s in sites
             if s.cls == held.definition.name]  # fmt: skip
    return not any(a.keyword is not None and a.keyword.value == parameter for call in built for a in call.args)


def _last(statements: list[cst.BaseStatement], name: str) -> int | None:
    """Position of the last statement that binds a name, if it does only that."""
    for position in range(len(statements) - 1, -1, -1):
        found = assigned(statements[position])
        if found is not None and found[0] == name:
            return position
        if name in _names(statements[position]) and found is None:
            return None
    return None


def _names(node: cst.CSTNode) -> set[str]:
    return {n.value for n in tree.find(node, cst.Name)}


__all__ = ["Stream", "Turn", "normed_rotations"]
