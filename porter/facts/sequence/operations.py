"""What torch's functions and methods, and modules without a source here, do to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from porter.facts.sequence import shapes
from porter.facts.sequence.tables import Met, entries, perhaps
from porter.facts.sequence.values import (
    OTHER,
    Const,
    Length,
    Many,
    NotShardable,
    Other,
    Tokens,
    Value,
    Whole,
    counted,
    flattened,
    fresh,
    has_tokens,
    joined,
    opaque,
    whole,
)  # fmt: skip

_WORDS = """
to float type_as half bfloat16 double contiguous clone clip clamp clamp_ sigmoid tanh exp log sin cos abs neg square pow sqrt
rsqrt add mul div sub add_ mul_ nan_to_num detach bool int long type masked_fill where silu gelu relu hardswish mish softplus
erf addcmul logical_not zeros_like ones_like empty_like rand_like maximum minimum dropout eq ne lt gt le ge expand_as
"""
ELEMENTWISE = frozenset(_WORDS.split())
_FUNCTIONS = ("torch.", "torch.nn.functional.")
POINTWISE = frozenset(
    f"torch.nn.{n}" for n in ("Linear", "LayerNorm", "RMSNorm", "SiLU", "GELU", "ReLU", "Mish", "Sigmoid", "Tanh", "Dropout",
                              "Identity", "Softplus")
) | {"diffusers.models.activations.get_activation", "diffusers.models.normalization.FP32LayerNorm",
     "diffusers.models.normalization.RMSNorm", "diffusers.models.normalization.LpNorm",
     "diffusers.models.normalization.LayerNorm"}  # fmt: skip
"""Modules that act on the last axis alone."""
_LINEARS = ("vllm.model_executor.layers.linear.", "porter_template.PackedRowParallelLinear")
_NORMS = ("porter_template.TensorParallel", "vllm.model_executor.layers.layernorm.")
_REDUCTIONS = frozenset({"mean", "sum", "var", "std", "norm", "amax", "amin", "max", "min", "prod"})
_MADE_BY_SHAPE = frozenset({"ones", "zeros", "full", "empty", "new_ones", "new_zeros", "new_full", "new_empty"})

OF_ALL_TOKENS = frozenset({"torch.nn.functional.pad", "porter_template.valid_keys", "math.log"})
"""Functions of something that every rank has in full: a number of tokens they are given counts those of all ranks."""
MADE = frozenset({"torch.ones", "torch.zeros"})


def pointwise(cls: str) -> bool:
    return cls in POINTWISE or cls.startswith((*_LINEARS, *_NORMS))


def apply_pointwise(cls: str, value: Value) -> Value:
    """A module that acts on the last axis."""
    if isinstance(value, Tokens):
        if value.axis == value.rank - 1:
            raise NotShardable(f"{cls.rpartition('.')[2]} acts on the token axis")
        return value
    if isinstance(value, Whole):
        changes = cls.startswith(_LINEARS) or cls == "torch.nn.Linear"
        return whole("view", op="last", base=(value,)) if changes else value
    return value


def combine(values: Sequence[Value], met: Met) -> Value:
    """Elementwise: tokens with tokens, and with what every rank has in full, which may have one entry per token."""
    flat = [v for value in values for v in flattened(value)]
    tokens = [v for v in flat if isinstance(v, Tokens)]
    if not tokens:
        if any(isinstance(v, Length) for v in flat):
            raise NotShardable("the number of tokens is used in arithmetic")
        return joined(flat)
    rank = max(t.rank for t in tokens)
    first = next(t for t in tokens if t.rank == rank)
    for other in tokens:
        if other.parts != first.parts and len(other.parts) == len(first.parts) == 1:
            raise shapes.Parallel("tokens of different streams are combined", other.parts[0], first.parts[0])
        if other.parts != first.parts or other.axis - other.rank != first.axis - first.rank:
            raise NotShardable("tokens of different streams or axes are combined")
    for each in flat:
        if isinstance(each, Whole):
            found = entries(each, first.axis - rank, rank)
            for entry in found:
                if len(first.parts) > 1 and entry.rank is not None:
                    raise NotShardable(f"{entry.variable} counts tokens of several streams in one of its ranks")
                met.entries.add(replace(entry, parts=first.parts))
            if not found and len(first.parts) == 1:
                more = perhaps(each, first.axis - rank, rank)
                met.entries |= {replace(e, parts=first.parts) for e in more.entries}
                met.hidden |= more.hidden
    return first


def method(name: str, x: Tokens, args: Sequence[Value], kwargs: Mapping[str, Value], met: Met) -> Value:
    """A method of a tensor, or a function of torch whose first argument it is."""

    def arg(at: int, *names: str) -> Value | None:
        return next((kwargs[n] for n in names if n in kwargs), args[at] if len(args) > at else None)

    if name in ELEMENTWISE:
        return combine([x, *args, *(v for k, v in kwargs.items() if k in ("other", "weight"))], met)
    if name in ("softmax", "log_softmax", "cumsum", "layer_norm", "rms_norm", "normalize", "glu"):
        at = (
            shapes.position(arg(0, "dim") or Const(-1), x.rank)
            if name not in ("layer_norm", "rms_norm")
            else x.rank - 1
        )
        return shapes.reduced(x, [Const(at)], True)
    if name in _REDUCTIONS:
        dims = arg(0 if name != "norm" else 1, "dim")
        keep = arg(1 if name != "norm" else 2, "keepdim")
        return shapes.reduced(x, [dims] if dims is not None else [], keep == Const(True))
    if name in ("view", "reshape"):
        return shapes.reshape(x, args)
    if name == "unflatten":
        return shapes.unflatten(x, arg(0, "dim") or OTHER, arg(1, "sizes", "unflattened_size"))
    if name == "flatten":
        return shapes.flatten(x, arg(0, "start_dim"), arg(1, "end_dim"))
    if name == "unsqueeze":
        return shapes.unsqueeze(x, arg(0, "dim") or OTHER)
    if name == "squeeze":
        return shapes.squeeze(x, arg(0, "dim") or OTHER)
    if name in ("transpose", "swapaxes"):
        return shapes.transpose(x, arg(0, "dim0") or OTHER, arg(1, "dim1") or OTHER)
    if name == "permute":
        given = args[0].items if len(args) == 1 and isinstance(args[0], Many) else args
        return shapes.permute(x, given)
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return shapes.split(x, arg(0, "chunks", "split_size_or_sections", "split_sizes"), arg(1, "dim"))
    if name == "unbind":
        at = shapes.position(arg(0, "dim") or Const(0), x.rank)
        piece = shapes.squeeze(x, Const(at))
        return Many((piece, piece))  # as many as there are targets, see `unpacked`
    if name == "size":
        at_size = arg(0, "dim")
        return shapes.shape(x).items[shapes.position(at_size, x.rank)] if at_size is not None else shapes.shape(x)
    if name == "repeat_interleave":
        return shapes.reduced(x, [arg(1, "dim") or OTHER], True)
    if name == "repeat" or name == "expand":
        given = args[0].items if len(args) == 1 and isinstance(args[0], Many) else args
        if len(given) != x.rank or given[x.axis] not in (Const(-1), Const(1), Length(x.parts)):
            raise NotShardable(f"{name} along the token axis")
        return x
    if name == "view_as_complex":
        return shapes.squeeze(x, Const(-1))
    if name == "view_as_real":
        return shapes.unsqueeze(x, Const(-1))
    if name in ("dim", "numel", "is_floating_point", "ndimension"):
        return OTHER
    if name in ("new_ones", "new_zeros", "new_full", "new_empty"):
        return made(args)
    if name in ("matmul", "bmm"):
        other = arg(0, "other")
        if has_tokens(other or OTHER) or x.axis == x.rank - 1:
            raise NotShardable("tokens are multiplied with tokens outside the attention layer")
        return x
    raise NotShardable(f"{name} on tokens")


def made(args: Sequence[Value]) -> Value:
    """`torch.ones(...)` of a shape with the number of tokens in it."""
    sizes = args[0].items if args and isinstance(args[0], Many) else args
    lengths = [i for i, s in enumerate(sizes) if isinstance(s, Length)]
    if not lengths:
        return fresh([])
    if len(lengths) > 1:
        raise NotShardable("a tensor over pairs of tokens is made")
    length = sizes[lengths[0]]
    assert isinstance(length, Length)
    return Tokens(len(sizes), lengths[0], length.parts)


def function(name: str, args: Sequence[Value], kwargs: Mapping[str, Value], met: Met) -> Value:
    """A function by qualified name, where some argument holds tokens or their number."""
    short = name.rpartition(".")[2]
    if not name.startswith(_FUNCTIONS):
        raise NotShardable(f"{name} is given tokens")
    if short in ("cat", "concat", "stack"):
        items = args[0].items if isinstance(args[0], Many) else args[:1]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return shapes.stacked(items, dim) if short == "stack" else shapes.concatenated(items, dim)
    if short in _MADE_BY_SHAPE:
        return made(args)
    if short in ("arange", "linspace"):
        raise NotShardable("positions are counted from the number of tokens")
    if short == "where":
        return combine(args, met)
    if short == "pad":
        raise NotShardable("tokens are padded")
    if args and isinstance(args[0], Tokens):
        if short in ("linear",):
            return args[0]
        return method(short, args[0], args[1:], kwargs, met)
    if short in ELEMENTWISE:
        return combine(args, met)
    raise NotShardable(f"{name} is given tokens")


def _axis_of(x: Value, size: Value) -> int | None:
    """The axis of `x` whose length a number is."""
    found = counted(size)
    return found[1] if found is not None and found[0] is x else None


def _grown(name: str, args: Sequence[Value]) -> Value:
    """`x.expand(-1, n, -1)`: what is the same for all tokens, once per token. Another length than 1 fails at run time."""
    lengths = [i for i, v in enumerate(args) if isinstance(v, Length)]
    if name not in ("expand", "repeat") or len(lengths) != 1:
        raise NotShardable("a tensor that every rank has in full is cut or grown to this rank's number of tokens")
    length = args[lengths[0]]
    assert isinstance(length, Length)
    return Tokens(len(args), lengths[0], length.parts)


def whole_method(name: str, x: Value, args: Sequence[Value], kwargs: Mapping[str, Value]) -> Value:
    """A method of a tensor that every rank has in full: shape operations are remembered."""
    values = [*args, *kwargs.values()]
    if name in ("view", "reshape") and len(args) > 3 and [_axis_of(x, a) for a in args[:2]] == [0, 1]:
        return whole("view", op="unflatten", args=(2, len(args) - 2), base=(x,))
    if name in ("view", "reshape") and sum(isinstance(v, Length) for v in args) == 1:
        entries_ = tuple("new" if v == Const(1) else "all" for v in args)
        return whole("view", op="index", args=entries_, base=(x,))
    if any(isinstance(v, Length) for value in values for v in flattened(value)):
        return _grown(name, args)
    dim = next((kwargs[n] for n in ("dim", "start_dim") if n in kwargs), None)

    def view(op: str, *given: object) -> Whole:
        return whole("view", op=op, args=given, base=(x,))

    if name in ELEMENTWISE or name in ("cpu", "cuda", "softmax"):
        return joined([x, *(v for value in values for v in flattened(value))])
    first = shapes.number(args[0]) if args else shapes.number(dim)
    if name == "size" and first is not None and isinstance(x, Whole):
        return whole("item", args=(first,), base=(whole("view", op="shape", base=(x,)),))
    if name in ("unsqueeze", "squeeze") and first is not None:
        return view(name, first)
    if name in ("chunk", "split", "tensor_split", "split_with_sizes"):
        at = shapes.number(dim if dim is not None else args[1] if len(args) > 1 else Const(0))
        if at is not None:
            piece = view("split", at)
            count = len(args[0].items) if args and isinstance(args[0], Many) else first
            return Many((piece,) * count) if count and count > 0 else piece
    if name == "expand":
        return view("expand", *(shapes.number(a) for a in args))
    if name == "permute" and all(shapes.number(a) is not None for a in args):
        return view("permute", *(shapes.number(a) for a in args))
    if name == "transpose" and len(args) == 2:
        return view("transpose", shapes.number(args[0]), shapes.number(args[1]))
    if name == "unflatten" and len(args) == 2 and isinstance(args[1], Many):
        return view("unflatten", first, len(args[1].items))
    if name in ("view_as_real", "embedding"):  # looked up, every index is a vector
        return view("grow")
    if name == "view_as_complex":
        return view("shrink")
    if name == "repeat_interleave":
        at = shapes.number(dim if dim is not None else args[1] if len(args) > 1 else None)
        return x if at == -1 and isinstance(x, Whole) else opaque([x])
    return opaque([x, *values]) if not isinstance(x, Other) else joined(values)
