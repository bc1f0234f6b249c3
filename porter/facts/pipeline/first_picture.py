"""A picture that is the first frame of a post-processed video: the frame is taken first, and post-processed alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import libcst as cst

from porter.facts.pipeline.liveness import uses
from porter.source.names import absolute
from porter.source.tree import expression, find, replace_nodes, same, statement

_PICKED = f"""
if isinstance(video, {absolute("torch.Tensor")}):
    image = {absolute("torch.stack")}(image)
elif isinstance(video, {absolute("numpy.ndarray")}):
    image = {absolute("numpy.stack")}(image)
"""


def first_pictures(statements: Sequence[cst.BaseStatement], image: cst.BaseExpression) -> list[cst.BaseStatement]:
    """The statements, with `image` post-processed as a picture instead of taken out of a post-processed video.

    A video is post-processed frame by frame, so the order makes no difference. Statements of another form stay as
    they are.
    """
    edits: list[tuple[cst.CSTNode, object]] = []
    for block in [b for s in statements for b in find(s, cst.IndentedBlock)]:
        for place, (picks, stacks) in enumerate(pairwise(block.body)):
            video = _video(picks, stacks, image)
            if video is None or any(video.value in uses(s) for s in block.body[place + 2 :]):
                continue
            lines = [n for s in block.body[:place] for n in find(s, cst.SimpleStatementLine)]
            edits += [(n, _as_picture(n, image)) for n in lines if _makes_video(n, video)]
            edits += [(picks, cst.RemoveFromParent()), (stacks, cst.RemoveFromParent())]
    return [replace_nodes(s, edits) for s in statements]


def _video(picks: cst.CSTNode, stacks: cst.CSTNode, image: cst.BaseExpression) -> cst.Name | None:
    """`video` of `image = [batch[0] for batch in video]` and the statement that stacks arrays of one."""
    for comprehension in find(picks, cst.ListComp):
        video, batch = comprehension.for_in.iter, comprehension.for_in.target
        if not isinstance(video, cst.Name):
            continue
        picked = statement("image = [batch[0] for batch in video]", image=image, video=video, batch=batch)
        if same(picks, picked) and same(stacks, statement(_PICKED, image=image, video=video)):
            return video
    return None


def _makes_video(line: cst.SimpleStatementLine, video: cst.Name) -> bool:
    """`video = self.<processor>.postprocess_video(<tensor>, output_type=output_type)`."""
    assign = line.body[0]
    if not isinstance(assign, cst.Assign) or not same(assign.targets[0].target, video):
        return False
    call = assign.value
    if not isinstance(call, cst.Call) or not isinstance(call.func, cst.Attribute) or not call.args:
        return False
    wanted = expression("f(x, output_type=output_type)", f=call.func, x=call.args[0].value)
    return call.func.attr.value == "postprocess_video" and same(call, wanted)


def _as_picture(line: cst.SimpleStatementLine, image: cst.BaseExpression) -> cst.SimpleStatementLine:
    """`image = self.<processor>.postprocess(<tensor>[:, :, 0], output_type=output_type)`."""
    assign = cst.ensure_type(line.body[0], cst.Assign)
    call = cst.ensure_type(assign.value, cst.Call)
    func = cst.ensure_type(call.func, cst.Attribute).with_changes(attr=cst.Name("postprocess"))
    frame = call.args[0].with_changes(value=expression("video[:, :, 0]", video=call.args[0].value))
    new = call.with_changes(func=func, args=[frame, *call.args[1:]])
    return line.with_changes(
        body=[assign.with_changes(targets=[assign.targets[0].with_changes(target=image)], value=new)]
    )
