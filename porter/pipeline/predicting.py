"""The prediction of one step as code: keyword arguments of each branch, and the engine's guided call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst

from porter.facts.pipeline import Branch, Combination, Guidance
from porter.facts.pipeline.guidance import ALWAYS
from porter.facts.pipeline.liveness import live_before, uses, writes
from porter.model import Unknown
from porter.pipeline.analysis import Analysis
from porter.pipeline.branches import branch_code
from porter.pipeline.refused import is_refused, without_refused
from porter.source.marks import Mark, inherit, mark_of
from porter.source.names import DOT
from porter.source.tree import code, expression, same, statement, substitute

RULE = "split-guidance"
_DOC = '    """The prediction of one guidance branch."""\n'


def branch_reads(guide: Guidance) -> list[cst.BaseStatement]:
    """Statements with the data flow of the prediction: what is done ahead of the calls, and what the calls read."""
    positive: list[cst.BaseExpression] = list(_kept(guide.positive).values())
    positive += [guide.positive.callee] if isinstance(guide.positive.callee, cst.Name) else []
    positive += [cst.Name(n) for n in process_reads(guide)]
    if guide.output_slice is not None:
        positive.append(guide.output_slice)
    out = [*guide.before, _binds(guide.result, positive)]
    if guide.negative is not None and guide.condition is not None and guide.combination is not None:
        negative = [*_kept(guide.negative).values(), *(cst.Name(n) for n in guide.combination.reads)]
        before = [_one_half(s) for s in guide.before_negative] if guide.again else guide.before_negative
        inner = [*before, _binds(guide.result, [*positive, *negative])]
        out.append(cst.If(guide.condition, cst.IndentedBlock(inner)))
    return out


def _one_half(node: cst.BaseStatement) -> cst.BaseStatement:
    """The data flow of a statement that cuts a variable in two: rebinding the variable itself stays in the method."""
    new = sorted(writes([node]) - uses(node))
    return _binds(new[0] if new else "_", [cst.Name(n) for n in sorted(uses(node))])


def _binds(name: str, reads: Sequence[cst.BaseExpression]) -> cst.BaseStatement:
    value = cst.Tuple([cst.Element(r) for r in reads])
    return cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(name))], value)])


def process_reads(guide: Guidance) -> list[str]:
    """Locals that the processing of one branch's result reads beside it (those of `prepare` are arguments already)."""
    if guide.prepare:
        return []
    return sorted(live_before(guide.process) - {guide.positive.result})


def _kept(branch: Branch) -> Mapping[str, cst.BaseExpression]:
    return {n: v for n, v in branch.arguments.items() if not is_refused(n, v)}


def predict_code(
    analysis: Analysis, noise: str, extras: Sequence[str]
) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement]]:
    """The body of the prediction method, and methods of the engine's mixin that it needs in another form."""
    guide = analysis.guidance
    if not isinstance(guide, Guidance):
        loop, methods = list(analysis.regions.predict[-1:]), list[cst.BaseStatement]()
        if not isinstance(analysis.branches, Unknown):
            loop, methods = branch_code(analysis.branches)
        out = [*analysis.regions.predict[:-1], *loop, *analysis.regions.guide, _with_extras(cst.Name(noise), extras)]
        return [without_refused(s) for s in out], methods
    mark = mark_of(analysis.regions.predict[-1])
    denoiser = _denoiser_entry(guide)
    context = {f'"{n}"': cst.Name(n) for n in process_reads(guide)}
    entries = {f'"{n}"': v for n, v in _kept(guide.positive).items()}
    out = [*guide.before, inherit(_assign("positive_kwargs", _dict({**denoiser[0], **context, **entries})), mark, RULE)]
    overrides = _predict_noise(guide, bool(denoiser[0]))
    if guide.negative is None or guide.condition is None or guide.combination is None:
        return [*out, _with_extras(_unguided_call(guide), extras)], overrides
    out += _negative_kwargs(guide, denoiser[1], context, mark)
    call, combine = _guided_call(guide)
    return [*out, _with_extras(call, extras)], [*overrides, *combine]


def _unguided_call(guide: Guidance) -> cst.BaseExpression:
    if guide.output_slice is None:
        return expression("self.predict_noise(**positive_kwargs)")
    text = (
        "self.predict_noise_maybe_with_cfg(False, 1.0, positive_kwargs, None, cfg_normalize=False, output_slice=bound)"
    )
    return expression(text, bound=guide.output_slice)


def _denoiser_entry(guide: Guidance) -> tuple[dict[str, cst.BaseExpression], dict[str, cst.BaseExpression]]:
    """The entry that hands each branch its denoiser, where that is not always the same component."""
    callee = guide.positive.callee
    if guide.negative is not None and not same(callee, guide.negative.callee):
        return {'"denoiser"': callee}, {'"denoiser"': guide.negative.callee}
    if isinstance(callee, cst.Name) and not guide.prepare:
        return {f'"{callee.value}"': callee}, {f'"{callee.value}"': callee}
    return {}, {}


