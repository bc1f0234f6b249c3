"""Class attributes by which the engine compiles, offloads, shards and caches a denoiser."""

from __future__ import annotations

import libcst as cst

from porter.facts.block_loops import plain_loops
from porter.facts.module_tree import ClassModules
from porter.facts.projections import Merge
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute
from porter.transformer.lower.surface import block_lists

CACHE_CONFIG = absolute("vllm_omni.diffusion.cache.cachedit.config.CacheDiTAdapterConfig")
PATTERN = absolute("cache_dit.ForwardPattern")
_INPUTS = ("hidden_states", "encoder_hidden_states")


def class_attributes(unit: Unit, modules: dict[str, ClassModules], merges: list[Merge]) -> list[cst.BaseStatement]:
    """Statements for the top of the root class."""
    blocks = block_lists(unit, modules)
    text: list[str] = []
    repeated = list(dict.fromkeys(n for names in blocks.values() for n in names))
    if repeated:
        quoted = ", ".join(f'"{n}"' for n in repeated)
        attributes = ", ".join(f'"{a}"' for a in blocks)
        text.append(f"_repeated_blocks = [{quoted}]")
        text.append(f"_layerwise_offload_blocks_attrs = [{attributes}]")
        prefixes = ", ".join(f'"{a}."' for a in blocks)
        starts = f"({prefixes},)" if len(blocks) == 1 else f"({prefixes})"
        text.append(
            "_hsdp_shard_conditions = ["
            f"lambda name, module: name.startswith({starts}) and name.rpartition('.')[2].isdigit()]"
        )
    root = unit.get(unit.root)
    forward = tree.method(root.node, "forward") if root is not None else None
    plain = plain_loops(forward) if forward is not None else set()
    patterns = {
        a: p
        for a, names in blocks.items()
        if a in plain and len(found := {_pattern(unit, n) for n in names}) == 1 and (p := found.pop())
    }
    if patterns:
        items = ", ".join(f'"{a}": {PATTERN}.{p}' for a, p in patterns.items())
        text.append(f"_cache_dit_adapter_config = {CACHE_CONFIG}(block_forward_patterns={{{items}}})")
    if merges:
        rows = dict.fromkeys((m.name, s, i) for m in merges for s, i in m.sources)
        items = ", ".join(f'(".{m}", ".{s}", {i!r})'.replace("'", '"') for m, s, i in rows)
        text.append(f"stacked_params_mapping = [{items}]")
        packed: dict[str, list[str]] = {}
        for name, source, _ in rows:
            packed.setdefault(name, []).append(source)
        items = ", ".join(
            f'"{n}": [{", ".join(chr(34) + s + chr(34) for s in sources)}]' for n, sources in packed.items()
        )
        text.append(f"packed_modules_mapping = {{{items}}}")
    return tree.statements("\n".join(text) + "\n") if text else []


def _pattern(unit: Unit, name: str) -> str | None:
    """Cache-DiT's pattern of a block, from its first two parameters and what it returns (engine: cache_dit.ForwardPattern). A
    text behind them is an argument like others: it is handed on, not given in second place."""
    definition = unit.get(name)
    forward = tree.method(definition.node, "forward") if definition is not None else None
    if forward is None:
        return None
    inputs = tuple(p.name.value for p in tree.parameters(forward)[1:3] if p.name.value in _INPUTS)
    returns = [r.value for r in tree.find(forward.body, cst.Return) if r.value is not None]
    if not returns or inputs[:1] != ("hidden_states",):
        return None
    shapes = {_shape(r) for r in returns}
    if len(shapes) != 1:
        return None
    table = {
        (2, ("hidden_states", "encoder_hidden_states")): "Pattern_0",
        (2, ("encoder_hidden_states", "hidden_states")): "Pattern_1",
        (2, ("hidden_states",)): "Pattern_2",
        (1, ("hidden_states",)): "Pattern_3",
        (1, ("hidden_states", "encoder_hidden_states")): "Pattern_4",
        (1, ("encoder_hidden_states", "hidden_states")): "Pattern_5",
    }
    return table.get((len(inputs), shapes.pop()))


def _shape(value: cst.BaseExpression) -> tuple[str, ...]:
    if isinstance(value, cst.Tuple):
        return tuple(tree.code(e.value) for e in value.elements)
    return (tree.code(value),) if isinstance(value, cst.Name) else ("?",)
