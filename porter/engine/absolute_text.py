"""Plain Python text as definitions with absolute names: how examples and tests get into the engine's shape."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import libcst as cst

from porter.engine.text import resolve
from porter.model import Definition, Unit
from porter.source.absolutise import bound_names
from porter.source.marks import Mark, mark_of, with_mark
from porter.source.names import BUILTINS

MODULE = "example"


def absolutise_text(
    text: str, symbols: Mapping[str, str] | None = None, module: str = MODULE, *, wrap: bool | None = None
) -> tuple[Definition, ...]:
    """Definitions of a text. Names are resolved through its imports, its own definitions, and `symbols`.

    Bare statements are wrapped into `def example(self)`; `wrap` forces that, or forbids it. Every statement is marked
    with its line in the text. Raises SyntaxError if the text does not parse.
    """
    tree = ast.parse(text)
    imports = _imports(tree)
    first_line = 0
    if _needs_wrapping(tree) if wrap is None else wrap:
        text, first_line = _wrapped(text, tree), -1
        tree = ast.parse(text)
    body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    own = {name: f"{module}.{name}" for n in body for name in _defined(n)}
    names = {n: q for n, q in {**(symbols or {}), **imports, **own}.items() if n not in BUILTINS}
    parsed = cst.parse_module(text)
    statements = list(parsed.body)
    if parsed.header and statements:
        statements[0] = statements[0].with_changes(leading_lines=[*parsed.header, *statements[0].leading_lines])
    result: list[Definition] = []
    for plain, node in zip(body, [n for n in statements if not _is_import(n)], strict=True):
        marked = _mark(node, plain, f"{module}.py", first_line)
        resolved: Any = _resolved(marked, names, plain)
        result.append(Definition(_defined(plain)[0], resolved, module, f"{module}.py"))
    return tuple(result)


def needs_wrapping(text: str) -> bool:
    """Whether a text has statements that can't stand in a unit by themselves."""
    return _needs_wrapping(ast.parse(text))


def _needs_wrapping(tree: ast.Module) -> bool:
    alone = (ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom)
    return not all(isinstance(n, alone) for n in tree.body)


def _wrapped(text: str, tree: ast.Module) -> str:
    lines = text.splitlines()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(["def example(self):", *(f"    {line}" if line.strip() else line for line in lines), ""])


def unit_of(text: str, symbols: Mapping[str, str] | None = None, facts: Mapping[str, object] | None = None) -> Unit:
    """A unit made of a text; its root is the last definition."""
    definitions = absolutise_text(text, symbols)
    return Unit(definitions, definitions[-1].name if definitions else "", facts or {})


def _imports(tree: ast.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                found[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}" if node.module else alias.name
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    return [t.id for t in targets if isinstance(t, ast.Name)] or ["example"]


def _is_import(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(node.body[0], (cst.Import, cst.ImportFrom))


def _resolved(node: cst.CSTNode, names: Mapping[str, str], plain: ast.stmt) -> cst.CSTNode:
    """Absolute names, function by function: what a function binds is local to it and to what it encloses."""
    if isinstance(plain, (ast.Assign, ast.AnnAssign)):
        return resolve(node, names, _defined(plain))
    if isinstance(plain, ast.FunctionDef):
        return resolve(node, names, bound_names(plain))
    assert isinstance(plain, ast.ClassDef) and isinstance(node, cst.ClassDef)
    if not isinstance(node.body, cst.IndentedBlock):
        return resolve(node, names)
    members = [
        _resolved(m, names, p) if isinstance(p, (ast.FunctionDef, ast.ClassDef)) else resolve(m, names, _stored(p))
        for m, p in zip(node.body.body, plain.body, strict=True)
    ]
    shell = resolve(node.with_changes(body=node.body.with_changes(body=[])), names)
    return shell.with_changes(body=node.body.with_changes(body=members))


def _stored(node: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _mark(node: cst.BaseStatement, plain: ast.stmt, file: str, shift: int) -> cst.BaseStatement:
    """Marks with the lines of the text, by walking both trees' statements in step."""
    if mark_of(node) is not None:
        return node
    changes: dict[str, object] = {}
    for name in ("body", "orelse", "finalbody"):
        block, below = getattr(node, name, None), getattr(plain, name, None)
        if isinstance(block, (cst.Else, cst.Finally)):
            inner = _mark_block(block.body, below, file, shift)
            changes[name] = block.with_changes(body=inner)
        elif isinstance(block, cst.If) and below:
            changes[name] = _mark(block, below[0], file, shift)
        elif isinstance(block, cst.IndentedBlock):
            changes[name] = _mark_block(block, below, file, shift)
    node = node.with_changes(**changes) if changes else node
    return with_mark(node, Mark(file, max(1, plain.lineno + shift)))


def _mark_block(block: cst.BaseSuite, plain: list[ast.stmt] | None, file: str, shift: int) -> cst.BaseSuite:
    if not isinstance(block, cst.IndentedBlock) or plain is None or len(block.body) != len(plain):
        return block
    return block.with_changes(body=[_mark(n, p, file, shift) for n, p in zip(block.body, plain)])
