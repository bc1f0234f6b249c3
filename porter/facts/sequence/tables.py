"""Where a tensor that every rank has in full meets tokens: is it the same for all of them, or one entry per token?"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from msgspec import Struct

from porter.facts.sequence.values import NotShardable, Value, Whole, origins, per_token

PER_TOKEN = re.compile(r"rotary|rope|freqs|(^|_)(cos|sin|ids)($|_)|pos(ition)?_?emb|mask|indices|index", re.IGNORECASE)
"""Words of variables and modules that hold one entry per token."""


class Entry(Struct, frozen=True):
    """A variable (or element `path` of one) with one entry per token, along `axis` counted from the last one.

    `rank` is set where the tensor counts tokens only in one of several ranks; `parts` are the streams whose tokens it counts.
    One that is not `certain` has one entry per token or one for all.
    """

    variable: str
    path: tuple[int, ...]
    axis: int
    rank: int | None
    parts: tuple[str, ...] = ()
    certain: bool = True


@dataclass
class Met:
    """What tokens were combined with: entries per token, and variables that passed a function that is not followed."""

    entries: set[Entry] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)


def entries(value: Value, axis: int, rank: int) -> set[Entry]:
    """Entries of a tensor that is combined with tokens; `axis` < 0 is where the tokens are, `rank` of the tokens.

    Empty: the same for all tokens, or unknown. What is taken for the same and is not fails at run time, because its
    length and the number of tokens of a rank differ; the other way round it would be wrong in silence. A table may have
    one axis less than the tokens (`[S, 1, D]`), which matters where its axes are counted from the left.
    """
    found = _entries(value, axis, rank)
    if found or rank - 1 < -axis:
        return found
    return {e for e in _entries(value, axis, rank - 1) if e.rank is None}


def _entries(value: Value, axis: int, rank: int) -> set[Entry]:
    found: set[Entry] = set()
    pending: list[tuple[Value, int, int, tuple[int, ...], int | None]] = [(value, axis, rank, (), None)]
    seen: set[tuple[Value, int, int, tuple[int, ...], int | None]] = set()
    while pending:
        state = pending.pop()
        if state not in seen:
            seen.add(state)
            found |= _step(*state, pending)
    return found


def perhaps(value: Value, axis: int, rank: int) -> Met:
    """Variables whose axis may be as long as the tokens, or 1: tensors of `rank` axes of which nothing tells.

    Only these lengths can be combined with tokens, so the length tells when the model runs.
    """
    found = Met()
    pending: list[tuple[Value, int, int, tuple[int, ...], int | None]] = [(value, axis, rank, (), None)]
    seen: set[tuple[Value, int, int, tuple[int, ...], int | None]] = set()
    while pending:
        state = pending.pop()
        at, axis, rank, path, _ = state
        if state in seen:
            continue
        seen.add(state)
        if isinstance(at, Whole) and at.kind == "boundary":
            if not path and rank >= -axis and at.base and _open(at.base[0], axis, rank):
                found.entries.add(Entry(at.name, (), axis, rank, certain=False))
        elif isinstance(at, Whole) and at.kind == "opaque":
            found.hidden |= origins(at)
        else:
            _step(*state, pending)
    return found


def _open(value: Value, axis: int, rank: int) -> bool:
    """Whether nothing tells how long an axis is."""
    pending: list[tuple[Value, int, int, tuple[int, ...], int | None]] = [(value, axis, rank, (), None)]
    seen: set[tuple[Value, int, int, tuple[int, ...], int | None]] = set()
    while pending:
        state = pending.pop()
        if isinstance(state[0], Whole) and state[0].kind in ("source", "opaque"):
            return True
        if state not in seen:
            seen.add(state)
            _step(*state, pending)
    return False


def variables(value: Value, axis: int, rank: int) -> set[str]:
    """Variables at the start of the region whose entries along `axis` < 0 are the tokens of a tensor of `rank` axes."""
    found: set[str] = set()
    pending: list[tuple[Value, int, int, tuple[int, ...], int | None]] = [(value, axis, rank, (), None)]
    while pending:
        state = pending.pop()
        at = state[0]
        if isinstance(at, Whole) and at.kind == "boundary" and not state[3]:
            found.add(at.name)
        elif not isinstance(at, Whole) or at.kind != "opaque":
            _step(*state, pending)
    return found


def _step(
    value: Value, axis: int, rank: int, path: tuple[int, ...], tested: int | None,
    pending: list[tuple[Value, int, int, tuple[int, ...], int | None]],
) -> set[Entry]:  # fmt: skip
    """One step back from where the tensor is used; what is before it goes to `pending`."""
    if not isinstance(value, Whole) or value.kind == "fixed":
        return set()
    tested = value.rank or tested
    if value.kind == "join":
        pending += [(b, axis, rank, path, tested) for b in value.base]
        return set()
    inner = value.base[0] if value.base else None
    if value.kind == "item" and isinstance(inner, Whole) and inner.op in ("permute", "unflatten"):
        pending.append((inner, axis, rank + 1, path, tested))  # a tensor's first axis, not a tuple's element
        return set()
    if value.kind == "item" and not isinstance(value.args[0], int):
        raise NotShardable("a table of a dictionary counts tokens")
    if value.kind == "item":
        pending.append((value.base[0], axis, rank, (int(value.args[0]), *path), tested))  # type: ignore[call-overload]
        return set()
    if value.kind == "view" and value.op == "expand" and -axis <= len(value.args):
        if value.args[axis] is None:  # grown to a length that is computed: once per token
            return {Entry(value.name, path, axis, tested)}
        pending.append((value.base[0], axis, rank, path, tested))
        return set()
    if value.kind == "view":
        back = _back(value, axis, rank)
        if back is not None:
            pending.append((value.base[0], *back, path, tested))
        return set()
    if value.kind == "boundary":
        return _at_boundary(value, axis, rank, path, tested)
    return {Entry(value.name, path, axis, tested)} if PER_TOKEN.search(value.name) else set()


def _at_boundary(value: Whole, axis: int, rank: int, path: tuple[int, ...], tested: int | None) -> set[Entry]:
    """A variable at the start of the region: what was done before may show that it is the same for all tokens."""
    entry = Entry(value.name, path, axis, tested)
    if tested is not None or PER_TOKEN.search(value.name) or value.name in per_token:
        return {entry}
    return {entry} if value.base and entries(value.base[0], axis, rank) else set()


def _back(view: Whole, axis: int, rank: int) -> tuple[int, int] | None:
    """(axis, rank) before a shape operation, or None where the axis was made by it or counts something else."""
    left = axis + rank
    if view.op == "unsqueeze":
        at = _position(view.args[0], rank)
        if at == left:
            return None
        return (axis + 1 if at > left else axis), rank - 1
    if view.op == "squeeze":
        at = _position(view.args[0], rank + 1)
        return (axis - 1 if at > left else axis), rank + 1
    if view.op == "split":
        return None if _position(view.args[0], rank) == left else (axis, rank)
    if view.op == "shape":
        return None
    if view.op == "last":
        return None if axis == -1 else (axis, rank)
    if view.op == "grow":  # a new last axis
        return (axis + 1, rank - 1) if axis != -1 else None
    if view.op == "shrink":  # the last axis went
        return axis - 1, rank + 1
    if view.op == "transpose":
        first, second = (_position(a, rank) for a in view.args)
        moved = second if left == first else first if left == second else left
        return moved - rank, rank
    if view.op == "permute":
        order = [_position(a, rank) for a in view.args]
        return order[left] - rank, rank
    if view.op == "index":
        return _unindexed(view.args, axis, rank)
    if view.op == "unflatten":
        at, count = _position(view.args[0], rank), int(view.args[1])  # type: ignore[call-overload]
        if isinstance(view.args[0], int) and view.args[0] < 0:
            at = rank + view.args[0] - count + 1
        if at <= left < at + count:
            return None
        return (axis + count - 1 if left < at else axis), rank - count + 1
    raise NotShardable(f"a tensor combined with tokens passes {view.op}")


def _position(at: object, rank: int) -> int:
    if not isinstance(at, int):
        raise NotShardable("an axis is not a number")
    return at + rank if at < 0 else at


def _unindexed(entries_: tuple[object, ...], axis: int, rank: int) -> tuple[int, int] | None:
    """Back through `x[a, b, ...]`; an entry is "new", "all", "one", "part" or "...". Counted from the right side."""
    before: list[str] = [str(e) for e in entries_]
    made = sum(e != "one" for e in before if e != "...")
    if "..." in before:
        at = before.index("...")
        before[at : at + 1] = ["all"] * (rank - made)
    elif before[-1] != "all":  # whoever writes the last colon writes all of them
        before += ["all"] * (rank - made)
    out = -1
    position = -1
    for entry in reversed(before):
        if entry == "one":
            position -= 1
            continue
        if out == axis:
            if entry in ("new", "part"):
                return None
            return position, sum(e != "new" for e in before)
        out -= 1
        if entry != "new":
            position -= 1
    return None
