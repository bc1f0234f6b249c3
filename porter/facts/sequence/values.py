"""Abstract values of the sequence analysis.

`Tokens` is a tensor that a rank holds a part of, `Length` the number of its tokens on this rank, `Whole` a tensor that
every rank has in full. A `Whole` remembers how it was made, because only where it meets `Tokens` it shows whether it has
one entry per token itself (a rotary table) or is the same for all (a modulation).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from porter.source.names import DOT


class NotShardable(Exception):
    """The sequence can't be divided, and why; `where` is the statement, once it is known."""

    where: str = ""

    def __str__(self) -> str:
        said = f"{super().__str__()} (`{self.where}`)" if self.where else super().__str__()
        return said.replace(DOT, ".")


class Tokens(Struct, frozen=True):
    """A tensor of `rank` axes, of which `axis` counts tokens of the streams `parts`, one after the other."""

    rank: int
    axis: int
    parts: tuple[str, ...]


class Length(Struct, frozen=True):
    """A number of tokens on this rank."""

    parts: tuple[str, ...]
    negative: bool = False


class Const(Struct, frozen=True):
    """A Python constant that is known."""

    value: object


class Many(Struct, frozen=True):
    """A tuple or list whose elements are known."""

    items: tuple[Value, ...]


class Instance(Struct, frozen=True):
    """A module: the classes it may be an instance of, by qualified name or name in the unit. `origin` is the attribute of the
    root that holds it, directly or through other modules."""

    classes: tuple[str, ...]
    origin: str = ""


class Modules(Struct, frozen=True):
    """A list of modules. `chain` holds the elements of a list whose elements differ, in order."""

    element: Instance
    chain: tuple[Instance, ...] = ()


class Partial(Struct, frozen=True):
    """A function, bound method or class that is known by name; `owner` is the class a method belongs to."""

    name: str
    owner: str | None = None


class Named(Struct, frozen=True):
    """A dictionary whose keys are known."""

    items: tuple[tuple[str, Value], ...]

    def get(self, key: object) -> Value:
        return dict(self.items).get(str(key), NONE)


class Functions(Struct, frozen=True):
    """Functions that a table of functions may give: qualified name and keywords already bound."""

    options: tuple[tuple[str, tuple[tuple[str, Value], ...]], ...]


class Either(Struct, frozen=True):
    """What a flag chooses from. Whoever unpacks it expects one of the tuples; elementwise every option must do."""

    options: tuple[Value, ...]

    def alone(self) -> Value:
        """The option that is no tuple, if there is one only: what a plain variable is given."""
        single = [o for o in self.options if not isinstance(o, Many)]
        return single[0] if len(single) == 1 else self


class Conflict(Struct, frozen=True):
    """Tokens on one path, something else on another: an error only where it is used."""

    reason: str


class Other(Struct, frozen=True):
    """Anything that holds no tensor of interest: numbers, parameters, configuration."""


Kind = Literal["source", "view", "join", "opaque", "item", "fixed", "boundary"]


class Whole(Struct, frozen=True, eq=False):
    """A tensor every rank has in full. Built by `whole`: equal ones are one object, so that shared parts cost nothing.

    source: a variable (`name`); boundary: what `base` is called where the region starts; view: a shape operation `op` with
    `args` on `base`; item: element `args[0]` of the tuple `base`; join: elementwise of several; opaque: unknown function;
    fixed: a parameter, the same for all tokens. `rank` is set where a test of `ndim` told it.
    """

    kind: Kind
    name: str = ""
    op: str = ""
    args: tuple[object, ...] = ()
    base: tuple[Value, ...] = ()
    rank: int | None = None


Value = (
    Tokens
    | Length
    | Const
    | Many
    | Named
    | Functions
    | Either
    | Instance
    | Modules
    | Partial
    | Conflict
    | Other
    | Whole
)

_known: dict[tuple[object, ...], Whole] = {}
per_token: set[str] = set()
"""Variables at the start of the region that are handed to a parameter whose name says that they have one entry per token."""


def forget() -> None:
    """Start anew: the values of one analysis are not needed by the next."""
    _known.clear()
    per_token.clear()


def whole(
    kind: Kind, name: str = "", op: str = "", args: tuple[object, ...] = (), base: tuple[Value, ...] = (),
    rank: int | None = None,
) -> Whole:  # fmt: skip
    """The one `Whole` of these fields."""
    key = (kind, name, op, args, base, rank)
    found = _known.get(key)
    if found is None:
        found = _known[key] = Whole(*key)  # type: ignore[arg-type]
    return found


