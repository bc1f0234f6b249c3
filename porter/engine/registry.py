"""Names that rules may use for what is written in Python: facts (where) and ops (how).

Facts modules register themselves when `porter.facts.load()` imports them, ops when `porter.engine.ops.load()` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct, field

if TYPE_CHECKING:
    import libcst as cst

    from porter.engine.edits import Edit
    from porter.engine.site import Site
    from porter.model import Diagnostic, Unit

_NONE: Mapping[str, object] = MappingProxyType({})


class FactSite(Struct, frozen=True):
    """One place an analysis found: a node of the unit (the very object), the definition it is in, and what is known.

    A field is a node of the unit, text of an expression, a number, a boolean, None, or `Unknown`.
    """

    node: cst.CSTNode
    definition: str
    fields: Mapping[str, object] = field(default_factory=lambda: _NONE)


FactFinder = Callable[["Unit"], Iterable[FactSite]]
OpFunction = Callable[["Site", "Unit", Mapping[str, object]], "Sequence[Edit] | Diagnostic"]

FACTS: dict[str, FactFinder] = {}
FACT_FIELDS: dict[str, tuple[str, ...]] = {}
OPS: dict[str, OpFunction] = {}

_Finder = TypeVar("_Finder", bound=FactFinder)
_Op = TypeVar("_Op", bound=OpFunction)


def fact(name: str, fields: Iterable[str] = ()) -> Callable[[_Finder], _Finder]:
    """Register an analysis under the name rules use in `on: {fact: name}`; `fields` are checked in rule files."""

    def register(function: _Finder) -> _Finder:
        if FACTS.get(name, function) is not function:
            raise ValueError(f"two facts are named {name}")
        FACTS[name] = function
        FACT_FIELDS[name] = tuple(fields)
        return function

    return register


def op(name: str) -> Callable[[_Op], _Op]:
    """Register a pure function that returns what a rule could have written, or one diagnostic."""

    def register(function: _Op) -> _Op:
        if OPS.get(name, function) is not function:
            raise ValueError(f"two ops are named {name}")
        OPS[name] = function
        return function

    return register


def load() -> None:
    """Import the modules that register facts and ops."""
    import importlib

    for package in ("porter.facts", "porter.engine.ops"):
        module = importlib.import_module(package)
        loader = getattr(module, "load", None)
        if loader is not None:
            loader()
