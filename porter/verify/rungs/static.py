"""Rung `static`: generated files parse, what they import exists, nothing that only Diffusers needs is left.

Needs neither torch nor the engine to be imported; imports are resolved in the installed sources by `api`.
"""

from __future__ import annotations

import ast
from pathlib import Path

from porter.verify.api import Api, Missing
from porter.verify.bench import Clock
from porter.verify.outcome import CaseResult, RungResult, rung_of

LEFTOVERS = frozenset({
    "register_to_config", "ConfigMixin", "ModelMixin", "PeftAdapterMixin", "FromOriginalModelMixin",
    "AttentionMixin", "CacheMixin", "AttentionModuleMixin", "DiffusionPipeline", "register_modules",
    "gradient_checkpointing", "_gradient_checkpointing_func", "enable_gradient_checkpointing",
    "_supports_gradient_checkpointing", "dispatch_attention_fn", "set_attn_processor", "set_default_attn_processor",
    "attn_processors", "AttnProcessor", "apply_lora_scale", "scale_lora_layers", "unscale_lora_layers",
    "USE_PEFT_BACKEND", "maybe_allow_in_graph", "fuse_qkv_projections", "unfuse_qkv_projections",
    "maybe_free_model_hooks", "replace_example_docstring", "XLA_AVAILABLE", "is_torch_xla_available",
    "MultiPipelineCallbacks", "PipelineCallback",
})  # fmt: skip
CHECKED = ("vllm_omni", "vllm", "diffusers")


def static(generated: Path | str, folder: str, api: Api | None = None) -> RungResult:
    """Check every Python file of one port folder."""
    clock = Clock()
    api = api or Api()
    files = sorted((Path(generated) / folder).glob("*.py"))
    return rung_of("static", folder, [check_file(path, api) for path in files], clock())


def check_file(path: Path, api: Api) -> CaseResult:
    clock = Clock()
    try:
        tree = ast.parse(path.read_text(), str(path))
    except SyntaxError as error:
        return CaseResult(path.name, "failed", f"{path.name}:{error.lineno}: {error.msg}", seconds=clock())
    problems = [*_leftovers(tree, path), *_imports(tree, path, api)]
    figures = {"imports": sum(isinstance(n, ast.ImportFrom) for n in ast.walk(tree)), "problems": len(problems)}
    message = "; ".join(text for _, text in problems[:8])
    where = {"file": path.name, "line": problems[0][0]} if problems else None
    return CaseResult(path.name, "failed" if problems else "passed", message, figures, clock(), where)


def _leftovers(tree: ast.Module, path: Path) -> list[tuple[int, str]]:
    """Names, attributes and imports that have no place in a port."""
    found = []
    for node in ast.walk(tree):
        names: tuple[str, ...] = ()
        match node:
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"))):
                continue  # `self.scheduler.x`: what a component has of its own
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                names = (name,)
            case ast.ImportFrom() | ast.Import():
                names = tuple(a.name.rsplit(".", 1)[-1] for a in node.names)
        line = getattr(node, "lineno", 0)
        found += [(line, f"{path.name}:{line}: {n} is left over") for n in names if n in LEFTOVERS]
    return sorted(set(found))


def _imports(tree: ast.Module, path: Path, api: Api) -> list[tuple[int, str]]:
    """Imports of the engine, Diffusers or the port's own folder that do not resolve."""
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted: list[tuple[str, str | None]] = [(a.name, None) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = [(node.module or "", a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            problems += _relative(node, path, api)
            continue
        else:
            continue
        for module, name in wanted:
            if module.split(".")[0] in CHECKED:
                missing = api.missing(module, name)
                if missing not in (Missing.NOTHING, Missing.DISTRIBUTION):
                    text = f"{path.name}:{node.lineno}: {missing.text(module, name)}"
                    problems.append((node.lineno, text))
    return problems


def _relative(node: ast.ImportFrom, path: Path, api: Api) -> list[tuple[int, str]]:
    base = path.parent
    for _ in range(node.level - 1):
        base = base.parent
    stem = base.joinpath(*(node.module.split(".") if node.module else ()))
    target = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
    if not target.is_file() and node.module is None and base.is_dir():
        names: frozenset[str] = frozenset()
    elif not target.is_file():
        return [(node.lineno, f"{path.name}:{node.lineno}: {'.' * node.level}{node.module or ''} does not exist")]
    else:
        names = api.names_in(target)
    return [
        (node.lineno, f"{path.name}:{node.lineno}: {target.name} defines no {a.name}")
        for a in node.names
        if a.name != "*" and a.name not in names and not (target.parent / f"{a.name}.py").is_file()
        and not (target.parent / a.name).is_dir()
    ]  # fmt: skip
