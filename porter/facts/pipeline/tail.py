"""The end of `__call__`: what is returned, and how it is post-processed before that."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.pipeline.first_picture import first_pictures
from porter.facts.pipeline.grouped_pictures import grouping
from porter.facts.pipeline.liveness import uses
from porter.facts.pipeline.pasting import in_decoded_range, pastes_crop
from porter.model import Unknown
from porter.source.names import referenced
from porter.source.tree import body, code, expression, find, normal, replace_nodes, same, self_attribute

_VALUE = frozenset({"image", "video", "latents"})
"""Names under which the processors' methods take what they process."""

_MEDIA = frozenset({"images", "frames", "video", "videos", "audio", "audios"})

_NOTES = frozenset({"revised_prompts", "nsfw_content_detected"})
"""Fields that tell about the call and are no media: the engine's output has no place for them."""


class PostProcess(Struct, frozen=True):
    """`self.<processor>.<method>(value, output_type=output_type, **options)`.

    `processor` is None for `if output_type == "np": x = x.cpu().float().numpy()`. `grouped`: the value is a list of such
    tensors.
    """

    processor: str | None
    method: str
    options: tuple[tuple[str, cst.BaseExpression], ...] = ()
    grouped: bool = False


class Value(Struct, frozen=True):
    """One value of the output object: the field that holds it, the expression, and its post-processing."""

    field: str
    expression: cst.BaseExpression
    post_process: PostProcess | None = None


class Tail(Struct, frozen=True):
    """`statements` compute `values` without post-processing; `output` is the class Diffusers returns."""

    statements: tuple[cst.BaseStatement, ...]
    values: tuple[Value, ...]
    output: str | None

    @property
    def result(self) -> cst.BaseExpression:
        """The value, or a tuple of them."""
        return _joined([v.expression for v in self.values])

    @property
    def post_process(self) -> PostProcess | None:
        """Post-processing of the first value."""
        return self.values[0].post_process


def tail(statements: Sequence[cst.BaseStatement]) -> Tail | Unknown:
    """Analyse the (cleaned) decode region. Statements that lose their purpose with the post-processing become `pass`."""
    if not statements or not isinstance(statements[-1], cst.SimpleStatementLine):
        return Unknown("__call__ does not end with a return statement")
    last = statements[-1].body[-1]
    if not isinstance(last, cst.Return) or not isinstance(last.value, cst.Call):
        return Unknown("__call__ does not return an output object")
    given = [(f, v) for f, v in _fields(last.value) if f not in _NOTES]
    if not given:
        return Unknown("the output object holds nothing")
    if other := [f for f, _ in given[1:] if not _MEDIA & set(f.split("_"))]:
        return Unknown(f"the output object also holds {', '.join(other)}")
    output = referenced(last.value.func)
    rest = [_plain_returns(s, output) for s in statements[:-1]]
    values = []
    for field, value in given:
        rest = first_pictures(rest, value)
        pictures, loop = grouping(rest, value) or (value, None)
        found = _take_post_process(rest, pictures, loop)
        if isinstance(found, Unknown):
            return found
        rest, post_process = found
        if post_process is not None and loop is not None:
            post_process = replace(post_process, grouped=True)
        values.append(Value(field, value, post_process))
    return Tail(tuple(rest), tuple(values), output)


def _fields(call: cst.Call) -> list[tuple[str, cst.BaseExpression]]:
    """Fields of the output object and their values, without those that are None."""
    return [
        (a.keyword.value if a.keyword is not None else "", a.value)
        for a in call.args
        if not (isinstance(a.value, cst.Name) and a.value.value == "None")
    ]


def _joined(values: Sequence[cst.BaseExpression]) -> cst.BaseExpression:
    return values[0] if len(values) == 1 else cst.Tuple([cst.Element(v) for v in values], lpar=[], rpar=[])


def _plain_returns(statement: cst.BaseStatement, output: str | None) -> cst.BaseStatement:
    """A statement whose early returns give the bare values."""
    edits: list[tuple[cst.CSTNode, object]] = []
    for node in find(statement, cst.Return):
        if isinstance(node.value, cst.Call) and output is not None and referenced(node.value.func) == output:
            edits.append((node.value, _joined([v for _, v in _fields(node.value)])))
    return replace_nodes(statement, edits)


