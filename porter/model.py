"""Values shared by all phases. Everything here is frozen; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from msgspec import Struct, field
from msgspec.structs import replace

if TYPE_CHECKING:
    import libcst as cst

Status = Literal["applied", "inferred", "diagnosed", "waived"]


class Span(Struct, frozen=True, order=True):
    """A place in a source file. `file` is relative to the source root; lines and columns count from 1."""

    file: str
    line: int
    column: int = 1
    end_line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Unknown(Struct, frozen=True):
    """A fact that could not be established, and why. Whoever needs the fact reports; nobody guesses."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Diagnostic(Struct, frozen=True):
    """One finding about the input, a rule file or a port; `code` is a row of `porter.diagnostics.catalogue`."""

    code: str
    message: str
    span: Span | None = None
    rule: str | None = None
    related: tuple[Span, ...] = ()
    advice: str | None = None


class PorterError(Exception):
    """A condition that ends a command with one clear message. Carries the diagnostics to print."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__("; ".join(f"{d.code} {d.message}" for d in diagnostics))
        self.diagnostics = diagnostics

    def __reduce__(self) -> tuple[type[PorterError], tuple[Diagnostic, ...]]:
        """So that it survives the way out of another process."""
        return PorterError, self.diagnostics


class SiteStatus(Struct, frozen=True):
    """How one site that a rule must handle ended."""

    rule: str
    span: Span
    status: Status
    detail: str = ""


class Definition(Struct, frozen=True):
    """A top-level class, function or assignment on its way into a port.

    `node` is an absolute tree: each reference to a global is one Name whose value is the qualified name
    with its dots written as middle dots (`torch·nn·Linear`), see `porter.source.names`.
    """

    name: str
    node: cst.ClassDef | cst.FunctionDef | cst.SimpleStatementLine
    module: str
    file: str

    def with_node(self, node: cst.CSTNode) -> Definition:
        return replace(self, node=node)


class Unit(Struct, frozen=True):
    """One file of a port under construction: its definitions in order of emission."""

    definitions: tuple[Definition, ...]
    root: str
    facts: Mapping[str, object] = field(default_factory=dict)

    def get(self, name: str) -> Definition | None:
        return next((d for d in self.definitions if d.name == name), None)

    def replace(self, *changed: Definition) -> Unit:
        """The same unit with definitions of the same names exchanged."""
        by_name = {d.name: d for d in changed}
        return replace(self, definitions=tuple(by_name.get(d.name, d) for d in self.definitions))
