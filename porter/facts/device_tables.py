"""Functions chosen by the kind of device a tensor is on."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.facts.rotation import assigned
from porter.model import Definition, Unit
from porter.source import tree
from porter.source.library import Library
from porter.source.names import absolute, qualified

PARTIAL = absolute("functools.partial")


@fact("device_table", fields=["name", "calls", "function", "arguments"])
def device_tables(unit: Unit) -> Iterator[FactSite]:
    """`f = TABLE.get(tensor.device.type, TABLE["kind"])` where `f` is only called, and TABLE is a dict of functions.

    The site is the statement; `calls` the calls of `f`, `function` what the table holds for the kind it falls back on,
    `arguments` the keyword arguments a partial application adds to it.
    """
    for definition in unit.definitions:
        for function in tree.find(definition.node, cst.FunctionDef):
            for line in tree.find(function, cst.SimpleStatementLine):
                found = assigned(line)
                chosen = _fallback(found[1], unit) if found is not None else None
                if found is None or chosen is None:
                    continue
                uses = [n for n in tree.find(function, cst.Name) if n.value == found[0]]
                calls = [c for c in tree.find(function, cst.Call) if any(c.func is n for n in uses)]
                if len(uses) == len(calls) + 1:
                    yield FactSite(line, definition.name, {
                        "name": found[0], "calls": tuple(calls), "function": chosen[0], "arguments": chosen[1],
                    })  # fmt: skip


def _fallback(value: cst.BaseExpression, unit: Unit) -> tuple[cst.BaseExpression, tuple[cst.Arg, ...]] | None:
    """Function and arguments that `TABLE.get(x.device.type, TABLE[kind])` gives where the table does not name the device."""
    if not isinstance(value, cst.Call) or not isinstance(value.func, cst.Attribute) or len(value.args) != 2:
        return None
    table, key, default = value.func.value, value.args[0].value, value.args[1].value
    if value.func.attr.value != "get" or not tree.code(key).endswith(".device.type"):
        return None
    if not isinstance(default, cst.Subscript) or not tree.same(default.value, table) or not isinstance(table, cst.Name):
        return None
    entries = _entries(table.value, unit)
    chosen = entries.get(tree.code(default.slice[0].slice)) if entries else None
    if isinstance(chosen, cst.Name):
        return chosen, ()
    if isinstance(chosen, cst.Call) and tree.call_name(chosen) == PARTIAL:
        first, *rest = chosen.args
        return (first.value, tuple(rest)) if all(a.keyword is not None for a in rest) else None
    return None


def _entries(name: str, unit: Unit) -> dict[str, cst.BaseExpression]:
    """Values of a dict of the module by the text of their keys; empty if it is not a plain literal."""
    library, origin = unit.facts.get("library"), qualified(name)
    definition = unit.get(name.rpartition(absolute("."))[2])
    if definition is None and origin is not None and isinstance(library, Library):
        found = library.definition(origin)
        definition = found if isinstance(found, Definition) else None
    value = assigned(definition.node) if definition is not None else None
    if value is None or not isinstance(value[1], cst.Dict):
        return {}
    elements = [e for e in value[1].elements if isinstance(e, cst.DictElement)]
    return {tree.code(e.key): e.value for e in elements} if len(elements) == len(value[1].elements) else {}
