"""Absolute names: a tree in which every global reference says where it comes from.

Resolving names through LibCST's metadata costs more than parsing, and a resolved name does not survive an edit.
porter therefore rewrites each definition once, when it is loaded: `nn.Linear` becomes the single identifier
`torch·nn·Linear` (the middle dot U+00B7 is legal in a Python identifier and occurs in no source we read).
Matching a symbol is then a comparison of strings, code inserted by a rule cannot be captured by a local import,
and imports are derived from the finished tree by `porter.emit.imports`.
"""

from __future__ import annotations

import builtins

import libcst as cst

DOT = "\u00b7"
ESCAPED_DOT = "\ue000"
"""Stands for a `\u00b7` that the source itself holds, in a comment or a text, until the file is printed."""
BUILTINS = frozenset(dir(builtins))


def absolute(qualified: str) -> str:
    """`torch.nn.Linear` -> `torch·nn·Linear`."""
    return qualified.replace(".", DOT)


def qualified(name: str) -> str | None:
    """`torch·nn·Linear` -> `torch.nn.Linear`; None for a local name."""
    return name.replace(DOT, ".") if DOT in name else None


def is_absolute(node: cst.CSTNode, qualified_name: str) -> bool:
    """Whether `node` is a reference to exactly this symbol."""
    return isinstance(node, cst.Name) and node.value == absolute(qualified_name)


def referenced(node: cst.CSTNode) -> str | None:
    """The qualified name `node` refers to, or None."""
    return qualified(node.value) if isinstance(node, cst.Name) else None


def dotted(node: cst.BaseExpression) -> str | None:
    """`a.b.c` for a chain of plain names, else None."""
    parts: list[str] = []
    while isinstance(node, cst.Attribute):
        parts.append(node.attr.value)
        node = node.value
    if not isinstance(node, cst.Name):
        return None
    parts.append(node.value)
    return ".".join(reversed(parts))