def _predict_noise(guide: Guidance, given: bool) -> list[cst.BaseStatement]:
    """The override of the engine's `predict_noise`, if its own (`self.transformer(**kwargs)[0]`) will not do."""
    callee, result = guide.positive.callee, guide.positive.result
    if guide.prepare and guide.call is not None:
        inner = [*guide.prepare, guide.call, *guide.process, returns(cst.Name(guide.output))]
        text = f"def predict_noise(self, {', '.join(guide.positive.arguments)}):\n" + _DOC
        return [_method(text, [without_refused(s) for s in inner])]
    name = code(callee) if isinstance(callee, cst.Name) else "denoiser" if given else code(callee)
    if not guide.process and name == "self.transformer":
        return []
    parameters = "".join(f"{n}, " for n in ([name] if given else []) + process_reads(guide))
    if not guide.process:
        return [statement(f"def predict_noise(self, {parameters}**kwargs):\n{_DOC}    return {name}(**kwargs)[0]\n")]
    text = f"def predict_noise(self, {parameters}**kwargs):\n{_DOC}"
    return [
        _method(text, [statement(f"{result} = {name}(**kwargs)[0]"), *guide.process, returns(cst.Name(guide.output))])
    ]


def _method(text: str, inner: Sequence[cst.BaseStatement]) -> cst.BaseStatement:
    function = cst.ensure_type(statement(text), cst.FunctionDef)
    return function.with_changes(body=cst.IndentedBlock([*function.body.body, *inner]))  # type: ignore[arg-type]


def _negative_kwargs(
    guide: Guidance,
    denoiser: Mapping[str, cst.BaseExpression],
    context: Mapping[str, cst.BaseExpression],
    mark: Mark | None,
) -> list[cst.BaseStatement]:
    """Statements that bind `negative_kwargs`; only where guidance is on, if its values exist only then."""
    assert guide.negative is not None and guide.condition is not None
    negative, positive = _kept(guide.negative), _kept(guide.positive)
    changed = {f'"{n}"': v for n, v in negative.items() if not same(v, positive.get(n))}
    value: cst.BaseExpression = cst.BinaryOperation(
        cst.Name("positive_kwargs"), cst.BitOr(), _dict({**_changed_denoiser(guide, denoiser), **changed})
    )
    if set(negative) != set(positive):
        value = _dict({**denoiser, **context, **{f'"{n}"': v for n, v in negative.items()}})
    bind = inherit(_assign("negative_kwargs", value), mark, RULE)
    if same(guide.condition, ALWAYS):
        return [*guide.before_negative, bind]
    if not guide.before_negative and all(isinstance(v, (cst.Name, cst.Attribute)) for v in changed.values()):
        return [bind]
    inner = [*guide.before_negative, bind]
    if guide.again:
        anew = _dict({f'"{n}"': positive[n] for n in guide.again})
        update = cst.BinaryOperation(cst.Name("positive_kwargs"), cst.BitOr(), anew)
        inner.append(inherit(_assign("positive_kwargs", update), mark, RULE))
    return [statement("negative_kwargs = None"), cst.If(guide.condition, cst.IndentedBlock(inner))]


def _changed_denoiser(guide: Guidance, denoiser: Mapping[str, cst.BaseExpression]) -> Mapping[str, cst.BaseExpression]:
    assert guide.negative is not None
    return {} if same(guide.positive.callee, guide.negative.callee) else denoiser


def _guided_call(guide: Guidance) -> tuple[cst.BaseExpression, list[cst.BaseStatement]]:
    combination = guide.combination
    assert combination is not None and guide.condition is not None
    scale = combination.scale if combination.scale is not None else _scale_name(combination.reads)
    arguments = [
        code(guide.condition), code(scale), "positive_kwargs", "negative_kwargs",
        f"cfg_normalize={combination.normalize}",
    ]  # fmt: skip
    if guide.output_slice is not None:
        arguments.append(f"output_slice={code(guide.output_slice)}")
    overrides = []
    if not combination.textbook:
        extra = [n for n in combination.reads if n != code(scale)]
        if extra:
            arguments.append("kwargs={" + ", ".join(f'"{n}": {n}' for n in extra) + "}")
        overrides.append(_combine(combination, code(scale), extra))
    return cst.parse_expression(f"self.predict_noise_maybe_with_cfg({', '.join(arguments)})"), overrides


def _with_extras(value: cst.BaseExpression, extras: Sequence[str]) -> cst.SimpleStatementLine:
    if not extras:
        return returns(value)
    return returns(cst.Tuple([cst.Element(value), *(cst.Element(cst.Name(n)) for n in extras)], lpar=[], rpar=[]))


def _scale_name(reads: Sequence[str]) -> cst.BaseExpression:
    for name in reads:
        if name.endswith(("guidance_scale", "cfg_scale")):
            return cst.Name(name)
    return cst.Float("1.0")


def _combine(combination: Combination, scale: str, extra: Sequence[str]) -> cst.BaseStatement:
    text = (
        "def combine_cfg_noise(\n"
        "    self, positive_noise_pred, negative_noise_pred, true_cfg_scale, cfg_normalize=False, kwargs=None\n"
        "):\n"
        f"    {combination.positive} = positive_noise_pred[0]\n"
        f"    {combination.negative} = negative_noise_pred[0]\n"
    )
    text += "".join(f'    {n} = kwargs["{n}"]\n' for n in extra)
    holes = {scale: cst.Name("true_cfg_scale")} if scale.isidentifier() and DOT not in scale else {}
    combine = [
        without_refused(cst.ensure_type(substitute(s, holes), cst.BaseStatement)) for s in combination.statements
    ]
    return _method(text, [*combine, returns(cst.Name(combination.result))])


def _dict(entries: Mapping[str, cst.BaseExpression]) -> cst.Dict:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))  # a trailing comma: one entry a line
    return cst.Dict([cst.DictElement(cst.SimpleString(key), value, comma) for key, value in entries.items()])


def _assign(name: str, value: cst.BaseExpression) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(name))], value)])


def returns(value: cst.BaseExpression) -> cst.SimpleStatementLine:
    """`return value`."""
    return cst.SimpleStatementLine([cst.Return(value)])
