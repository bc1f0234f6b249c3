"""Print one file of a port: header, imports, definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from porter.emit.imports import resolve_imports
from porter.emit.templates import render
from porter.model import Definition
from porter.source import tree


def print_definitions(definitions: Iterable[Definition], local: Mapping[str, str], header: str) -> str:
    """Marked, unformatted text of a file. `local` maps qualified names to the names the file defines them by."""
    parts: list[str] = []
    for definition in definitions:
        parts.append(tree.code(definition.node).strip("\n"))
    resolved = resolve_imports("\n\n\n".join(parts) + "\n", local)
    # Annotations may name classes further down, as they do in the source.
    return f"{header}\nfrom __future__ import annotations\n\n" + "\n".join(resolved.imports) + "\n\n" + resolved.body


def file_header(source: str, source_file: str, version: str, rules_digest: str) -> str:
    """SPDX lines and provenance."""
    return render("header.py.jinja", source=source, file=source_file, version=version, digest=rules_digest)
