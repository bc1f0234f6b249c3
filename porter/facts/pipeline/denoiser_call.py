"""One denoiser call of the loop: what is called, with which arguments, and what is done with its result at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.liveness import uses
from porter.model import Unknown
from porter.source.tree import arguments, find, replace_nodes, substitute


class Branch(Struct, frozen=True):
    """One denoiser call: `result = callee(**arguments)[0]`, and `process`, statements that rewrite `result` alone."""

    callee: cst.BaseExpression
    arguments: Mapping[str, cst.BaseExpression]
    result: str
    process: tuple[cst.BaseStatement, ...] = ()


Names = Callable[[cst.BaseExpression], Sequence[str] | Unknown]
"""Parameter names of a denoiser's forward, for calls that pass positional arguments."""


def denoiser_call(statement: cst.BaseStatement, call: cst.Call, forward_parameters: Names) -> Branch | Unknown:
    """The call in `result = ...call(...)[0]...`."""
    if not isinstance(statement, cst.SimpleStatementLine) or not isinstance(statement.body[0], cst.Assign):
        return Unknown("the denoiser call is not a plain assignment")
    assign = statement.body[0]
    target = assign.targets[0].target
    if not isinstance(target, cst.Name) or len(assign.targets) != 1:
        return Unknown("the denoiser's result is unpacked")
    output = next((n for n in find(assign.value, cst.Subscript, cst.Attribute) if _is_first_output(n, call)), None)
    if output is None:
        return Unknown("the denoiser's result is processed in the same statement")
    process: tuple[cst.BaseStatement, ...] = ()
    if output is not assign.value:
        value = replace_nodes(assign.value, [(output, target)])
        process = (cst.SimpleStatementLine([cst.Assign(assign.targets, value)]),)
    names: Sequence[str] | Unknown = ()
    if any(a.keyword is None and not a.star for a in call.args):
        names = forward_parameters(call.func)
    if isinstance(names, Unknown):
        return names
    bound = arguments(call, names)
    if bound is None:
        return Unknown("the denoiser call unpacks its arguments")
    return Branch(call.func, bound, target.value, process)


def _is_first_output(value: cst.BaseExpression, call: cst.Call) -> bool:
    """`call(...)[0]` or `call(...).sample`."""
    if isinstance(value, cst.Subscript) and value.value is call and len(value.slice) == 1:
        index = value.slice[0].slice
        return isinstance(index, cst.Index) and isinstance(index.value, cst.Integer) and index.value.value == "0"
    return isinstance(value, cst.Attribute) and value.value is call and value.attr.value == "sample"


def take_process(
    statements: Sequence[cst.BaseStatement], name: str
) -> tuple[tuple[cst.BaseStatement, ...], list[cst.BaseStatement]]:
    """Leading statements `name = f(name)` (or `name, _ = f(name)`), and those after them."""
    place = 0
    for each in statements:
        if not isinstance(each, cst.SimpleStatementLine) or not isinstance(each.body[0], cst.Assign):
            break
        target = each.body[0].targets[0].target
        if isinstance(target, cst.Tuple):
            target = target.elements[0].value
        if not isinstance(target, cst.Name) or target.value != name or name not in uses(each):
            break
        place += 1
    return tuple(statements[:place]), list(statements[place:])


def renamed(statements: Sequence[cst.BaseStatement], old: str, new: str) -> tuple[cst.BaseStatement, ...]:
    """The statements with one local renamed."""
    return tuple(substitute(s, {old: cst.Name(new)}) for s in statements)  # type: ignore[misc]
