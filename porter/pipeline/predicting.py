"""The prediction of one step as code: keyword arguments of each branch, and the engine's guided call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst

from porter.facts.pipeline import Branch, Guidance
from porter.pipeline.analysis import Analysis
from porter.source.marks import inherit, mark_of
from porter.source.names import DOT
from porter.source.tree import code, expression, same, self_attribute, statement, substitute

REFUSED_ARGUMENTS = frozenset({"return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"})


def branch_reads(guide: Guidance) -> list[cst.BaseStatement]:
    """Statements ahead of the calls plus one that binds the prediction from everything the calls read."""
    return [*guide.before, *guide.before_negative, *call_reads(guide)]


def call_reads(guide: Guidance) -> list[cst.BaseStatement]:
    reads: list[cst.BaseExpression] = list(_kept(guide.positive).values())
    reads += [guide.positive.callee] if isinstance(guide.positive.callee, cst.Name) else []
    if guide.negative is not None and guide.condition is not None and guide.combination is not None:
        reads += [*_kept(guide.negative).values(), guide.condition]
        reads += [cst.Name(n) for n in guide.combination.reads]
    if guide.output_slice is not None:
        reads.append(guide.output_slice)
    value = cst.Tuple([cst.Element(r) for r in reads])
    return [cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(guide.positive.result))], value)])]


def _kept(branch: Branch) -> Mapping[str, cst.BaseExpression]:
    return {n: v for n, v in branch.arguments.items() if n not in REFUSED_ARGUMENTS}


def predict_code(
    analysis: Analysis, noise: str, extras: Sequence[str]
) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement]]:
    guide = analysis.guidance
    if not isinstance(guide, Guidance):
        out = [*analysis.regions.predict, *analysis.regions.guide, _with_extras(cst.Name(noise), extras)]
        return [without_refused(s) for s in out], []
    mark = mark_of(analysis.regions.predict[-1])
    alias = guide.positive.callee if isinstance(guide.positive.callee, cst.Name) else None
    out = list(guide.before)
    entries = {f'"{n}"': v for n, v in _kept(guide.positive).items()}
    if alias is not None:
        entries = {f'"{alias.value}"': alias, **entries}
    out.append(inherit(_assign("positive_kwargs", _dict(entries)), mark, "split-guidance"))
    overrides: list[cst.BaseStatement] = []
    component = self_attribute(guide.positive.callee)
    if alias is not None:
        overrides.append(
            statement(
                f"def predict_noise(self, {alias.value}, **kwargs):\n"
                f'    """The prediction of the denoiser in charge of this timestep."""\n'
                f"    return {alias.value}(**kwargs)[0]\n"
            )
        )
    elif component != "transformer":
        overrides.append(statement(f"def predict_noise(self, **kwargs):\n    return self.{component}(**kwargs)[0]\n"))
    if guide.negative is None or guide.condition is None or guide.combination is None:
        text = "predict_noise_maybe_with_cfg(False, 1.0, positive_kwargs, None, cfg_normalize=False)"
        value = expression("self.predict_noise(**positive_kwargs)") if guide.output_slice is None else None
        if value is None:
            value = expression(f"self.{text[:-1]}, output_slice=bound)", bound=guide.output_slice)
        return [*out, _with_extras(value, extras)], overrides
    if guide.before_negative:
        out.append(cst.If(guide.condition, cst.IndentedBlock(list(guide.before_negative))))
    changed = {f'"{n}"': v for n, v in _kept(guide.negative).items() if not same(v, guide.positive.arguments.get(n))}
    value = cst.BinaryOperation(cst.Name("positive_kwargs"), cst.BitOr(), _dict(changed))
    negative = _kept(guide.negative)
    if set(negative) != set(_kept(guide.positive)):
        full = {f'"{n}"': v for n, v in negative.items()}
        value = _dict({f'"{alias.value}"': alias, **full} if alias is not None else full)  # type: ignore[assignment]
    out.append(inherit(_assign("negative_kwargs", value), mark, "split-guidance"))
    combination = guide.combination
    scale = combination.scale if combination.scale is not None else _scale_name(combination.reads)
    arguments = [
        f"{code(_bare(guide.condition))}", f"{code(scale)}", "positive_kwargs", "negative_kwargs",
        f"cfg_normalize={combination.normalize}",
    ]  # fmt: skip
    if guide.output_slice is not None:
        arguments.append(f"output_slice={code(guide.output_slice)}")
    if not combination.textbook:
        extra = [n for n in combination.reads if n != code(scale)]
        if extra:
            arguments.append("kwargs={" + ", ".join(f'"{n}": {n}' for n in extra) + "}")
        overrides.append(_combine(guide, code(scale), extra))
    call = cst.parse_expression(f"self.predict_noise_maybe_with_cfg({', '.join(arguments)})")
    return [*out, _with_extras(call, extras)], overrides


def _with_extras(value: cst.BaseExpression, extras: Sequence[str]) -> cst.SimpleStatementLine:
    if not extras:
        return returns(value)
    return returns(cst.Tuple([cst.Element(value), *(cst.Element(cst.Name(n)) for n in extras)], lpar=[], rpar=[]))


def _bare(node: cst.BaseExpression) -> cst.BaseExpression:
    return node


def _scale_name(reads: Sequence[str]) -> cst.BaseExpression:
    for name in reads:
        if name.endswith(("guidance_scale", "cfg_scale")):
            return cst.Name(name)
    return cst.Float("1.0")


def _combine(guide: Guidance, scale: str, extra: Sequence[str]) -> cst.BaseStatement:
    assert guide.combination is not None and guide.negative is not None
    text = (
        "def combine_cfg_noise(\n"
        "    self, positive_noise_pred, negative_noise_pred, true_cfg_scale, cfg_normalize=False, kwargs=None\n"
        "):\n"
        f"    {guide.positive.result} = positive_noise_pred[0]\n"
        f"    {guide.negative.result} = negative_noise_pred[0]\n"
    )
    text += "".join(f'    {n} = kwargs["{n}"]\n' for n in extra)
    function = cst.ensure_type(statement(text), cst.FunctionDef)
    holes = {scale: cst.Name("true_cfg_scale")} if scale.isidentifier() and DOT not in scale else {}
    combine = [substitute(s, holes) for s in guide.combination.statements]
    inner = [*function.body.body, *combine, returns(cst.Name(guide.combination.result))]
    return function.with_changes(body=cst.IndentedBlock(inner))  # type: ignore[arg-type]


def _dict(entries: Mapping[str, cst.BaseExpression]) -> cst.Dict:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))  # a trailing comma: one entry a line
    return cst.Dict([cst.DictElement(cst.SimpleString(key), value, comma) for key, value in entries.items()])


def _assign(name: str, value: cst.BaseExpression) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(name))], value)])


class _Refused(cst.CSTTransformer):
    def leave_Call(self, original: cst.Call, updated: cst.Call) -> cst.Call:
        kept = [
            a
            for a in updated.args
            if a.keyword is None or a.keyword.value not in REFUSED_ARGUMENTS - {"return_dict"} or a.star
        ]
        return updated.with_changes(args=kept) if len(kept) != len(updated.args) else updated


def without_refused(node: cst.BaseStatement) -> cst.BaseStatement:
    """The statement with calls that pass no argument a port's denoiser does not take."""
    return node.visit(_Refused())  # type: ignore[return-value]


def returns(value: cst.BaseExpression) -> cst.SimpleStatementLine:
    """`return value`."""
    return cst.SimpleStatementLine([cst.Return(value)])
