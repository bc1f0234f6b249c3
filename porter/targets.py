"""What a user asks to port: a pipeline class with its denoisers, or a denoiser class alone."""

from __future__ import annotations

import ast

from msgspec import Struct

from porter.model import Diagnostic, PorterError
from porter.source.absolutise import Resolver
from porter.source.library import Library
from porter.source.names import DOT

PIPELINE = "diffusers.pipelines.pipeline_utils.DiffusionPipeline"
MODEL = "diffusers.models.modeling_utils.ModelMixin"
DENOISERS = "diffusers.models.transformers."


class Target(Struct, frozen=True):
    """`denoisers` maps component names to qualified denoiser classes."""

    name: str
    qualified: str
    is_pipeline: bool
    denoisers: dict[str, str]


def find_target(library: Library, name: str) -> Target:
    """Resolve a class name (`diffusers.X`, `X` or a full path).

    Raises PorterError: PORT003 unknown, PORT004 neither pipeline nor denoiser, PORT005 pipeline without a transformer.
    """
    public = name if name.startswith("diffusers.") else f"diffusers.{name}"
    qualified = library.canonical(public)
    short = qualified.rpartition(".")[2]
    if not library.is_class(qualified):
        raise PorterError(Diagnostic("PORT003", f"{name or '(no name)'} is no class of diffusers {library.version}",
                                     advice=_closest(library, public)))  # fmt: skip
    if PIPELINE in library.ancestors(qualified):
        found = _denoisers(library, qualified)
        if not found:
            raise PorterError(Diagnostic("PORT005", f"{short} has no transformer component", library.span(qualified)))
        return Target(short, qualified, True, found)
    if qualified.startswith(DENOISERS) and library.is_torch_module(qualified):
        return Target(short, qualified, False, {"transformer": qualified})
    raise PorterError(
        Diagnostic("PORT004", f"{short} is neither a pipeline nor a transformer", library.span(qualified))
    )


def all_targets(library: Library) -> list[Target]:
    """Pipelines with a transformer that Diffusers exports, by name; deprecated ones are left out."""
    found = []
    module = library.module("diffusers.pipelines")
    for name in sorted(module.imports if module else ()):
        qualified = library.canonical(f"diffusers.{name}")
        if not qualified.startswith("diffusers.pipelines.") or ".deprecated." in qualified or "onnx" in qualified:
            continue
        if library.is_class(qualified) and PIPELINE in library.ancestors(qualified):
            denoisers = _denoisers(library, qualified)
            if denoisers and not any("Deprecated" in a for a in library.ancestors(qualified)):
                found.append(Target(name, qualified, True, denoisers))
    return found


def _denoisers(library: Library, qualified: str) -> dict[str, str]:
    """Components of the constructor annotated with a transformer class (the first one of a union)."""
    for name in (qualified, *library.ancestors(qualified)):
        parent, _, last = name.rpartition(".")
        module = library.module(parent)
        node = module.node(last) if module else None
        if module is None or not isinstance(node, ast.ClassDef):
            continue
        init = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
        if init is None:
            continue
        resolver = Resolver(module, library)
        found: dict[str, str] = {}
        for arg in [*init.args.args, *init.args.kwonlyargs]:
            for part in ast.walk(arg.annotation) if arg.annotation is not None else ():
                path = ast.unparse(part) if isinstance(part, (ast.Name, ast.Attribute)) else None
                text = resolver.chain(path) if path else None
                cls = library.canonical(text.replace(DOT, ".")) if text else ""
                if cls.startswith(DENOISERS) and arg.arg not in found:
                    found[arg.arg] = cls
        return found
    return {}


def _closest(library: Library, public: str) -> str | None:
    import difflib

    module = library.module("diffusers")
    exported = module.imports if module else {}
    name = public.rpartition(".")[2]
    if name in exported:
        return f"the source is incomplete: {library.canonical(public)} is imported, and not there"
    close = difflib.get_close_matches(name, list(exported), n=3, cutoff=0.6)
    return f"near it: {', '.join(close)}" if close else None
