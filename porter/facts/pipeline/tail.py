"""The end of `__call__`: what is returned, and how it is post-processed before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import libcst as cst

from porter.facts.pipeline.liveness import uses
from porter.model import Unknown
from porter.source.marks import inherit
from porter.source.names import referenced
from porter.source.tree import body, find, replace_nodes, self_attribute, substitute, with_body

RULE = "paste-before-post-processing"
"""Name under which the line map explains the statements around a paste."""


@dataclass(frozen=True, slots=True)
class PostProcess:
    """`self.<processor>.<method>(value, output_type=output_type, **options)`."""

    processor: str
    method: str
    options: tuple[tuple[str, cst.BaseExpression], ...]


@dataclass(frozen=True, slots=True)
class Tail:
    """`statements` compute `result` without post-processing; `output` is the class Diffusers returns."""

    statements: tuple[cst.BaseStatement, ...]
    result: cst.BaseExpression
    field: str
    output: str | None
    post_process: PostProcess | None


def tail(statements: Sequence[cst.BaseStatement]) -> Tail | Unknown:
    """Analyse the (cleaned) decode region."""
    if not statements or not isinstance(statements[-1], cst.SimpleStatementLine):
        return Unknown("__call__ does not end with a return statement")
    last = statements[-1].body[-1]
    if not isinstance(last, cst.Return) or not isinstance(last.value, cst.Call):
        return Unknown("__call__ does not return an output object")
    given = [a for a in last.value.args if not (isinstance(a.value, cst.Name) and a.value.value == "None")]
    if len(given) != 1:
        return Unknown(f"the output object holds {len(given)} values")
    rest = list(statements[:-1])
    calls = [(s, c) for s in rest for c in find(s, cst.SimpleStatementLine) if _post_process(c) is not None]
    if len(calls) > 1:
        return Unknown("the output is post-processed in more than one place")
    post_process = None
    if calls:
        owner, statement = calls[0]
        post_process = _post_process(statement)
        assert isinstance(statement.body[0], cst.Assign)
        overlays = [s for each in rest for s in find(each, cst.If) if _pastes_crop(s, statement)]
        later = [*rest[rest.index(owner) + 1 :], *_after(owner, statement)]
        if any(_reads_result(s, statement) for s in later if s not in overlays):
            return Unknown("the post-processed output is used again")
        for overlay in overlays:
            rest = [replace_nodes(s, [(overlay, _in_decoded_range(overlay, statement))]) for s in rest]
        owner = next(s for s in rest if s is owner or any(n is statement for n in find(s, cst.SimpleStatementLine)))
        rest[rest.index(owner)] = _without(owner, statement)
        rest = [s for s in rest if s is not None]
    field = given[0].keyword.value if given[0].keyword is not None else ""
    return Tail(tuple(rest), given[0].value, field, referenced(last.value.func), post_process)


def _after(owner: cst.BaseStatement, statement: cst.SimpleStatementLine) -> list[cst.BaseStatement]:
    """Statements that follow `statement` in its own block."""
    for block in find(owner, cst.IndentedBlock):
        if statement in block.body:
            return [s for s in block.body[list(block.body).index(statement) + 1 :] if isinstance(s, cst.BaseStatement)]
    return []


def _pastes_crop(branch: cst.If, post: cst.SimpleStatementLine) -> bool:
    """`if ...: image = [self.<processor>.apply_overlay(..., i, ...) for i in image]`, without else."""
    inner = body(branch)
    if branch.orelse is not None or len(inner) != 1 or not _reads_result(inner[0], post):
        return False
    calls = [self_attribute(c.func.value) for c in find(inner[0], cst.Call) if _is_method(c, "apply_overlay")]
    return len(calls) == 1 and calls[0] is not None


def _is_method(call: cst.Call, name: str) -> bool:
    return isinstance(call.func, cst.Attribute) and call.func.attr.value == name


def _in_decoded_range(branch: cst.If, post: cst.SimpleStatementLine) -> cst.If:
    """The branch with pictures made before the paste and a tensor after it: post-processing comes later, elsewhere.

    Diffusers pastes only into pictures of 8 bits, so nothing is lost on the way back.
    """
    assign = cst.ensure_type(post.body[0], cst.Assign)
    call, image = cst.ensure_type(assign.value, cst.Call), assign.targets[0].target
    pil = cst.SimpleString('"pil"')
    args = [a.with_changes(value=pil) if a.keyword and a.keyword.value == "output_type" else a for a in call.args]
    args[0] = args[0].with_changes(value=image)
    before = post.with_changes(body=[assign.with_changes(value=call.with_changes(args=args))], leading_lines=[])
    holes = {"image": image, "processor": cst.ensure_type(call.func, cst.Attribute).value}
    text = "image = processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(image)))"
    after = cast(cst.BaseStatement, substitute(cst.parse_statement(text), holes))
    (paste,) = body(branch)
    return with_body(branch, [before, paste, inherit(after, paste, RULE)])


def _reads_result(statement: cst.BaseStatement, post: cst.SimpleStatementLine) -> bool:
    assign = post.body[0]
    assert isinstance(assign, cst.Assign)
    target = assign.targets[0].target
    return isinstance(target, cst.Name) and target.value in uses(statement)


def _post_process(statement: cst.SimpleStatementLine) -> PostProcess | None:
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or not isinstance(assign.value, cst.Call):
        return None
    func = assign.value.func
    if not isinstance(func, cst.Attribute) or not func.attr.value.startswith("postprocess"):
        return None
    processor = self_attribute(func.value)
    if processor is None:
        return None
    options = tuple(
        (a.keyword.value, a.value) for a in assign.value.args if a.keyword and a.keyword.value != "output_type"
    )
    return PostProcess(processor, func.attr.value, options)


def _without(owner: cst.BaseStatement, statement: cst.SimpleStatementLine) -> cst.BaseStatement | None:
    """`owner` with the post-processing replaced by a plain assignment, or without it if that changes nothing."""
    assign = statement.body[0]
    assert isinstance(assign, cst.Assign) and isinstance(assign.value, cst.Call)
    value, target = assign.value.args[0].value, assign.targets[0].target
    if isinstance(value, cst.Name) and isinstance(target, cst.Name) and value.value == target.value:
        return None if owner is statement else replace_nodes(owner, [(statement, cst.RemoveFromParent())])
    new = statement.with_changes(body=[assign.with_changes(value=value)])
    return new if owner is statement else replace_nodes(owner, [(statement, new)])
