"""State that `__call__` keeps on the pipeline object: which attributes, and which properties show them.

Diffusers writes `self._guidance_scale = guidance_scale` and reads it through a property. One object that serves many
requests at once can't do that, so a port keeps these values in local variables wherever nothing else needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.members import Members, is_property, self_reads
from porter.source.tree import body, find, self_attribute, strip_docstring


class CallState(Struct, frozen=True):
    """`attributes` are written in `__call__`; `properties` maps a name to the expression it returns."""

    attributes: tuple[str, ...]
    properties: dict[str, cst.BaseExpression]


def call_state(members: Members, statements: Sequence[cst.BaseStatement]) -> CallState:
    """Attributes the statements write on `self`, in source order, and the properties computed from them alone."""
    written: list[str] = []
    for statement in statements:
        for assign in find(statement, cst.Assign, cst.AugAssign):
            targets = [t.target for t in assign.targets] if isinstance(assign, cst.Assign) else [assign.target]
            for target in targets:
                name = self_attribute(target)
                if name is not None and name not in written:
                    written.append(name)
    properties: dict[str, cst.BaseExpression] = {}
    for name in members.names():
        function = members.method(name)
        if function is None or not is_property(function) or name in properties:
            continue
        value = _returned(function)
        if value is not None and self_reads(value) & set(written):
            properties[name] = value
    return CallState(tuple(written), properties)


def _returned(function: cst.FunctionDef) -> cst.BaseExpression | None:
    statements = strip_docstring(body(function))
    if len(statements) == 1 and isinstance(statements[0], cst.SimpleStatementLine):
        only = statements[0].body[0]
        if isinstance(only, cst.Return):
            return only.value
    return None
