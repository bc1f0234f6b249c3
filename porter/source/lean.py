"""LibCST's node classes without the checks that porter has no use for: a twentieth of a conversion's time.

LibCST validates every node that is built, which helps whoever edits by hand; porter parses each file that it prints,
so a wrong tree is found there (PORT601). Its classes are ABCMeta's, with which nobody registers; asking one of them with
`isinstance` runs Python code. The parser, the printer and the nodes themselves stay LibCST's.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator
from typing import Any

import libcst as cst


class _Node(ABCMeta):
    """A class that nobody registers with."""

    __instancecheck__ = type.__instancecheck__  # type: ignore[assignment]
    __subclasscheck__ = type.__subclasscheck__  # type: ignore[assignment]


_FIELDS: dict[Any, tuple[str, ...]] = {}


def fields(kind: Any) -> tuple[str, ...]:
    """Names of all fields of a node class."""
    found = _FIELDS.get(kind)
    if found is None:
        found = _FIELDS[kind] = tuple(n for n in kind.__dataclass_fields__ if not n.startswith("__"))
    return found


def _with_changes(self: Any, **changes: object) -> Any:  # noqa: ANN401 - a node of the same class
    names = fields(type(self))
    if not changes.keys() <= self.__dataclass_fields__.keys():
        raise TypeError(f"{type(self).__name__} has no {', '.join(changes.keys() - set(names))}")
    new = object.__new__(type(self))
    for name in names:
        object.__setattr__(new, name, changes[name] if name in changes else getattr(self, name))
    return new


def _below(kind: type) -> Iterator[type]:
    yield kind
    each: type
    for each in type.__subclasses__(kind):
        yield from _below(each)


def install() -> None:
    """Change LibCST's classes, in this process."""
    kinds: list[Any] = list(_below(cst.CSTNode))
    for kind in kinds:  # a class of two bases comes twice
        kind.__class__ = _Node
    cst.CSTNode.__post_init__ = lambda self: None
    cst.CSTNode.with_changes = _with_changes
