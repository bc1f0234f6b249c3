"""Class names in a port."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import takewhile

from porter.specialise.liveness import holds_module
from porter.specialise.model import Model
from porter.specialise.program import Spec
from porter.specialise.values import NONE, Const

_SUFFIX = re.compile(r"(Transformer\dDModel|Transformer\dD|DiTModel|Transformer|Model)$")


def stem(class_name: str) -> str:
    """`FooTransformer2DModel` -> `Foo`."""
    return _SUFFIX.sub("", class_name) or class_name


def snake(name: str) -> str:
    """`FooBar3D` -> `foo_bar3d`."""
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name).lower()


def class_names(model: Model) -> dict[int, str]:
    """A name for each spec: Diffusers' own for classes of the model's file, with the model's stem for shared ones.

    Several specs of one class are told apart by their role in attention, else by the attribute that holds them.
    """
    home = model.root.qualified.rpartition(".")[0]
    prefix = stem(model.root.qualified.rpartition(".")[2])
    groups: dict[str, list[Spec]] = defaultdict(list)
    for spec in model.used:
        short = spec.qualified.rpartition(".")[2]
        local = spec.qualified.startswith(home + ".") or short.startswith(prefix)
        groups[short if local else prefix + short].append(spec)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for base, specs in groups.items():
        variants = [base if len(specs) == 1 else _variant(base, spec, specs) for spec in specs]
        for spec, variant in zip(specs, variants, strict=True):
            rivals = {s.processor for s, v in zip(specs, variants, strict=True) if v == variant}
            name = variant if len(rivals) == 1 else _with_strategy(variant, spec)
            number = 2
            unique = name
            while unique in taken:
                unique = f"{name}{number}"
                number += 1
            taken.add(unique)
            names[id(spec)] = unique
            spec.name = unique
    return names


def _variant(base: str, spec: Spec, specs: list[Spec]) -> str:
    role = attention_role(spec)
    if role is not None and base.endswith("Attention"):
        return f"{base[: -len('Attention')]}{role.capitalize()}Attention"
    for label, value in spec.init.items():
        texts = {v.value for s in specs if isinstance(v := s.init.get(label), Const)}
        if isinstance(value, Const) and isinstance(value.value, str) and len(texts) > 1 and value.value != "none":
            return base + "".join(part.capitalize() for part in re.split(r"\W|_", value.value))
    return base


def _with_strategy(variant: str, spec: Spec) -> str:
    """`FooCrossAttention` with a `FooGatedAttnProcessor2_0` -> `FooGatedCrossAttention`."""
    strategy = re.sub(r"(Attn|Attention)?Processor[\d_]*$", "", (spec.processor or "").rpartition(".")[2])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(strategy, variant, strict=False)))
    return strategy + variant[shared:]


def attention_role(spec: Spec) -> str | None:
    """`self`, `cross` or `joint` for a class whose forward attends; None if it has no processor."""
    if spec.processor is None:
        return None
    source = spec.calls.get("forward", {}).get("encoder_hidden_states", NONE)
    # Called with a dict of arguments, a container without a width for another sequence attends over its own.
    if source == NONE or (spec.variadic and spec.init.get("cross_attention_dim") == NONE):
        return "self"
    return "joint" if holds_module(spec.attributes.get("add_q_proj")) else "cross"
