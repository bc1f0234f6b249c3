"""What a rule file may say. These types are the whole language: a key that is not here is an error.

`porter rules schema` prints them as a JSON Schema for editors; `docs/writing-a-rule.md` explains them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

Scalar = str | int | float | bool | None
Names = str | list[str]
Phase = Literal["normalize", "lower", "shard", "optimise", "tidy"]
Scope = Literal["transformer", "pipeline", "any"]
PHASES: tuple[Phase, ...] = ("normalize", "lower", "shard", "optimise", "tidy")
Code = Annotated[str, Meta(description="a code of the diagnostics catalogue", pattern=r"^PORT\d{3}$")]


class _Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Within(_Strict, frozen=True):
    """Where a site must stand; names may hold `*`."""

    class_: str | None = field(name="class", default=None)
    method: Names | None = None
    function: Names | None = None


class ClassFilter(_Strict, frozen=True):
    """Which classes are sites."""

    derives_from: Names | None = None
    name: Names | None = None


class On(_Strict, frozen=True):
    """The sites a rule must handle: exactly one kind. `bind` names the node (`$site` is what `match` matched)."""

    call: Names | None = None
    reference: Names | None = None
    decorator: Names | None = None
    class_: ClassFilter | None = field(name="class", default=None)
    method: Names | None = None
    class_attribute: Names | None = None
    pattern: str | None = None
    statement: str | None = None
    fact: str | None = None
    filter: dict[str, Scalar | list[Scalar]] = {}
    within: Within | None = None
    bind: str | None = None


class Option(_Strict, frozen=True):
    """One keyword of a matched call. Every keyword a call may have must be listed."""

    bind: str | None = None
    default: Scalar | UnsetType = UNSET
    must_be: Scalar | UnsetType = UNSET
    ignore: str | None = None


class Predicate(_Strict, frozen=True):
    """What must hold of a binding or of a field of a fact. All that are given must hold."""

    is_: Scalar | UnsetType = field(name="is", default=UNSET)
    is_not: Scalar | UnsetType = UNSET
    in_: list[Scalar] | str | UnsetType = field(name="in", default=UNSET)
    not_in: list[Scalar] | str | UnsetType = UNSET
    literal: bool | UnsetType = UNSET
    known: bool | UnsetType = UNSET
    is_statement: bool | UnsetType = UNSET
    absent: bool | UnsetType = UNSET
    conjuncts_include: str | UnsetType = UNSET
    derives_from: Names | UnsetType = UNSET
    bases_in: Names | UnsetType = UNSET
    name_matches: Names | UnsetType = UNSET
    within: Within | UnsetType = UNSET


class RemoveBases(_Strict, frozen=True):
    """Base classes that go."""

    bases: Names
    class_: str | None = field(name="class", default=None)


class EnsureBase(_Strict, frozen=True):
    """A base class that must be there."""

    base: str
    class_: str | None = field(name="class", default=None)


class EnsureParameter(_Strict, frozen=True):
    """A parameter that must be there; `of` names the function."""

    name: str
    of: str | None = None
    type: str | None = None
    default: str | None = None
    at: Literal["first", "last", "keyword"] = "last"
    class_: str | None = field(name="class", default=None)


class EnsureArgument(_Strict, frozen=True):
    """A keyword argument that must be given."""

    call: str
    name: str
    value: str


class EnsureAttribute(_Strict, frozen=True):
    """An attribute that must be set, in `__init__` or in the class body."""

    name: str
    value: str
    type: str | None = None
    class_: str | None = field(name="class", default=None)


class EnsureMethod(_Strict, frozen=True):
    """A method that must be there."""

    code: str
    class_: str | None = field(name="class", default=None)


class RenameLocal(_Strict, frozen=True):
    """A local or parameter under another name."""

    name: str
    to: str
    of: str | None = None


class MarkRaise(_Strict, frozen=True):
    """A statement that gives way to one that raises."""

    message: str
    at: str | None = None


class EditSpec(_Strict, frozen=True):
    """One edit: exactly one verb. `with` holds the code of replace, insert_before and insert_after."""

    replace: str | None = None
    remove: str | None = None
    insert_before: str | None = None
    insert_after: str | None = None
    with_: str | None = field(name="with", default=None)
    remove_bases: RemoveBases | None = None
    ensure_base: EnsureBase | None = None
    remove_decorator: str | None = None
    ensure_parameter: EnsureParameter | None = None
    ensure_argument: EnsureArgument | None = None
    ensure_init_attribute: EnsureAttribute | None = None
    ensure_class_attribute: EnsureAttribute | None = None
    ensure_method: EnsureMethod | None = None
    rename_local: RenameLocal | None = None
    mark_raise: MarkRaise | None = None

    @property
    def verb(self) -> str:
        """The verb that is set (exactly one, the loader has checked)."""
        return next((v for v in VERBS if getattr(self, v) is not None), "")


VERBS = tuple(name for name in EditSpec.__struct_fields__ if name != "with_")


class CaseSpec(_Strict, frozen=True):
    """What to do with a site that fits. The first case that fits wins."""

    match: str | None = None
    where: dict[str, Predicate | Scalar | list[Scalar]] = {}
    edit: list[EditSpec] = []
    op: str | None = None
    args: dict[str, Any] = {}
    keep: str | None = None
    report: dict[Code, str] = {}
    status: Literal["applied", "inferred"] = "applied"


class Keep(_Strict, frozen=True):
    """`otherwise: {keep: why}`: sites no case fits are left alone, on purpose."""

    keep: str


class Example(_Strict, frozen=True):
    """A test of the rule and its documentation."""

    name: str
    before: str | None = None
    after: str | None = None
    unchanged: str | None = None
    reports: list[Code] = []
    context: str | None = None
    facts: dict[str, Any] = {}


class RuleSpec(_Strict, frozen=True):
    """One rule file."""

    rule: Annotated[str, Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    doc: str
    phase: Phase
    on: On
    cases: list[CaseSpec]
    otherwise: Code | Keep
    scope: Scope = "any"
    after: list[str] = []
    symbols: dict[str, str] = {}
    match: str | None = None
    options: dict[str, Option] = {}
    examples: list[Example] = []


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a rule file."""
    import msgspec

    schema = msgspec.json.schema(RuleSpec)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "porter rule"
    rule = schema["$defs"]["RuleSpec"]
    rule["required"] = sorted({*rule["required"], "examples"})
    return schema
