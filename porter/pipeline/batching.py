"""Whether one call for N prompts gives each prompt what a call of its own gives."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import Guidance
from porter.facts.pipeline.liveness import names_of, uses
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.source.tree import code, find, self_attribute, walk


def batching(analysis: Analysis) -> Unknown | None:
    """None if prompts can share a call, else why not."""
    prompt = next((a for a in analysis.arguments if a.name.value == "prompt"), None)
    if prompt is None or prompt.annotation is None or "list" not in code(prompt.annotation.annotation).lower():
        return Unknown("the pipeline takes one prompt per call")
    if any(p.place == "media" for p in analysis.parameters):
        return Unknown("media inputs are handled one request at a time")
    ragged = [h.name for h in analysis.helpers if _pads_to_longest(h.node)]
    if ragged and not _masked(analysis):
        return Unknown(f"{ragged[0]} pads prompts to the longest of a call and no mask reaches the denoiser")
    return None


def _masked(analysis: Analysis) -> bool:
    guide = analysis.guidance
    names = list(guide.positive.arguments) if isinstance(guide, Guidance) else []
    if not names:
        calls = [c for s in analysis.cut.denoise for c in find(s, cst.Call)]
        names = [a.keyword.value for c in calls for a in c.args if a.keyword]
    return any("mask" in n for n in names)


def _pads_to_longest(function: cst.FunctionDef) -> bool:
    """A tokenizer call whose result an encoder reads pads to the longest prompt."""
    encoded: set[str] = set()
    for call in find(function, cst.Call):
        if (self_attribute(call.func) or "").startswith("text_encoder"):
            encoded |= {n for a in call.args for n in uses(a.value)}
    bound: dict[str, list[cst.BaseExpression]] = {}
    for assign in find(function, cst.Assign):
        for target in assign.targets:
            for name in names_of(target.target):
                bound.setdefault(name, []).append(assign.value)
    seen: set[str] = set()
    while encoded - seen:
        name = (encoded - seen).pop()
        seen.add(name)
        for value in bound.get(name, []):
            encoded |= uses(value)
    return any(_longest(node) for name in seen for value in bound.get(name, []) for node in walk(value))


def _longest(node: cst.CSTNode) -> bool:
    if not isinstance(node, cst.Call) or not (self_attribute(node.func) or "").startswith("tokenizer"):
        return False
    for arg in node.args:
        if arg.keyword is not None and arg.keyword.value == "padding":
            return code(arg.value) != '"max_length"'
    return False
