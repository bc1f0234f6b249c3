"""The components of a pipeline: what its constructor takes, of which class, in which role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.members import Members
from porter.model import Span, Unknown
from porter.source.marks import mark_of
from porter.source.names import qualified
from porter.source.tree import code, find, method, parameters

Role = Literal[
    "denoiser", "text_encoder", "image_encoder", "tokenizer", "processor", "vae", "scheduler", "module", "value"
]

_ENDINGS: tuple[tuple[str, Role], ...] = (
    ("Tokenizer", "tokenizer"), ("TokenizerFast", "tokenizer"), ("TokenizerBase", "tokenizer"),
    ("Scheduler", "scheduler"), ("Schedulers", "scheduler"), ("SchedulerMixin", "scheduler"),
    ("ImageProcessor", "processor"), ("FeatureExtractor", "processor"), ("Processor", "processor"),
    ("ProcessorFast", "processor"),
)  # fmt: skip
_NAMED: tuple[tuple[str, Role], ...] = (
    ("scheduler", "scheduler"), ("tokenizer", "tokenizer"), ("feature_extractor", "processor"), ("processor", "processor"),
    ("image_encoder", "image_encoder"), ("vae", "vae"), ("text_encoder", "text_encoder"),
)  # fmt: skip


class Component(Struct, frozen=True):
    """One constructor parameter. `classes` are the qualified names of its annotation, in source order."""

    name: str
    classes: tuple[str, ...]
    role: Role
    optional: bool
    default: str | None
    span: Span | None = None

    @property
    def loads(self) -> bool:
        """Whether the checkpoint holds a folder for it (a plain value is written in model_index.json itself)."""
        return self.role != "value"


def components(members: Members) -> tuple[Component, ...] | Unknown:
    """Constructor parameters of the pipeline class in order, or why they are not known."""
    owner = members.owner_of("__init__")
    constructor = method(owner.node, "__init__") if owner is not None and isinstance(owner.node, cst.ClassDef) else None
    if owner is None or constructor is None:
        return Unknown("the class and its Diffusers bases define no __init__")
    optional = _optional_names(members)
    mark = mark_of(constructor)
    found = []
    for parameter in parameters(constructor)[1:]:
        name = parameter.name.value
        default = code(parameter.default) if parameter.default is not None else None
        classes = tuple(_classes(parameter.annotation))
        role = _role(name, classes) if classes or not _builtin(parameter.annotation) else "value"
        span = Span(owner.file, mark.line) if mark else None
        found.append(Component(name, classes, role, name in optional or default == "None", default, span))
    return tuple(found)


def _optional_names(members: Members) -> frozenset[str]:
    value = members.class_value("_optional_components")
    if isinstance(value, (cst.List, cst.Tuple)):
        return frozenset(str(s.evaluated_value) for s in find(value, cst.SimpleString))
    return frozenset()


def _classes(annotation: cst.Annotation | None) -> Sequence[str]:
    if annotation is None:
        return ()
    names = [qualified(n.value) for n in find(annotation.annotation, cst.Name)]
    return [n for n in names if n is not None and not n.startswith("typing.")]


def _builtin(annotation: cst.Annotation | None) -> bool:
    """Whether an annotation speaks of plain values only: `tuple[int, ...] | None`."""
    names = [n.value for n in find(annotation.annotation, cst.Name)] if annotation is not None else []
    return bool(names) and set(names) <= {"int", "float", "bool", "str", "tuple", "list", "dict", "None"}


def _role(name: str, classes: tuple[str, ...]) -> Role:
    last = [c.rpartition(".")[2] for c in classes]
    if not classes:
        return next((role for part, role in _NAMED if name.startswith(part)), "value")
    for cls, short in zip(classes, last, strict=True):
        for ending, role in _ENDINGS:
            if short.endswith(ending):
                return role
        if cls.startswith(("diffusers.models.transformers.", "diffusers.models.unets.")):
            return "denoiser"
        if cls.startswith("diffusers.guiders."):
            return "processor"
        if ".autoencoders." in cls:
            return "vae"
    if any(c.startswith("transformers.") for c in classes):
        return "image_encoder" if any("Vision" in s for s in last) else "text_encoder"
    return next((role for part, role in _NAMED if name.startswith(part)), "module")
