"""Attention calls become calls of the engine's Attention layer, built once in the constructor."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.flow import AttentionSite
from porter.facts.geometry import Geometry
from porter.model import Diagnostic, Unknown
from porter.source import tree
from porter.source.names import absolute

TENSORS = ("query", "key", "value")
LAYER = absolute("vllm_omni.diffusion.attention.layer.Attention")
METADATA = absolute("vllm_omni.diffusion.attention.backends.abstract.AttentionMetadata")
WORLD_SIZE = absolute("vllm.distributed.get_tensor_model_parallel_world_size")
DIVIDE = absolute("vllm.distributed.utils.divide")
MASKED = absolute("porter_template.MaskedFlashAttention")

Edit = tuple[cst.CSTNode, object]

_IGNORED = {"dropout_p", "backend", "parallel_config", "enable_gqa", "attention_kwargs"}


class LoweredAttention(Struct, frozen=True):
    """Edits, statements for the end of the constructor, and findings."""

    edits: tuple[Edit, ...]
    constructor: tuple[str, ...]
    diagnostics: tuple[Diagnostic, ...]


def lower_attention(
    node: cst.ClassDef, sites: Sequence[AttentionSite], geometry: Geometry | Unknown, role: str, shardable: bool
) -> LoweredAttention:
    """Plan the attention of one class. `role` is self, cross or joint; joint attends over its own concatenation."""
    if isinstance(geometry, Unknown):
        return LoweredAttention((), (), (Diagnostic("PORT303", f"{node.name.value}: {geometry.reason}"),))
    edits: list[Edit] = []
    layers: dict[tuple[str | None, str], str] = {}
    masked: set[str] = set()
    for site in sites:
        bound = tree.arguments(site.call, [*TENSORS, "attn_mask", "dropout_p", "is_causal", "scale"])
        if bound is None:
            return LoweredAttention((), (), (Diagnostic("PORT302", f"{node.name.value}: arguments hidden behind *"),))
        unknown = set(bound) - {*TENSORS, "attn_mask", "is_causal", "scale"} - _IGNORED
        if unknown:
            text = ", ".join(sorted(unknown))
            return LoweredAttention((), (), (Diagnostic("PORT302", f"{node.name.value}: keyword {text}"),))
        if missing := [k for k in TENSORS if k not in bound]:
            return LoweredAttention(
                (), (), (Diagnostic("PORT302", f"{node.name.value}: no {', '.join(missing)} is given"),)
            )
        scale: str | None = None
        if "scale" in bound and not tree.is_none(bound["scale"]):
            scale = _known_in_constructor(bound["scale"], node)
            if scale is None:  # depends on the input: the layer does not scale, the query is scaled
                scale = "1.0"
                bound["query"] = tree.expression("query * scale", query=bound["query"], scale=bound["scale"])
        kind = (scale, tree.code(bound["is_causal"]) if "is_causal" in bound else "False")
        layer = layers.setdefault(kind, _layer_name(kind[1], len(layers)))
        if _has_mask(bound):
            masked.add(layer)
        edits.append((site.call, _call(bound, site.layout, layer)))
    statements: list[str] = []
    size, heads = geometry.head_size, geometry.heads
    if "//" in size:
        statements.append(f"head_dim = {size}")
        size = "head_dim"
    if "//" in heads:
        statements.append(f"num_heads = {heads}")
        heads = "num_heads"
    if shardable:
        for name in geometry.local:
            statements.append(f"self.{name} = {DIVIDE}(self.{name}, {WORLD_SIZE}())")
    if not heads.startswith("self.") or heads[5:] not in geometry.local:
        heads = f"{DIVIDE}({heads}, {WORLD_SIZE}())" if shardable else heads
    for (scale, causal), layer in layers.items():
        arguments = [f"num_heads={heads}", f"head_size={size}", f"softmax_scale={scale or f'{_base(size)} ** -0.5'}",
                     f"causal={causal}"]  # fmt: skip
        if geometry.kv_heads:
            arguments.append(f"num_kv_heads={geometry.kv_heads}")
        arguments.append(f'role="{"cross" if role == "cross" else "self"}"')
        if role == "cross":
            arguments.append("skip_sequence_parallel=True")
        if layer in masked:  # the platform's default is FlashAttention, which takes key padding only
            arguments.append(f'impl_overrides={{"FLASH_ATTN": {MASKED}}}')
        arguments.append(f'prefix=f"{{prefix}}.{layer}"')
        statements.append(f"self.{layer} = {LAYER}({', '.join(arguments)})")
    return LoweredAttention(tuple(edits), tuple(statements), ())


def _layer_name(causal: str, others: int) -> str:
    """Attribute of the layer for one kind of attention in a class: calls that differ in scale or causality differ in it."""
    if others == 0:
        return "attn"
    return "attn_causal" if causal == "True" else "attn_full" if others == 1 else f"attn_{others + 1}"


def _known_in_constructor(value: cst.BaseExpression, node: cst.ClassDef) -> str | None:
    """Text of a scale that only depends on attributes and numbers; a local assigned once is looked through."""
    names = {n.value for n in _loads(value)}
    if not names - {"self"}:
        return tree.code(value)
    forward = tree.method(node, "forward")
    if isinstance(value, cst.Name) and forward is not None:
        stored = [a for a in tree.find(forward.body, cst.Assign)
                  if any(isinstance(t.target, cst.Name) and t.target.value == value.value for t in a.targets)]  # fmt: skip
        if len(stored) == 1 and not {n.value for n in _loads(stored[0].value)} - {"self"}:
            return tree.code(stored[0].value)
    return None


def _loads(node: cst.CSTNode) -> list[cst.Name]:
    """Names read by an expression; attribute names are none."""
    if isinstance(node, cst.Name):
        return [node]
    if isinstance(node, cst.Attribute):
        return _loads(node.value)
    return [n for child in tree.children(node) for n in _loads(child)]


def _base(size: str) -> str:
    """The head size as base of a power."""
    return size if size.replace(".", "").replace("_", "").isalnum() else f"({size})"


def _has_mask(bound: dict[str, cst.BaseExpression]) -> bool:
    return "attn_mask" in bound and not tree.is_none(bound["attn_mask"])


def _call(bound: dict[str, cst.BaseExpression], layout: str, layer: str) -> cst.BaseExpression:
    turn = ".transpose(1, 2)" if layout == "bhsd" else ""
    text = f"self.{layer}(query{turn}, key{turn}, value{turn}"
    holes = {k: bound[k] for k in TENSORS}
    if _has_mask(bound):
        text += f", attn_metadata={METADATA}(attn_mask=mask) if mask is not None else None"
        holes["mask"] = bound["attn_mask"]
    return tree.expression(f"{text}){turn}", **holes)


def heads_second(node: cst.ClassDef, sites: Sequence[AttentionSite]) -> list[Edit] | None:
    """Edits that keep the sequence before the heads from the projections on, so that no transpose is left.

    None if something between projections and attention depends on the order of the two dimensions.
    """
    forward = tree.method(node, "forward")
    if forward is None or len(sites) != 1 or sites[0].layout != "bhsd":
        return None
    call = sites[0].call
    names: set[str] = set()
    for arg in call.args[:3]:
        if not isinstance(arg.value, cst.Name):
            return None
        names.add(arg.value.value)
    edits: list[Edit] = []
    pending = set(names)
    done: set[str] = set()
    lines = list(tree.find(forward.body, cst.SimpleStatementLine))
    seen: set[int] = set()
    while pending:
        name = pending.pop()
        done.add(name)
        for line in lines:
            small = line.body[0]
            if not isinstance(small, cst.Assign) or not any(
                isinstance(t.target, cst.Name) and t.target.value == name for t in small.targets
            ):
                continue
            step = _step(small.value, name)
            if step is None:
                seen.add(id(line))
                continue
            seen.add(id(line))
            kind, more = step
            if kind == "unknown":
                return None
            if kind == "turn":
                edits.append((small.value, lambda updated: updated.func.value))
            if kind == "cat":
                dim = small.value.args[1].value  # type: ignore[attr-defined]
                edits.append((dim, cst.Integer("1")))
            pending |= more - done
    after = _turned_back(call, forward)
    if after is None or not edits or _used_otherwise(forward, done, seen | {id(call)}):
        return None
    return [*edits, *after]


def _used_otherwise(forward: cst.FunctionDef, names: set[str], seen: set[int]) -> bool:
    """Whether a head tensor is used anywhere but in the steps followed (its dtype, device or batch size do not count)."""
    stack: list[cst.CSTNode] = [forward.body]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        if isinstance(node, cst.Attribute) and node.attr.value in ("dtype", "device"):
            continue
        if isinstance(node, cst.Name) and node.value in names:
            return True
        if isinstance(node, (cst.Attribute, cst.Arg)):
            stack.append(node.value)
        elif isinstance(node, cst.AssignTarget) and isinstance(node.target, cst.Name):
            continue
        else:
            stack += tree.children(node)
    return False


def _step(value: cst.BaseExpression, name: str) -> tuple[str, set[str]] | None:
    """How one assignment to a head tensor depends on the order of sequence and heads."""
    if isinstance(value, cst.Call) and isinstance(value.func, cst.Attribute):
        method = value.func.attr.value
        if method == "transpose" and tree.code(cst.Tuple([cst.Element(a.value) for a in value.args])) == "(1, 2)":
            return "turn", set()
        attribute = tree.self_attribute(value.func)
        if attribute is not None and "norm" in attribute and len(value.args) == 1:
            inner = value.args[0].value
            return "norm", {inner.value} if isinstance(inner, cst.Name) else set()
        if attribute is not None or method in ("chunk", "view", "unflatten"):
            return None  # a projection, before heads are split off
    if isinstance(value, cst.Call) and tree.call_name(value) in ("torch\u00b7cat", "torch\u00b7concat"):
        items = value.args[0].value
        if len(value.args) == 2 and tree.code(value.args[1].value) == "2" and isinstance(items, (cst.List, cst.Tuple)):
            if all(isinstance(e.value, cst.Name) for e in items.elements):
                return "cat", {e.value.value for e in items.elements}
    if not any(n.value == name for n in tree.find(value, cst.Name)) and isinstance(value, cst.Name):
        return None
    return "unknown", set()


def _turned_back(call: cst.Call, forward: cst.FunctionDef) -> list[Edit] | None:
    """The transpose that undoes the layout after attention: on the call itself or in the next statement."""
    for line in tree.find(forward.body, cst.SimpleStatementLine):
        small = line.body[0]
        if (
            not isinstance(small, cst.Assign)
            or small.value is not call
            or not isinstance(small.targets[0].target, cst.Name)
        ):
            continue
        result = small.targets[0].target.value
        for other in tree.find(forward.body, cst.Call):
            if isinstance(other.func, cst.Attribute) and other.func.attr.value == "transpose":
                owner = other.func.value
                if isinstance(owner, cst.Name) and owner.value == result:
                    if tree.code(cst.Tuple([cst.Element(a.value) for a in other.args])) == "(1, 2)":
                        return [(other, lambda updated: updated.func.value)]
    return None


def as_bshd(site: AttentionSite) -> AttentionSite:
    """The site once `heads_second` has turned its inputs."""
    return replace(site, layout="bshd")
