"""Shape operations on tokens: where the token axis is afterwards, or why it can't be followed."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from porter.facts.sequence.values import OTHER, Const, Length, Many, NotShardable, Tokens, Value


class Parallel(NotShardable):
    """Two streams are combined token by token: they have the same tokens."""

    def __init__(self, reason: str, first: str, second: str) -> None:
        super().__init__(reason)
        self.first, self.second = first, second


class Paired(NotShardable):
    """Every token is set beside every other one: what is so much larger than the tokens is made of all of them (a mask)."""


class Joined(NotShardable):
    """Tokens stand side by side with other tensors, along `axis` < 0: these may be a stream as well."""

    def __init__(self, reason: str, values: Sequence[Value], axis: int) -> None:
        super().__init__(reason)
        self.values, self.axis = values, axis


def number(value: Value | None) -> int | None:
    """The integer a value is known to be."""
    return value.value if isinstance(value, Const) and isinstance(value.value, int) else None


def position(value: Value | None, rank: int) -> int:
    """An axis from the left. Raises NotShardable if it is not known."""
    at = number(value)
    if at is None:
        raise NotShardable("an operation on tokens has an axis that is not a number")
    return at + rank if at < 0 else at


def shape(x: Tokens) -> Many:
    return Many(tuple(Length(x.parts) if i == x.axis else OTHER for i in range(x.rank)))


def unsqueeze(x: Tokens, dim: Value) -> Tokens:
    at = position(dim, x.rank + 1)
    return replace(x, rank=x.rank + 1, axis=x.axis + (at <= x.axis))


def squeeze(x: Tokens, dim: Value) -> Tokens:
    at = position(dim, x.rank)
    if at == x.axis:  # more than one token: nothing happens
        return x
    return replace(x, rank=x.rank - 1, axis=x.axis - (at < x.axis))


def transpose(x: Tokens, first: Value, second: Value) -> Tokens:
    a, b = position(first, x.rank), position(second, x.rank)
    return replace(x, axis=b if x.axis == a else a if x.axis == b else x.axis)


def permute(x: Tokens, order: Sequence[Value]) -> Tokens:
    dims = [position(d, x.rank) for d in order]
    if len(dims) != x.rank:
        raise NotShardable("permute of tokens with another number of axes")
    return replace(x, axis=dims.index(x.axis))


def flatten(x: Tokens, start: Value | None, end: Value | None) -> Tokens:
    first = position(start, x.rank) if start is not None else 0
    last = position(end, x.rank) if end is not None else x.rank - 1
    if first <= x.axis <= last and first != last:
        raise NotShardable("the token axis is flattened together with another one")
    return replace(x, rank=x.rank - (last - first), axis=x.axis - (last - first if last < x.axis else 0))


def unflatten(x: Tokens, dim: Value, sizes: Value | None) -> Tokens:
    at = position(dim, x.rank)
    if not isinstance(sizes, Many):
        raise NotShardable("unflatten with sizes that are not written out")
    if at == x.axis:
        raise NotShardable("the token axis is unfolded into rows, columns or frames")
    more = len(sizes.items) - 1
    return replace(x, rank=x.rank + more, axis=x.axis + (more if at < x.axis else 0))


def reshape(x: Tokens, sizes: Sequence[Value]) -> Tokens:
    """`view` or `reshape`: the token axis must stay where it is, as its length or as the only -1."""
    if len(sizes) == 1 and isinstance(sizes[0], Many):
        sizes = sizes[0].items
    lengths = [i for i, s in enumerate(sizes) if isinstance(s, Length)]
    if len(lengths) == 1 and sizes[lengths[0]] == Length(x.parts):
        at = lengths[0]
    elif not lengths:
        at = next((i for i, s in enumerate(sizes) if number(s) == -1), -1)
    else:
        at = -1
    if at != x.axis or any(number(s) == -1 for s in sizes[: x.axis]):
        raise NotShardable("tokens are reshaped such that their axis can't be followed")
    return replace(x, rank=len(sizes))


def reduced(x: Tokens, dims: Sequence[Value], keep: bool) -> Tokens:
    """Reduction (mean, norm, ...) over axes other than the tokens'."""
    if not dims:
        raise NotShardable("a reduction over all tokens")
    flat = [d for dim in dims for d in (dim.items if isinstance(dim, Many) else (dim,))]
    at = sorted(position(d, x.rank) for d in flat)
    for each in at:
        _elsewhere(x, each, "a reduction")
    if keep:
        return x
    return replace(x, rank=x.rank - len(at), axis=x.axis - sum(a < x.axis for a in at))


