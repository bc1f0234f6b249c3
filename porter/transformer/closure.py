"""Which other definitions a port's classes need, and where each name comes from."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst
from msgspec import Struct

from porter.model import Definition, Diagnostic, Unknown
from porter.source import tree
from porter.source.library import Library
from porter.source.names import qualified
from porter.specialise.model import Prepare
from porter.transformer.policy import Policy


class Closure(Struct, frozen=True):
    """Helper definitions in source order, the qualified names the port defines itself, and one decision per symbol."""

    helpers: tuple[Definition, ...]
    local: dict[str, str]
    decisions: dict[str, str]
    diagnostics: tuple[Diagnostic, ...]


def close(
    classes: tuple[Definition, ...],
    own: Mapping[str, str],
    home: str,
    library: Library,
    policy: Policy,
    prepare: Prepare,
) -> Closure:
    """Follow every global name used. Same file and private names: copied. Listed blocks: imported. Others: imported and
    reported."""
    helpers: dict[str, Definition] = {}
    decisions: dict[str, str] = {}
    diagnostics: list[Diagnostic] = []
    pending = list(classes)
    while pending:
        definition = pending.pop()
        for name in _globals(definition):
            canonical = library.canonical(name)
            if canonical in decisions or canonical in own:
                continue
            decision = _decide(canonical, home, library, policy)
            decisions[canonical] = decision
            if decision == "copy":
                found = library.definition(canonical)
                if isinstance(found, Unknown):
                    diagnostics.append(Diagnostic("PORT103", found.reason))
                    continue
                found = prepare(found)
                helpers[canonical] = found
                pending.append(found)
            elif decision == "unlisted":
                decisions[canonical] = "import"
                diagnostics.append(
                    Diagnostic(
                        "PORT110", f"{canonical} is imported although no table lists it", library.span(canonical)
                    )
                )
    ordered = sorted(helpers.items(), key=lambda item: _place(item[0], home, library))
    local = {name: d.name for name, d in ordered}
    return Closure(tuple(d for _, d in ordered), local, dict(sorted(decisions.items())), tuple(diagnostics))


def _decide(name: str, home: str, library: Library, policy: Policy) -> str:
    if not name.startswith("diffusers."):
        return "keep"
    if library.module(name) is not None:
        return "import"
    if name.startswith(home + ".") or name.rpartition(".")[2].startswith("_") or policy.copies(name):
        return "copy"
    return "import" if policy.imports(name) else "unlisted"


def _place(name: str, home: str, library: Library) -> tuple[int, str, int]:
    entry = library.entry(name)
    module = name.rpartition(".")[0]
    return (1 if module == home else 0, module, entry.line if entry else 0)


def _globals(definition: Definition) -> list[str]:
    """Qualified names used by a definition, in order of first use; f-strings included."""
    found = {q.rstrip("."): None for n in tree.find(definition.node, cst.Name) if (q := qualified(n.value)) is not None}
    return list(found)
