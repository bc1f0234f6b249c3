"""Head geometry of an attention class, as expressions valid at the end of its constructor."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct

from porter.model import Unknown
from porter.source import tree

HEAD_COUNTS = ("heads", "num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEAD_COUNTS = ("kv_heads", "num_kv_heads", "n_kv_heads", "num_key_value_heads")
HEAD_SIZES = ("head_dim", "dim_head", "dim_heads", "attention_head_dim", "head_size")
WIDTHS = ("inner_dim",)
"""Names that model code uses for these quantities, as constructor parameters or attributes."""


class Geometry(Struct, frozen=True):
    """`heads` and `head_size` are source text over `self` and the constructor's parameters; `local` the attributes read
    outside the constructor that count heads or their width, to be counted per rank."""

    heads: str
    head_size: str
    kv_heads: str | None
    local: tuple[str, ...]


def head_geometry(node: cst.ClassDef, widths: set[str]) -> Geometry | Unknown:
    """Geometry of a class; `widths` are the texts of the output widths of its column-parallel projections."""
    init = tree.method(node, "__init__")
    if init is None:
        return Unknown("no constructor")
    params = [p.name.value for p in tree.parameters(init)]
    attributes = {a for t in tree.find(init, cst.AssignTarget) if (a := tree.self_attribute(t.target))}
    heads = _named(HEAD_COUNTS, attributes, params)
    size = _named(HEAD_SIZES, attributes, params)
    width = next((w for w in sorted(widths) if w.startswith("self.")), next(iter(sorted(widths)), None))
    if width is None:  # nothing is sharded: the width is whatever the class calls its own
        width = _named(WIDTHS, attributes, params)
    if heads is None and size is not None and width is not None:
        heads = f"{width} // {size}"
    if size is None and heads is not None and width is not None:
        size = f"{width} // {heads}"
    if heads is None or size is None:
        return Unknown("neither a head count nor a head size is named in the constructor")
    read = {
        n.attr.value
        for item in node.body.body
        if isinstance(item, cst.FunctionDef) and item.name.value != "__init__"
        for n in tree.find(item, cst.Attribute)
        if tree.self_attribute(n)
    }
    counted = [n for n in (*HEAD_COUNTS, *KV_HEAD_COUNTS) if n in attributes and n in read]
    counted += [n for n in _widths(init, widths) if n in read and _counts_heads(node, n)]
    return Geometry(heads, size, _named(KV_HEAD_COUNTS, attributes, []), tuple(dict.fromkeys(counted)))


def _widths(init: cst.FunctionDef, widths: set[str]) -> list[str]:
    """Attributes that hold the width of the projections."""
    found = [w[5:] for w in sorted(widths) if w.startswith("self.")]
    for line in tree.find(init.body, cst.Assign):
        attribute = tree.self_attribute(line.targets[0].target)
        if attribute is not None and tree.code(line.value) in widths:
            found.append(attribute)
    return list(dict.fromkeys(found))


_RESHAPES = ("view", "reshape", "unflatten", "expand")


def _counts_heads(node: cst.ClassDef, attribute: str) -> bool:
    """Whether a width is used with head counts: divided, or as a dimension of a reshape."""
    for item in node.body.body:
        if not isinstance(item, cst.FunctionDef) or item.name.value == "__init__":
            continue
        for part in tree.find(item, cst.BinaryOperation, cst.Call):
            if isinstance(part, cst.Call) and not (
                isinstance(part.func, cst.Attribute) and part.func.attr.value in _RESHAPES
            ):
                continue
            if any(tree.self_attribute(n) == attribute for n in tree.find(part, cst.Attribute)):
                return True
    return False


def _named(names: tuple[str, ...], attributes: set[str], params: list[str]) -> str | None:
    for name in names:
        if name in attributes:
            return f"self.{name}"
    return next((n for n in names if n in params), None)
