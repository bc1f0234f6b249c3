"""Turn per-call attributes of the pipeline object into local variables of the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.call_state import CallState
from porter.facts.pipeline.liveness import uses, writes
from porter.facts.pipeline.members import self_reads
from porter.source.marks import inherit
from porter.source.tree import find, same, self_attribute, transform

Node = TypeVar("Node", bound=cst.CSTNode)


class Localised(Struct, frozen=True):
    """The statements, and the attributes that had to stay on the object (a helper method reads them)."""

    statements: tuple[cst.BaseStatement, ...]
    kept: frozenset[str]


def localise(
    statements: Sequence[cst.BaseStatement],
    state: CallState,
    parameters: frozenset[str],
    read_elsewhere: frozenset[str],
) -> Localised:
    """Replace `self._x` and the properties over it by locals, except for what `read_elsewhere` names."""
    kept = {a for a in state.attributes if a in read_elsewhere}
    for name, value in state.properties.items():
        if name in read_elsewhere:
            kept |= self_reads(value) & set(state.attributes)
    names: dict[str, str] = {}
    local = writes(statements)
    for attribute in state.attributes:
        name = attribute.lstrip("_")
        taken = name in local or name in parameters
        if attribute in kept:
            continue
        names[attribute] = f"call_{name}" if taken and not _mirrors(statements, attribute, name) else name
    plain = {p: v for p, v in state.properties.items() if self_attribute(v) in names}
    computed = {
        p: v
        for p, v in state.properties.items()
        if p not in plain and self_reads(v) & set(state.attributes) <= set(names) and p not in read_elsewhere
    }
    locals_ = {**names, **{p: names[self_attribute(v) or ""] for p, v in plain.items()}, **{c: c for c in computed}}
    out: list[cst.BaseStatement] = []
    pending = {p: self_reads(v) & set(state.attributes) for p, v in computed.items() if _read(statements, p)}
    seen: set[str] = set()
    for statement in statements:
        new = _renamed(statement, locals_)
        if not is_self_assignment(new):
            out.append(new)
        seen |= _assigned(statement)
        for name in [p for p, needs in pending.items() if needs <= seen]:
            value = _assignment(name, _renamed(computed[name], locals_))
            out.append(inherit(value, statement, "call-state-to-locals"))
            del pending[name]
    return Localised(tuple(out), frozenset(kept))


def _read(statements: Sequence[cst.BaseStatement], name: str) -> bool:
    return any(name in self_reads(s) for s in statements)


def _assigned(statement: cst.BaseStatement) -> set[str]:
    found = set()
    for assign in find(statement, cst.Assign):
        found |= {a for t in assign.targets if (a := self_attribute(t.target)) is not None}
    return found


def _set_from(statements: Sequence[cst.BaseStatement], attribute: str, name: str) -> bool:
    return any(
        self_attribute(t.target) == attribute and isinstance(a.value, cst.Name) and a.value.value == name
        for s in statements
        for a in find(s, cst.Assign)
        for t in a.targets
    )


def _mirrors(statements: Sequence[cst.BaseStatement], attribute: str, name: str) -> bool:
    """Whether one local can be both: the attribute is set from `name`, and from then on only one of them is used."""
    stored = changed = False
    for statement in statements:
        if stored and (name in writes([statement]) or (changed and name in uses(statement))):
            return False
        if attribute not in _assigned(statement):
            continue
        if not stored and not _set_from([statement], attribute, name):
            return False
        if stored and name in uses(statement):
            return False
        changed = stored
        stored = True
    return stored


def is_self_assignment(statement: cst.BaseStatement) -> bool:
    """Whether a statement gives a name its own value."""
    if not isinstance(statement, cst.SimpleStatementLine) or not isinstance(statement.body[0], cst.Assign):
        return False
    assign = statement.body[0]
    return len(assign.targets) == 1 and same(assign.targets[0].target, assign.value)


def _assignment(name: str, value: cst.BaseExpression) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(name))], value)])


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    """The node with locals for the attributes of `self` that `names` lists."""

    def local(original: cst.Attribute, updated: cst.Attribute) -> cst.BaseExpression:
        name = names.get(self_attribute(original) or "")
        return updated if name is None else cst.Name(name)

    return transform(node, {cst.Attribute: local})
