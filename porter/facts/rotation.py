"""Rotary embeddings of adjacent pairs: which calls turn a tensor so, and by which cosines and sines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import libcst as cst

from porter.facts.module_tree import module_tree
from porter.model import Definition, Unit, Unknown
from porter.source import tree
from porter.source.library import Library
from porter.source.names import absolute, qualified

SHARED = "diffusers.models.embeddings.apply_rotary_emb"
_SHARED_PARAMETERS = ("x", "freqs_cis", "use_real", "use_real_unbind_dim", "sequence_dim")
TABLES = "get_1d_rotary_pos_embed"
_COMPLEX = (
    f"turned = {absolute('torch.view_as_complex')}(x.float().reshape(*x.shape[:-1], -1, 2))",
    "table = table.unsqueeze(axis)",
    f"out = {absolute('torch.view_as_real')}(turned * table).flatten(3)",
    "return out.type_as(x)",
)
"""The product of complex numbers, in float32, as every model that has it writes it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is turned, [B, S, heads, D], and by which table: a pair of real ones, [S, D], or a complex one, [..., S, D/2]."""

    tensor: cst.BaseExpression
    table: cst.BaseExpression
    real: bool

    def waves(self, start: str = "", stop: str = "") -> tuple[str, str]:
        """Cosines and sines of the tokens from `start` to `stop`, [..., S, D/2], as expressions."""
        table = tree.code(tree.atomic(self.table))
        tokens = f"{start}:{stop}"
        if self.real:
            return f"{table}[0][{tokens}, ::2]", f"{table}[1][{tokens}, ::2]"
        part = f"[..., {tokens}, :]" if start or stop else ""
        return f"{table}.real{part}", f"{table}.imag{part}"


def pair_rotation(call: cst.CSTNode, unit: Unit) -> Turn | None:
    """The rotation a call computes, if it turns pairs of neighbours of tokens along dimension 1; None if it is not known to.

    Of real tables that holds where the angles come twice: `angles_come_twice` says so, of a whole model.
    """
    if not isinstance(call, cst.Call) or not isinstance(call.func, cst.Name):
        return None
    if call.func.value == absolute(SHARED):
        return _shared(call)
    found = _function(call.func.value, unit)
    return _local(call, found) if found is not None else None


def _shared(call: cst.Call) -> Turn | None:
    """The library's function: a pair of real tables of [S, D], each angle twice, or complex ones of [B, S, D/2]."""
    given = tree.arguments(call, _SHARED_PARAMETERS)
    if given is None or not {"x", "freqs_cis"} <= given.keys():
        return None
    text = {name: tree.code(value) for name, value in given.items()}
    if text.get("use_real", "True") == "False":
        return Turn(given["x"], given["freqs_cis"], real=False)
    by_pairs = text.get("use_real_unbind_dim", "-1") == "-1" and text.get("sequence_dim", "2") == "1"
    if text.get("use_real", "True") != "True" or not by_pairs:
        return None
    return Turn(given["x"], given["freqs_cis"], real=True)


def _local(call: cst.Call, function: cst.FunctionDef) -> Turn | None:
    """A function of the model: the statements that its constant arguments choose are the product of complex numbers."""
    names = [p.name.value for p in tree.parameters(function)]
    given = tree.arguments(call, names)
    if given is None or len(names) < 2 or not {names[0], names[1]} <= given.keys():
        return None
    constant = {p.name.value: tree.code(p.default) for p in tree.parameters(function) if p.default is not None}
    constant |= {n: tree.code(v) for n, v in given.items() if n not in names[:2]}
    chosen = _chosen(tree.strip_docstring(tree.body(function)), constant)
    if not _is_complex_product(chosen, names[0], names[1]):
        return None
    return Turn(given[names[0]], given[names[1]], real=False)


def _chosen(statements: list[cst.BaseStatement], constant: dict[str, str]) -> list[cst.BaseStatement]:
    """Statements that run when parameters have these values; a test of something else ends the search."""
    out: list[cst.BaseStatement] = []
    for statement in statements:
        if not isinstance(statement, cst.If):
            out.append(statement)
            continue
        value = constant.get(statement.test.value) if isinstance(statement.test, cst.Name) else None
        if value == "True":
            out += _chosen(tree.body(statement), constant)
        elif value == "False":
            out += _chosen(tree.body(statement.orelse), constant) if isinstance(statement.orelse, cst.Else) else []
        else:
            out.append(statement)
    return out