def _take_post_process(
    statements: Sequence[cst.BaseStatement], value: cst.BaseExpression, grouping: cst.For | None
) -> tuple[list[cst.BaseStatement], PostProcess | None] | Unknown:
    """The statements without the post-processing of `value`, and what it was. Only `grouping` may read it after that."""
    kinds: list[PostProcess] = []
    edits: list[tuple[cst.CSTNode, object]] = []
    for node in [n for s in statements for n in find(s, cst.SimpleStatementLine, cst.If)]:
        found, new = _numpy(node) if isinstance(node, cst.If) else _processor(node)
        if found is None or not same(_target(node), value):
            continue
        kinds.append(found)
        edits.append((node, new))
        later = [s for s in _following(statements, node) if isinstance(value, cst.Name) and value.value in uses(s)]
        later = [s for s in later if s is not grouping]
        pastes = [s for s in later if isinstance(s, cst.If) and pastes_crop(s, code(value))]
        if len(pastes) < len(later):
            return Unknown("the post-processed output is used again")
        edits += [(p, in_decoded_range(p, cst.ensure_type(node, cst.SimpleStatementLine))) for p in pastes]
    if any(not _alike(kinds[0], k) for k in kinds[1:]):
        return Unknown("the output is post-processed in different ways")
    return [replace_nodes(s, edits) for s in statements], kinds[0] if kinds else None


def _following(statements: Sequence[cst.BaseStatement], node: cst.CSTNode) -> list[cst.BaseStatement]:
    """Statements that run after `node`: in its own block, and at the top level."""
    found: list[cst.BaseStatement] = []
    owner = next(i for i, s in enumerate(statements) if s is node or any(n is node for n in find(s, type(node))))
    for block in find(statements[owner], cst.IndentedBlock):
        places = [i for i, s in enumerate(block.body) if s is node]
        found += [s for i in places for s in block.body[i + 1 :] if isinstance(s, cst.BaseStatement)]
    return [*found, *statements[owner + 1 :]]


def _alike(left: PostProcess, right: PostProcess) -> bool:
    options = [[(n, normal(v)) for n, v in p.options] for p in (left, right)]
    return (left.processor, left.method) == (right.processor, right.method) and options[0] == options[1]


def _target(node: cst.SimpleStatementLine | cst.If) -> cst.BaseExpression | None:
    """What the (only) assignment of a statement binds."""
    inner = body(node)[0] if isinstance(node, cst.If) else node
    first = inner.body[0] if isinstance(inner, cst.SimpleStatementLine) else None
    return first.targets[0].target if isinstance(first, cst.Assign) else None


def _processor(statement: cst.SimpleStatementLine) -> tuple[PostProcess | None, object]:
    """`x = self.processor.postprocess*(value, output_type=output_type)`, and what stands for it without it."""
    assign = statement.body[0]
    if not isinstance(assign, cst.Assign) or not isinstance(assign.value, cst.Call) or not assign.value.args:
        return None, None
    call = assign.value
    if not isinstance(call.func, cst.Attribute) or not call.func.attr.value.startswith("postprocess"):
        return None, None
    processor = self_attribute(call.func.value)
    given = {a.keyword.value: a.value for a in call.args if a.keyword}
    wanted, normalized = given.pop("output_type", None), given.pop("do_denormalize", None)
    if processor is None or not (isinstance(wanted, cst.Name) and wanted.value == "output_type"):
        return None, None
    options = tuple((n, v) for n, v in given.items() if n not in _VALUE)
    value, target = call.args[0].value, assign.targets[0].target
    above = list(statement.leading_lines)
    if normalized is not None:
        value = _normalized(value, normalized)
        above.append(
            cst.EmptyLine(comment=cst.Comment("# Post-processing will take every picture for a normalized one."))
        )
    plain = cst.Pass() if same(value, target) else assign.with_changes(value=value)
    new = statement.with_changes(body=[plain], leading_lines=above)
    return PostProcess(processor, call.func.attr.value, options), new


def _normalized(pictures: cst.BaseExpression, normalized: cst.BaseExpression) -> cst.BaseExpression:
    """Pictures of which post-processing may denormalize each: those that are not normalized (a checker blacked them out)
    become so."""
    text = "torch·stack([one if normalized else 2 * one - 1 for one, normalized in zip(pictures, flags)])"
    return expression(text, pictures=pictures, flags=normalized)


def _numpy(statement: cst.If) -> tuple[PostProcess | None, object]:
    """`if output_type == "np": x = x.cpu().float().numpy()`."""
    target = _target(statement)
    if statement.orelse is not None or len(body(statement)) != 1 or not isinstance(target, cst.Name):
        return None, None
    if normal(statement.test) != normal(cst.parse_expression('output_type == "np"')):
        return None, None
    assign = body(statement)[0]
    wanted = cst.parse_statement(f"{target.value} = {target.value}.cpu().float().numpy()")
    return (
        (PostProcess(None, "numpy"), assign.with_changes(body=[cst.Pass()])) if same(assign, wanted) else (None, None)
    )
