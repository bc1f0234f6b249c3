"""A crop that is pasted into finished pictures: done on pictures of the decoded range, ahead of post-processing."""

from __future__ import annotations

from typing import cast

import libcst as cst

from porter.facts.pipeline.liveness import uses
from porter.source.marks import inherit
from porter.source.tree import body, find, self_attribute, substitute, with_body

RULE = "paste-before-post-processing"
"""Name under which the line map explains the statements around a paste."""


def pastes_crop(branch: cst.If, pictures: str) -> bool:
    """`if ...: image = [self.<processor>.apply_overlay(..., i, ...) for i in image]`, without else."""
    inner = body(branch)
    if branch.orelse is not None or len(inner) != 1 or pictures not in uses(inner[0]):
        return False
    calls = [self_attribute(c.func.value) for c in find(inner[0], cst.Call) if _is_method(c, "apply_overlay")]
    return len(calls) == 1 and calls[0] is not None


def _is_method(call: cst.Call, name: str) -> bool:
    return isinstance(call.func, cst.Attribute) and call.func.attr.value == name


def in_decoded_range(branch: cst.If, post: cst.SimpleStatementLine) -> cst.If:
    """The branch with pictures made before the paste and a tensor after it: post-processing comes later, elsewhere.

    Diffusers pastes only into pictures of 8 bits, so nothing is lost on the way back.
    """
    assign = cst.ensure_type(post.body[0], cst.Assign)
    call, image = cst.ensure_type(assign.value, cst.Call), assign.targets[0].target
    args = [call.args[0].with_changes(value=image), *call.args[1:]]
    before = post.with_changes(body=[assign.with_changes(value=call.with_changes(args=args))], leading_lines=[])
    holes = {"image": image, "processor": cst.ensure_type(call.func, cst.Attribute).value}
    text = "image = processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(image)))"
    after = cast(cst.BaseStatement, substitute(cst.parse_statement(text), holes))
    (paste,) = body(branch)
    return with_body(branch, [before, paste, inherit(after, paste, RULE)])