def concatenated(values: Sequence[Value], dim: Value | None) -> Tokens:
    """`torch.cat`: along the token axis the streams stand side by side, along another one they must be the same."""
    tokens = [v for v in values if isinstance(v, Tokens)]
    if not tokens:
        raise NotShardable("a list of tokens and their numbers is concatenated")
    at = position(dim if dim is not None else Const(0), tokens[0].rank)
    if any((t.rank, t.axis) != (tokens[0].rank, tokens[0].axis) for t in tokens):
        raise NotShardable("tensors with different token axes are concatenated")
    if len(tokens) != len(values):
        raise Joined("tokens are concatenated with a tensor that every rank has in full", values, at - tokens[0].rank)
    if at == tokens[0].axis:
        return replace(tokens[0], parts=tuple(p for t in tokens for p in t.parts))
    if len({t.parts for t in tokens}) > 1:
        raise NotShardable("tokens of different streams are concatenated along another axis")
    return tokens[0]


def stacked(values: Sequence[Value], dim: Value | None) -> Tokens:
    tokens = [v for v in values if isinstance(v, Tokens)]
    if not tokens or len(tokens) != len(values) or len(set(tokens)) > 1:
        raise NotShardable("tokens are stacked with something else")
    return unsqueeze(tokens[0], dim if dim is not None else Const(0))


def split(x: Tokens, sizes: Value | None, dim: Value | None) -> Value:
    """`split`, `chunk`, `unbind`-like: pieces; along the token axis the sizes must be lengths of its streams."""
    at = position(dim if dim is not None else Const(0), x.rank)
    if at != x.axis:
        count = len(sizes.items) if isinstance(sizes, Many) else number(sizes)
        return Many((x,) * count) if count is not None and count > 0 else x
    if not isinstance(sizes, Many) or not all(isinstance(s, Length) for s in sizes.items):
        raise NotShardable("the token axis is split at places that are not lengths of its streams")
    if tuple(p for s in sizes.items if isinstance(s, Length) for p in s.parts) != x.parts:
        raise NotShardable("the token axis is split into other streams than it is made of")
    return Many(tuple(replace(x, parts=s.parts) for s in sizes.items if isinstance(s, Length)))


def taken(x: Tokens, start: Value | None, stop: Value | None) -> Tokens:
    """`x[start:stop]` along the token axis: whole streams only."""
    parts = x.parts
    low, high = 0, len(parts)
    if start is not None and number(start) != 0:
        low = _boundary(parts, start)
    if stop is not None and stop != Const(None):
        high = _boundary(parts, stop)
    if low >= high:
        raise NotShardable("no stream is left after the token axis was sliced")
    return replace(x, parts=parts[low:high])


def _boundary(parts: tuple[str, ...], at: Value) -> int:
    if isinstance(at, Length):
        count = len(at.parts)
        if at.negative and parts[len(parts) - count :] == at.parts:
            return len(parts) - count
        if not at.negative and parts[:count] == at.parts:
            return count
    raise NotShardable("the token axis is sliced at a position that is not the length of a stream")


def lengths(left: Value, right: Value, sign: int) -> Value:
    """Sum or difference of lengths."""
    if isinstance(left, Length) and isinstance(right, Length) and not (left.negative or right.negative):
        if sign > 0:
            return Length((*left.parts, *right.parts))
        count = len(right.parts)
        if left.parts[:count] == right.parts and len(left.parts) > count:
            return Length(left.parts[count:])
        if left.parts[-count:] == right.parts and len(left.parts) > count:
            return Length(left.parts[:-count])
    raise NotShardable("the number of tokens is used in arithmetic")


def _elsewhere(x: Tokens, at: int, what: str) -> None:
    if at == x.axis:
        raise NotShardable(f"{what} over the token axis")
