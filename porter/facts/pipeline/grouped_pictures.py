"""Post-processed pictures that are handed out in groups: `for i in range(n): groups.append(pictures[a:b])`."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.source.tree import body, find


def grouping(statements: Sequence[cst.BaseStatement], groups: cst.BaseExpression) -> tuple[cst.Name, cst.For] | None:
    """The variable whose slices make up the list `groups`, and the loop that takes them.

    Post-processing treats each picture alone, so it makes no difference whether it comes before the slices or after.
    """
    if not isinstance(groups, cst.Name):
        return None
    for loop in [n for s in statements for n in find(s, cst.For)]:
        pictures = _appended(loop, groups.value)
        if pictures is not None:
            return pictures, loop
    return None


def _appended(loop: cst.For, groups: str) -> cst.Name | None:
    """`pictures` of `groups.append(pictures[a:b])`, if the loop does nothing else."""
    inner = body(loop)
    line = inner[0] if len(inner) == 1 else None
    if not isinstance(line, cst.SimpleStatementLine) or not isinstance(line.body[0], cst.Expr):
        return None
    call = line.body[0].value
    if not isinstance(call, cst.Call) or not isinstance(call.func, cst.Attribute) or len(call.args) != 1:
        return None
    owner, taken = call.func.value, call.args[0].value
    if call.func.attr.value != "append" or not isinstance(owner, cst.Name) or owner.value != groups:
        return None
    if not isinstance(taken, cst.Subscript) or not isinstance(taken.value, cst.Name) or len(taken.slice) != 1:
        return None
    return taken.value if isinstance(taken.slice[0].slice, cst.Slice) else None
