"""Emitted text parses, every name in it is bound, nothing of Diffusers' training or processor machinery is left."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping

from porter.model import Diagnostic, Span
from porter.source.syntax import children, walk

LEFTOVERS = frozenset({"dispatch_attention_fn", "register_to_config", "set_attn_processor", "gradient_checkpointing",
                       "_gradient_checkpointing_func", "apply_lora_scale", "scale_lora_layers", "set_processor",
                       "maybe_free_model_hooks", "scaled_dot_product_attention"})  # fmt: skip


def check_files(files: Mapping[str, str | ast.Module]) -> list[Diagnostic]:
    """Findings over all files of a conversion, given as texts or as Python's trees of them."""
    return [d for name, file in files.items() for d in _check(name, file)]


def _check(name: str, file: str | ast.Module) -> list[Diagnostic]:
    try:
        module = ast.parse(file) if isinstance(file, str) else file
    except SyntaxError as error:
        return [Diagnostic("PORT601", f"{name} does not parse: {error.msg}", Span(name, error.lineno or 1))]
    found = [
        Diagnostic("PORT603", f"{name} still uses {used}", Span(name, node.lineno))
        for node in walk(module)
        if isinstance(node, (ast.Name, ast.Attribute, ast.alias))
        and not _of_component(node)
        and (used := getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))) in LEFTOVERS
    ]
    return found + [Diagnostic("PORT604", f"{name}: the name {n} is bound nowhere", Span(name, line))
                    for n, line in unbound(module)]  # fmt: skip


def _of_component(node: ast.AST) -> bool:
    """`self.scheduler.x`: what a component of the pipeline has of its own is no leftover."""
    owner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self"


def unbound(module: ast.Module) -> list[tuple[str, int]]:
    """(name, line) of names read that no scope binds."""
    found: list[tuple[str, int]] = []
    _scope(module.body, frozenset(dir(builtins)) | {"__name__", "__file__", "__class__"}, found, class_scope=False)
    return sorted(set(found), key=lambda item: (item[1], item[0]))


def _scope(body: list[ast.stmt], outer: frozenset[str], found: list[tuple[str, int]], class_scope: bool) -> None:
    visible = outer | _binds(body)
    inner = outer if class_scope else visible
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            args = node.args
            own = {a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a}
            stack += [d for d in [*args.defaults, *args.kw_defaults] if d]
            if isinstance(node, ast.Lambda):
                _scope([ast.Expr(node.body)], inner | own, found, class_scope=False)
            else:
                stack += node.decorator_list
                stack += [a.annotation for a in [*args.args, *args.kwonlyargs] if a.annotation]
                _scope(node.body, inner | own, found, class_scope=False)
            continue
        if isinstance(node, ast.ClassDef):
            stack += [*node.bases, *node.decorator_list]
            _scope(node.body, inner, found, class_scope=True)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in visible:
            found.append((node.id, node.lineno))
        stack += children(node)


def _binds(body: list[ast.stmt]) -> set[str]:
    """Names bound by statements of one scope, comprehension variables included."""
    bound: set[str] = set()
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        stack += children(node)
    return bound
