"""How the engine gets the result: its own video media, or a post-process function that runs in the engine process."""

from __future__ import annotations

import ast

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline import PostProcess, Value
from porter.facts.pipeline.liveness import uses
from porter.facts.pipeline.sample_rate import sample_rate
from porter.model import Diagnostic, PorterError, Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.render import render
from porter.source.library import Library
from porter.source.names import referenced
from porter.source.syntax import walk
from porter.source.tree import code, find, same, self_attribute

NO_PROCESSOR = "PORT504"


class Finish(Struct, frozen=True):
    """How the engine gets what the pipeline returns.

    `function` is the factory of the post-process function; None if the engine needs none. `video`: the decoded tensor
    travels as the engine's own video media, which it post-processes itself. `sound`: the result is, or comes with, audio.
    """

    function: tuple[cst.BaseStatement, ...] | None
    video: bool = False
    sound: bool = False


def finish(library: Library, analysis: Analysis, name: str) -> Finish:
    """What becomes of the pipeline's values after `decode`.

    A processor is built with those of its options that post-processing reads: the others (sizes for pre-processing)
    would need a loaded VAE.
    """
    values = analysis.tail.values
    kinds = [_kind(v) for v in values]
    posts = [v.post_process for v in values]
    sound = "audio" in kinds
    if kinds == ["video"] and posts[0] is not None and _plain_video(library, analysis, posts[0]):
        return Finish(None, video=True)
    if not sound and posts == [None]:
        return Finish(None)
    visual = next((p for p in posts if p is not None and p.processor is not None), None)
    rate = sample_rate(library, analysis.components) if sound else None
    output_type = next((p.default for p in analysis.parameters if p.name == "output_type"), '"pil"')
    function = render(
        "pipeline/post_process.py.jinja", {}, name=name, cls=analysis.members.cls.name, kinds=kinds,
        processor=_processor(library, analysis, visual) if visual is not None else None,
        default_output_type=output_type, method=visual.method if visual is not None else None,
        options=_options(analysis, visual) if visual is not None else "",
        grouped=visual is not None and visual.grouped,
        numpy=any(p is not None and p.processor is None for p in posts),
        rate=None if rate is None or isinstance(rate, Unknown) else rate,
        latent="output_type" in {a.name.value for a in analysis.arguments},
    )  # fmt: skip
    return Finish(tuple(function), sound=sound)


def _options(analysis: Analysis, post: PostProcess) -> str:
    """Further arguments of post-processing as text. A local of `__call__` is written out; it may read the picture only.

    Raises PorterError (PORT504) for one that reads anything else: nothing of the call is known where post-processing runs.
    """
    found = []
    for name, value in post.options:
        assigned = [a.value for s in analysis.tail.statements for a in find(s, cst.Assign)
                    if any(same(t.target, value) for t in a.targets)]  # fmt: skip
        text = assigned[0] if len(assigned) == 1 else value
        if uses(text) - {"image"}:
            reads = ", ".join(sorted(uses(text)))
            message = f"post-processing needs {name}={code(value)}, which reads {reads} of the call"
            raise PorterError(Diagnostic(NO_PROCESSOR, message, analysis.call_span))
        found.append(f", {name}={code(text)}")
    return "".join(found)


def _kind(value: Value) -> str:
    if "audio" in value.field:
        return "audio"
    method = value.post_process.method if value.post_process is not None else ""
    return "video" if "video" in method or value.field in ("frames", "video", "videos") else "image"


def _plain_video(library: Library, analysis: Analysis, post: PostProcess) -> bool:
    """Whether the engine's own video post-processing is what Diffusers does."""
    built = _constructor_call(analysis, post.processor or "")
    if post.method != "postprocess_video" or post.options or built is None:
        return False
    cls = referenced(built.func)
    read = _options_read(library, cls, post.method) if cls is not None else frozenset()
    return (cls or "").endswith(".VideoProcessor") and not any(
        a.keyword is not None and a.keyword.value in read for a in built.args
    )


def _processor(library: Library, analysis: Analysis, post: PostProcess) -> str:
    built = _constructor_call(analysis, post.processor or "")
    cls = referenced(built.func) if built is not None else None
    if built is None or cls is None:
        raise PorterError(
            Diagnostic(NO_PROCESSOR, f"self.{post.processor} is not built in __init__", analysis.call_span)
        )
    wanted = _options_read(library, cls, post.method)
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
    return code(built.with_changes(args=_tidy(kept)))


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
    classes = (library.canonical(cls), *library.ancestors(cls))
    found: set[str] = set()
    seen: set[str] = set()
    pending = [method]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        function = next((f for c in classes if (f := library.method_syntax(c, name)) is not None), None)
        for each in walk(function) if function is not None else ():
            if isinstance(each, ast.Attribute):
                if _is_self(each.value):
                    pending.append(each.attr)
                elif (
                    isinstance(each.value, ast.Attribute) and each.value.attr == "config" and _is_self(each.value.value)
                ):
                    found.add(each.attr)
    return frozenset(found)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
