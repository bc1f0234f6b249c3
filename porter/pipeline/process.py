"""The post-process function that runs in the engine process."""

from __future__ import annotations

import libcst as cst

from porter.model import Diagnostic, PorterError, Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.render import render
from porter.source.library import Library
from porter.source.names import referenced
from porter.source.tree import body, code, find, self_attribute

NO_PROCESSOR = "PORT504"


def post_process(library: Library, analysis: Analysis, name: str) -> list[cst.BaseStatement] | None:
    """The factory of the post-process function; None if Diffusers does not post-process.

    The processor is built with those of its options that post-processing reads: the others (sizes for
    pre-processing) would need a loaded VAE.
    """
    finish = analysis.tail.post_process
    if finish is None:
        return None
    built = _constructor_call(analysis, finish.processor)
    cls = referenced(built.func) if built is not None else None
    if built is None or cls is None:
        raise PorterError(
            Diagnostic(NO_PROCESSOR, f"self.{finish.processor} is not built in __init__", analysis.call_span)
        )
    wanted = _options_read(library, cls, finish.method)
    kept = [a for a in built.args if a.keyword is not None and a.keyword.value in wanted]
    for arg in kept:
        if any(self_attribute(n) for n in find(arg.value, cst.Attribute)):
            raise PorterError(
                Diagnostic(
                    NO_PROCESSOR,
                    f"post-processing needs {code(arg)}, which a loaded component holds",
                    analysis.call_span,
                )
            )
    processor = code(built.with_changes(args=_tidy(kept)))
    output_type = next((p.default for p in analysis.parameters if p.name == "output_type"), '"pil"')
    value = "video" if "video" in finish.method else "image"
    options = "".join(f", {n}={code(v)}" for n, v in finish.options)
    return render(
        "pipeline/post_process.py.jinja", {}, name=name, cls=analysis.members.cls.name, processor=processor, value=value,
        default_output_type=output_type, method=finish.method, options=options,
    )  # fmt: skip


def _tidy(args: list[cst.Arg]) -> list[cst.Arg]:
    return [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in args]


def _constructor_call(analysis: Analysis, processor: str) -> cst.Call | None:
    for statement in analysis.constructor:
        for assign in find(statement, cst.Assign):
            if any(self_attribute(t.target) == processor for t in assign.targets):
                calls = list(find(assign.value, cst.Call))
                return calls[0] if calls else None
    return None


def _options_read(library: Library, cls: str, method: str) -> frozenset[str]:
    """Names `x` of `self.config.x` that the method and what it calls on `self` read."""
    methods: dict[str, cst.FunctionDef] = {}
    queue = [library.canonical(cls)]
    while queue:
        definition = library.definition(queue.pop(0))
        if isinstance(definition, Unknown) or not isinstance(definition.node, cst.ClassDef):
            continue
        for item in body(definition.node):
            if isinstance(item, cst.FunctionDef):
                methods.setdefault(item.name.value, item)
        queue += [b for a in definition.node.bases if (b := referenced(a.value)) and b.startswith("diffusers.")]
    found: set[str] = set()
    seen: set[str] = set()
    pending = [method]
    while pending:
        name = pending.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        for node in find(methods[name], cst.Attribute):
            inner = self_attribute(node)
            if inner is not None:
                pending.append(inner)
            elif self_attribute(node.value) == "config":
                found.add(node.attr.value)
    return frozenset(found)
