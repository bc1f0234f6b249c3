"""Imports of a finished file, derived from the absolute names left in it."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

from msgspec import Struct

from porter.source.names import DOT, ESCAPED_DOT

_NAME = re.compile(r"(?<![\w\u00b7])[A-Za-z_]\w*(?:\u00b7\w*)+")

ALIASES = {"torch.nn.functional": "F", "torch.nn": "nn", "numpy": "np"}
"""Modules with a customary short name."""

SIBLING = "sibling"
"""Package name that stands for the port's own folder; its modules are imported relatively."""

_BY_NAME = frozenset(
    {"typing", "collections", "collections.abc", "dataclasses", "types", "__future__", "abc", "pathlib"}
)
"""Standard modules from which names are imported one by one."""


class Resolved(Struct, frozen=True):
    """A file body with ordinary names, and the import lines it needs."""

    body: str
    imports: tuple[str, ...]


def resolve_imports(body: str, local: Mapping[str, str]) -> Resolved:
    """Replace absolute names in `body`; `local` maps qualified names that the port defines itself to their local names.

    A name that would collide with another import or a local definition is imported under an alias.
    """
    taken: dict[str, str] = {name: f"local {name}" for name in local.values()}
    lines: dict[str, None] = {}
    members: dict[str, dict[str, str]] = defaultdict(dict)
    written: dict[str, str] = {}

    def spell(match: re.Match[str]) -> str:
        absolute = match.group(0)
        if absolute not in written:
            written[absolute] = _spelling(absolute.rstrip(DOT).replace(DOT, "."), local, taken, lines, members)
        return written[absolute]

    text = _NAME.sub(spell, body)
    for module, names in members.items():
        wanted = ", ".join(f"{n} as {a}" if a != n else n for n, a in sorted(names.items()))
        lines[f"from {module} import {wanted}"] = None
    return Resolved(text.replace(ESCAPED_DOT, DOT), _sorted(lines))


def _sorted(lines: Iterable[str]) -> tuple[str, ...]:
    """Import lines as the engine's own files have them: standard library, third party, engine, this folder; an empty
    string between the groups."""
    groups: dict[int, list[str]] = defaultdict(list)
    for line in lines:
        groups[_group(line)].append(line)
    ordered: list[str] = []
    for number in sorted(groups):
        ordered += [""] if ordered else []
        ordered += sorted(groups[number], key=lambda line: (line.startswith("from "), line.split()[1].lower(), line))
    return tuple(ordered)


def _group(line: str) -> int:
    module = line.split()[1]
    if module.startswith("."):
        return 3
    package = module.split(".")[0]
    return 0 if package in sys.stdlib_module_names else 2 if package == "vllm_omni" else 1


def _spelling(
    name: str,
    local: Mapping[str, str],
    taken: dict[str, str],
    lines: dict[str, None],
    members: dict[str, dict[str, str]],
) -> str:
    if name in local:
        return local[name]
    module, _, last = name.rpartition(".")
    if module.startswith(SIBLING + "."):
        lines.setdefault(f"from {module.removeprefix(SIBLING)} import {last}")
        return last
    if not module or name in ALIASES:
        return _module(name, lines)
    if module in ALIASES or module == "torch" or (module in sys.stdlib_module_names and module not in _BY_NAME):
        return f"{_module(module, lines)}.{last}"
    if module.startswith("torch.") and module not in ("torch.nn",) and last[:1].islower():
        lines.setdefault("import torch")
        return name
    alias = last
    if taken.get(last, name) != name:
        alias = f"{module.split('.')[0].capitalize()}{last}"
    taken[alias] = name
    members[module][last] = alias
    return alias


def _module(name: str, lines: dict[str, None]) -> str:
    if name == "torch.nn":
        lines["from torch import nn"] = None
        return "nn"
    alias = ALIASES.get(name)
    lines[f"import {name} as {alias}" if alias else f"import {name}"] = None
    return alias or name
