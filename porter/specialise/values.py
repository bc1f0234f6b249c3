"""Abstract values: what is known about an expression without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from porter.specialise.program import Spec


class Const(Struct, frozen=True):
    """A literal: None, a bool, a number or a string."""

    value: object


class Empty(Struct, frozen=True):
    """An empty dict or list literal."""


class Given(Struct, frozen=True):
    """Some value that is not None."""


class Top(Struct, frozen=True):
    """Anything, None included."""


class Ref(Struct, frozen=True):
    """A global: class, function or constant, by qualified name."""

    name: str


class Opaque(Struct, frozen=True):
    """An instance of a class that is not looked into (torch, or a Diffusers block that is imported)."""

    cls: str


class Instance(Struct, frozen=True):
    """An instance of a class being specialised."""

    spec: Spec

    def __hash__(self) -> int:
        return id(self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instance) and other.spec is self.spec


class Bound(Struct, frozen=True):
    """A method of an instance."""

    owner: Value
    name: str


class Items(Struct, frozen=True):
    """A sequence whose elements are known one by one (tuple, list, ModuleList)."""

    items: tuple[Value, ...]


class ListOf(Struct, frozen=True):
    """A sequence of unknown length."""

    item: Value


class OneOf(Struct, frozen=True):
    """One of several modules, or none, depending on the configuration."""

    options: tuple[Instance | Opaque, ...]
    nullable: bool = False


Value = OneOf | Const | Empty | Given | Top | Ref | Opaque | Instance | Bound | Items | ListOf

NONE = Const(None)
TOP = Top()
GIVEN = Given()


def join(left: Value, right: Value) -> Value:
    """What is known of a value that is one or the other."""
    if left == right:
        return left
    if isinstance(left, Top) or isinstance(right, Top):
        return TOP
    modules = (*options(left), *options(right))
    if modules and all(options(v) or v == NONE for v in (left, right)):
        nullable = any(v == NONE or (isinstance(v, OneOf) and v.nullable) for v in (left, right))
        return OneOf(tuple(dict.fromkeys(modules)), nullable)
    if any(v == NONE or (isinstance(v, OneOf) and v.nullable) for v in (left, right)):
        return TOP
    if isinstance(left, Empty) and isinstance(right, (Items, ListOf)):
        return ListOf(element(right))
    if isinstance(right, Empty) and isinstance(left, (Items, ListOf)):
        return ListOf(element(left))
    if isinstance(left, Items) and isinstance(right, Items):
        if len(left.items) == len(right.items):
            return Items(tuple(join(a, b) for a, b in zip(left.items, right.items, strict=True)))
    if isinstance(left, (Items, ListOf)) and isinstance(right, (Items, ListOf)):
        both = [*_items(left), *_items(right)]
        item = both[0] if both else GIVEN
        for each in both[1:]:
            item = join(item, each)
        return ListOf(item)
    return GIVEN


def options(value: Value) -> tuple[Instance | Opaque, ...]:
    """The modules a value may be."""
    if isinstance(value, OneOf):
        return value.options
    return (value,) if isinstance(value, (Instance, Opaque)) else ()


def _items(value: Items | ListOf) -> tuple[Value, ...]:
    return value.items if isinstance(value, Items) else (value.item,)


def element(value: Value) -> Value:
    """What iterating `value` yields."""
    if isinstance(value, Items):
        if not value.items:
            return TOP
        found = value.items[0]
        for each in value.items[1:]:
            found = join(found, each)
        return found
    if isinstance(value, ListOf):
        return value.item
    return TOP  # what is given may be a list, and a list may hold None


def truth(value: Value) -> bool | None:
    """Truth of a value, None if not known. A tensor or number that is merely given may be either."""
    if isinstance(value, Const):
        return bool(value.value)
    if isinstance(value, Empty):
        return False
    if isinstance(value, Items):
        return bool(value.items)
    if isinstance(value, OneOf):
        return None if value.nullable else True
    if isinstance(value, (Instance, Opaque, Ref, Bound)):
        return True
    return None


def is_none(value: Value) -> bool | None:
    """Whether a value is None, if known."""
    if isinstance(value, Const):
        return value.value is None
    if isinstance(value, OneOf) and value.nullable:
        return None
    return None if isinstance(value, Top) else False