ALL_TOKENS = "all tokens"
"""Name of an opaque value that counts the tokens of all ranks."""
OTHER = Other()
NONE = Const(None)
FIXED = Whole("fixed")


def joined(values: list[Value]) -> Value:
    """Elementwise result of values without tokens."""
    flat = [
        b for v in values if isinstance(v, Whole) for b in (v.base if v.kind == "join" and v.rank is None else (v,))
    ]
    found = tuple(dict.fromkeys(flat))
    if not found:
        return OTHER
    return found[0] if len(found) == 1 else whole("join", base=found)  # type: ignore[return-value]


def opaque(values: list[Value], name: str = "") -> Value:
    """Result of an unknown function of values without tokens."""
    flat = [v for value in values for v in flattened(value)]
    return whole("opaque", name=name, base=tuple(dict.fromkeys(v for v in flat if isinstance(v, Whole))))


def counted(value: Value) -> tuple[Whole, int] | None:
    """(tensor, axis) of a number that is the length of an axis of a tensor every rank has in full."""
    if isinstance(value, Whole) and value.kind == "item" and isinstance(value.base[0], Whole):
        shape, axis = value.base[0], value.args[0]
        if shape.op == "shape" and isinstance(shape.base[0], Whole) and isinstance(axis, int):
            return shape.base[0], axis
    return None


def same_length(left: Value, right: Value) -> bool:
    """Whether two tensors have as many tokens because one is made of the other token by token."""
    return _origin(left) is _origin(right)


def _origin(value: Value) -> Value:
    while isinstance(value, Whole) and (value.op == "last" or value.kind == "boundary") and value.base:
        value = value.base[0]
    return value


def of_all_tokens(values: list[Value]) -> Value:
    """A tensor that every rank has in full, whose shape is made of numbers of tokens: those of all ranks."""
    flat = [v for value in values for v in flattened(value)]
    base = tuple(dict.fromkeys(v for v in flat if isinstance(v, Whole)))
    return whole("opaque", name=ALL_TOKENS, base=base)


def origins(value: Value) -> set[str]:
    """Variables at the start of the region that a value is made of."""
    found: set[str] = set()
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if isinstance(each, Whole) and id(each) not in seen:
            seen.add(id(each))
            if each.kind == "boundary":
                found.add(each.name)
            else:
                pending += each.base
    return found


def fresh(values: list[Value]) -> Value:
    """A tensor of its own, different from any other."""
    base = tuple(dict.fromkeys(v for value in values for v in flattened(value) if isinstance(v, Whole)))
    return whole("opaque", args=(len(_known),), base=base)


def flattened(value: Value) -> list[Value]:
    if isinstance(value, Many):
        return [v for item in value.items for v in flattened(item)]
    if isinstance(value, Either):
        return [v for option in value.options for v in flattened(option)]
    if isinstance(value, Named):
        return [v for _, item in value.items for v in flattened(item)]
    return [value]


def has_tokens(*values: Value) -> bool:
    return any(isinstance(v, (Tokens, Length)) for value in values for v in flattened(value))


def merged(left: Value | None, right: Value | None) -> Value:
    """A variable after two paths came together."""
    if left is None or right is None:
        return left if right is None else right  # type: ignore[return-value]
    if left == right:
        return left
    if NONE in (left, right):
        return right if left == NONE else left
    if isinstance(left, Many) and isinstance(right, Many) and len(left.items) == len(right.items):
        return Many(tuple(merged(a, b) for a, b in zip(left.items, right.items, strict=True)))
    options = tuple(o for v in (left, right) for o in (v.options if isinstance(v, Either) else (v,)))
    tensors = all(isinstance(o, (Many, Tokens, Whole)) for o in options)
    if tensors and (any(isinstance(o, Many) for o in options) or any(isinstance(o, Tokens) for o in options)):
        return Either(tuple(dict.fromkeys(options)))
    if isinstance(left, Instance) and isinstance(right, Instance):
        return Instance(tuple(dict.fromkeys((*left.classes, *right.classes))), left.origin or right.origin)
    if has_tokens(left) or has_tokens(right):
        return Conflict("it is divided on one path and not on the other")
    if isinstance(left, Conflict) or isinstance(right, Conflict):
        return left if isinstance(left, Conflict) else right
    kinds = (Whole, Many)
    if isinstance(left, kinds) or isinstance(right, kinds):
        return joined([*flattened(left), *flattened(right)])
    return OTHER


def with_rank(value: Value, rank: int) -> Value:
    if not isinstance(value, Whole) or value.kind == "fixed":
        return value
    return whole(value.kind, value.name, value.op, value.args, value.base, rank)
