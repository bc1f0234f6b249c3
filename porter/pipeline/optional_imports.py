"""Packages that Diffusers imports only where they are installed: a port imports them where it uses them."""

from __future__ import annotations

import ast
from collections.abc import Collection

import libcst as cst

from porter.facts.pipeline import Members
from porter.model import Definition
from porter.source.library import Library
from porter.source.names import DOT
from porter.source.tree import find, statement, transform


def optional_packages(library: Library, members: Members) -> frozenset[str]:
    """Top-level packages that the pipeline's files import under `if is_..._available():`."""
    found: set[str] = set()
    for definition in members.classes:
        module = library.module(definition.module)
        for node in module.blocks if module is not None else ():
            if not isinstance(node, ast.If) or "_available" not in ast.unparse(node.test):
                continue
            for inner in node.body:
                if isinstance(inner, ast.Import):
                    found |= {a.name.split(".")[0] for a in inner.names}
                elif isinstance(inner, ast.ImportFrom) and not inner.level and inner.module:
                    found.add(inner.module.split(".")[0])
    return frozenset(found)


def import_where_used(definition: Definition, packages: Collection[str]) -> Definition:
    """The definition with an import ahead of each statement that needs one of the packages."""
    if not any(_needs(n, packages) for n in find(definition.node, cst.Name)):
        return definition

    def name(original: cst.Name, updated: cst.Name) -> cst.Name:
        return cst.Name(updated.value.rpartition(DOT)[2]) if _needs(updated, packages) else updated

    chained = {id(n.orelse) for n in find(definition.node, cst.If) if isinstance(n.orelse, cst.If)}

    def imports(node: cst.CSTNode) -> list[cst.BaseStatement]:
        parts = [n.rpartition(DOT) for n in sorted({n.value for n in find(node, cst.Name) if _needs(n, packages)})]
        return [statement(f"from {module.replace(DOT, '.')} import {last}") for module, _, last in parts]

    def line(original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine) -> object:
        found = imports(original)
        return cst.FlattenSentinel([*found, updated]) if found else updated

    def branch(original: cst.If, updated: cst.If) -> object:
        found = imports(original.test) if id(original) not in chained else []
        return cst.FlattenSentinel([*found, updated]) if found else updated

    return definition.with_node(
        transform(definition.node, {cst.Name: name, cst.SimpleStatementLine: line, cst.If: branch})
    )


def _needs(name: cst.Name, packages: Collection[str]) -> bool:
    return DOT in name.value and name.value.split(DOT, 1)[0] in packages
