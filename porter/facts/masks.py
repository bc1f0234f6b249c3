"""Attention masks that only say which keys are padding, in a shape that says more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import libcst as cst

from porter.engine.registry import FactSite, fact
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

METADATA = absolute("vllm_omni.diffusion.attention.backends.abstract.AttentionMetadata")
_GIVEN = " is not None"
_BOOL = (absolute("torch.bool"), "bool")


@fact("wide_key_mask", fields=["keys", "same"])
def wide_key_masks(unit: Unit) -> Iterator[FactSite]:
    """`mask = keys[:, None, None, :]` (and the like) in a method that hands `mask` to attention and does nothing else with it.

    `keys` is [B, keys]: boolean, so that two axes say the same as four. An `expand` over heads and queries goes along. `same`:
    nothing but the shape of one variable changes.
    """
    for definition in unit.definitions:
        if isinstance(definition.node, cst.ClassDef):
            for method in definition.node.body.body:
                if isinstance(method, cst.FunctionDef):
                    for name, site, keys in _sites(method):
                        same = isinstance(keys, cst.Name) and keys.value == name
                        yield FactSite(site, definition.name, {"keys": keys, "same": same})


def _sites(method: cst.FunctionDef) -> Iterator[tuple[str, cst.BaseExpression, cst.BaseExpression]]:
    handed = [c.args[0].value for c in tree.find(method.body, cst.Call) if tree.call_name(c) == METADATA and c.args]
    names = {n.value for n in handed if isinstance(n, cst.Name)}
    assigns = list(tree.find(method.body, cst.Assign))
    for name in sorted(names):
        written = [
            a for a in assigns if any(isinstance(t.target, cst.Name) and t.target.value == name for t in a.targets)
        ]
        wide = [(a.value, keys) for a in written if (keys := _narrow(a.value)) is not None]
        if not wide or not all(_boolean(keys, assigns) or _expands(site) for site, keys in wide):
            continue
        if not _read_elsewhere(method, name, [site for site, _ in wide], handed):
            yield from ((name, *each) for each in wide)


def _narrow(value: cst.BaseExpression) -> cst.BaseExpression | None:
    """The [B, keys] tensor of an expression that only adds axes to it."""
    if not isinstance(value, cst.Call) or not isinstance(value.func, cst.Attribute):
        return _unindexed(value)
    inner, name, args = value.func.value, value.func.attr.value, [tree.code(a.value) for a in value.args]
    if name == "expand" and len(args) == 4 and args[0] == args[3] == "-1":
        return inner if isinstance(inner, cst.Name) else _narrow(inner)
    if name in ("view", "reshape") and len(args) == 4 and args[1:] == ["1", "1", "-1"]:
        return inner
    return None


def _expands(value: cst.BaseExpression) -> bool:
    """Whether only axes are grown that broadcast anyway."""
    return tree.code(value).count(".expand(") == 1 and isinstance(value, cst.Call) and _expanded_name(value)


def _expanded_name(value: cst.Call) -> bool:
    return isinstance(value.func, cst.Attribute) and isinstance(value.func.value, cst.Name)


def _unindexed(value: cst.BaseExpression) -> cst.BaseExpression | None:
    if isinstance(value, cst.Subscript) and [tree.code(e.slice) for e in value.slice] == [":", "None", "None", ":"]:
        return value.value
    return None


def _boolean(keys: cst.BaseExpression, assigns: Sequence[cst.Assign], seen: frozenset[str] = frozenset()) -> bool:
    """Whether the tensor is cast to bool, or made of parts of which one is boolean ones."""
    if isinstance(keys, cst.Name):
        made = [a.value for a in assigns if any(tree.same(t.target, keys) for t in a.targets)]
        return keys.value not in seen and any(_boolean(v, assigns, seen | {keys.value}) for v in made)
    if not isinstance(keys, cst.Call):
        return False
    if isinstance(keys.func, cst.Attribute) and keys.func.attr.value == "bool":
        return True
    if any(tree.code(a.value) in _BOOL for a in keys.args):
        return True
    if tree.call_name(keys) in (absolute("torch.cat"), absolute("torch.concat")):
        parts = getattr(keys.args[0].value, "elements", ())
        return any(_boolean(e.value, assigns, seen) for e in parts)
    return False


def _read_elsewhere(
    method: cst.FunctionDef, name: str, sites: Sequence[cst.BaseExpression], handed: Sequence[cst.BaseExpression]
) -> bool:
    """Whether the variable is read after it was widened, for anything but attention and tests for None."""
    nodes = list(tree.walk(method.body))
    start = next(i for i, n in enumerate(nodes) if any(n is s for s in sites))
    inside = {id(n) for site in sites for n in tree.walk(site)}
    harmless = {id(n) for n in handed} | {id(t.target) for t in tree.find(method.body, cst.AssignTarget)}
    for node in nodes[start:]:
        if isinstance(node, cst.Comparison) and tree.is_none(node.comparisons[0].comparator):
            harmless |= {id(n) for n in tree.walk(node)}
        if isinstance(node, cst.Name) and node.value == name and id(node) not in inside | harmless:
            return True
    return False


def variables(node: cst.CSTNode) -> Iterator[cst.Name]:
    """Names that are variables: no attributes, no keywords."""
    stack: list[cst.CSTNode] = [node]
    while stack:
        each = stack.pop()
        if isinstance(each, cst.Name):
            yield each
        elif isinstance(each, (cst.Attribute, cst.Arg)):
            stack.append(each.value)
        else:
            stack += tree.children(each)


def metadata_names(forward: cst.FunctionDef) -> dict[str, set[int]]:
    """By variable: names in `AttentionMetadata(attn_mask=mask) if mask is not None else None`."""
    found: dict[str, set[int]] = {}
    for choice in tree.find(forward.body, cst.IfExp):
        call = choice.body
        if not isinstance(call, cst.Call) or tree.call_name(call) != METADATA or len(call.args) != 1:
            continue
        test = tree.code(choice.test)
        if test.endswith(_GIVEN) and tree.code(choice.orelse) == "None":
            found.setdefault(test.removesuffix(_GIVEN), set()).update(id(n) for n in tree.find(choice, cst.Name))
    return found