def _is_complex_product(statements: list[cst.BaseStatement], x: str, table: str) -> bool:
    if len(statements) != len(_COMPLEX):
        return False
    turned, out = assigned(statements[0]), assigned(statements[2])
    if turned is None or out is None:
        return False
    return any(
        all(tree.same(a, b) for a, b in zip(_product(turned[0], out[0], x, table, axis), statements, strict=True))
        for axis in ("1", "2")
    )


@lru_cache(maxsize=64)
def _product(turned: str, out: str, x: str, table: str, axis: str) -> tuple[cst.BaseStatement, ...]:
    names = {"turned": turned, "out": out, "x": x, "table": table, "axis": axis}
    holes = {k: tree.expression(v) for k, v in names.items()}
    return tuple(tree.statement(line, **holes) for line in _COMPLEX)


def assigned(statement: cst.CSTNode) -> tuple[str, cst.BaseExpression] | None:
    """Name and value of a statement that binds one local; None for other statements."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return None
    small = statement.body[0]
    if not isinstance(small, cst.Assign) or len(small.targets) != 1:
        return None
    target = small.targets[0].target
    return (target.value, small.value) if isinstance(target, cst.Name) else None


def angles_come_twice(unit: Unit) -> bool:
    """Whether every real rotary table this model makes holds each angle twice, side by side, and none comes from outside."""
    root = unit.get(unit.root)
    forward = tree.method(root.node, "forward") if root is not None and isinstance(root.node, cst.ClassDef) else None
    if forward is not None and any("rotary" in p.name.value or "freqs" in p.name.value
                                   for p in tree.parameters(forward)):  # fmt: skip
        return False
    nodes = [*(d.node for d in unit.definitions), *_imported(unit)]
    found = [_twice(call, unit) for node in nodes for call in tree.find(node, cst.Call)]
    known = [f for f in found if f is not None]
    return bool(known) and all(known)


def _imported(unit: Unit) -> Iterator[cst.CSTNode]:
    """Classes of the library that make tables for this model."""
    library = unit.facts.get("library")
    built = {s.cls for m in module_tree(unit).values() for sites in m.sites.values() for s in sites}
    pending = sorted(name for name in built if name.startswith("diffusers.")) if isinstance(library, Library) else []
    for name in pending:
        assert isinstance(library, Library)
        source = library.syntax(name)
        nodes = list(ast.walk(source)) if source is not None else []
        # A name that a class had before it moved: building it builds the class that it imports.
        pending += [f"{_package(name, n.level)}.{n.module}.{a.name}" for n in nodes
                    if isinstance(n, ast.ImportFrom) and n.level for a in n.names]  # fmt: skip
        if any(isinstance(n, ast.Name) and n.id == TABLES for n in nodes):
            definition = library.definition(name)
            if isinstance(definition, Definition):
                yield definition.node


def _package(name: str, level: int) -> str:
    """The package that a relative import of so many dots starts from, in the module of a definition."""
    return name.rsplit(".", level + 1)[0]


def _twice(call: cst.Call, unit: Unit) -> bool | None:
    """For a call that makes tables or cosines: whether neighbours are equal. None for other calls."""
    if isinstance(call.func, cst.Attribute) and call.func.attr.value == "cos":
        return False
    name = tree.call_name(call) or ""
    origin = qualified(name) or name
    if origin == "torch.cos":
        return False
    if origin.rpartition(".")[2] != TABLES:
        return None
    given = {a.keyword.value: tree.code(a.value) for a in call.args if a.keyword is not None}
    repeated = given.get("repeat_interleave_real", "True") == "True"
    if origin != f"diffusers.models.embeddings.{TABLES}":
        function = _function(name, unit)
        repeated &= function is not None and ".repeat_interleave(2, dim=1)" in tree.code(function)
        repeated &= "repeat_interleave_real" in given
    return repeated and given.get("use_real") == "True"


def _function(name: str, unit: Unit) -> cst.FunctionDef | None:
    """A function of the unit, or of the model's source."""
    definition: Definition | Unknown | None = unit.get(name.rpartition(absolute("."))[2])
    library = unit.facts.get("library")
    origin = qualified(name)
    if definition is None and origin is not None and origin.startswith("diffusers.") and isinstance(library, Library):
        definition = library.definition(origin)
    node = definition.node if isinstance(definition, Definition) else None
    return node if isinstance(node, cst.FunctionDef) else None
