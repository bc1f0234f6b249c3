"""What the engine asks of a denoiser class: signature, configuration, class attributes."""

from __future__ import annotations

import libcst as cst

from porter.facts.module_tree import ClassModules
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

CONFIG = absolute("vllm_omni.diffusion.data.OmniDiffusionConfig")
QUANT = absolute("vllm.model_executor.layers.quantization.base_config.QuantizationConfig")
NAMESPACE = absolute("types.SimpleNamespace")


def block_lists(unit: Unit, modules: dict[str, ClassModules]) -> dict[str, list[str]]:
    """ModuleLists of repeated blocks of the root: attribute -> class names."""
    found: dict[str, list[str]] = {}
    for path, sites in modules[unit.root].sites.items():
        if path.endswith(".*"):
            names = [s.cls for s in sites if s.cls in modules]
            if names:
                found[path[:-2]] = names
    return found


def root_surface(unit: Unit, modules: dict[str, ClassModules], fixed: set[str]) -> Unit:
    """The root class as the engine builds it: keyword parameters, `od_config` first, `self.config` kept."""
    root = unit.get(unit.root)
    assert root is not None and isinstance(root.node, cst.ClassDef)
    node = root.node.with_changes(decorators=[])
    init = tree.method(node, "__init__")
    forward = tree.method(node, "forward")
    assert init is not None and forward is not None
    new_init = _constructor(init)
    new_forward = _refuse(forward.with_changes(decorators=[]), fixed)
    body = [new_init if i is init else new_forward if i is forward else i for i in node.body.body]
    return unit.replace(root.with_node(node.with_changes(body=node.body.with_changes(body=body))))


def _constructor(init: cst.FunctionDef) -> cst.FunctionDef:
    names = [p.name.value for p in tree.parameters(init)[1:] if p.name.value not in ("quant_config", "prefix")]
    header = cst.parse_module(
        f'def f(self, *, od_config: {CONFIG}, quant_config: {QUANT} | None = None, prefix: str = ""): pass'
    ).body[0]
    assert isinstance(header, cst.FunctionDef)
    given = [
        p.with_changes(comma=cst.MaybeSentinel.DEFAULT) for p in tree.parameters(init)[1:] if p.name.value in names
    ]
    params = header.params.with_changes(kwonly_params=[*header.params.kwonly_params, *given])
    stmts = tree.body(init)
    docstring = stmts[: len(stmts) - len(tree.strip_docstring(stmts))]
    rest = stmts[len(docstring) :]
    position = next((i for i, s in enumerate(rest) if "super().__init__" in tree.code(s)), -1) + 1
    config = tree.statements(
        f"self.od_config = od_config\nself.config = {NAMESPACE}({', '.join(f'{n}={n}' for n in names)})\n"
    )
    return tree.with_body(
        init.with_changes(params=params, decorators=[]), [*docstring, *rest[:position], *config, *rest[position:]]
    )


def _refuse(forward: cst.FunctionDef, fixed: set[str]) -> cst.FunctionDef:
    """Parameters the port cannot serve raise when they are used."""
    names = [p.name.value for p in tree.parameters(forward) if p.name.value in fixed]
    if not names:
        return forward
    stmts = tree.body(forward)
    docstring = stmts[: len(stmts) - len(tree.strip_docstring(stmts))]
    guards = [
        tree.statement(
            f"if {name}:\n"
            f'    raise NotImplementedError("`{name}` has no counterpart in the engine; LoRA scales are set per request")\n'
        )
        for name in names
    ]
    return tree.with_body(forward, [*docstring, *guards, *stmts[len(docstring) :]])


_REPLACED = frozenset({"_repeated_blocks", "_no_split_modules"})


def replaced_attribute(item: cst.CSTNode) -> bool:
    """A class attribute of Diffusers that the port prints anew."""
    small = item.body[0] if isinstance(item, cst.SimpleStatementLine) else None
    target = small.targets[0].target if isinstance(small, cst.Assign) else None
    return isinstance(target, cst.Name) and target.value in _REPLACED
