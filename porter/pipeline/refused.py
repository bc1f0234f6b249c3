"""Arguments of a denoiser that a port does not pass on."""

from __future__ import annotations

import libcst as cst

from porter.source.tree import same, transform

REFUSED_ARGUMENTS = frozenset({"return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"})


def is_refused(name: str, value: cst.BaseExpression) -> bool:
    """Whether an argument is one a request can't give, and nothing else fills it."""
    return name == "return_dict" or (name in REFUSED_ARGUMENTS and same(value, cst.Name("None")))


def without_refused(node: cst.BaseStatement) -> cst.BaseStatement:
    """The statement with calls that pass no argument a port's denoiser does not take."""
    return transform(node, {cst.Call: _call_without_refused})


def _call_without_refused(original: cst.Call, updated: cst.Call) -> cst.Call:
    kept = [
        a
        for a in updated.args
        if a.keyword is None or a.star or a.keyword.value == "return_dict" or not is_refused(a.keyword.value, a.value)
    ]
    return updated.with_changes(args=kept) if len(kept) != len(updated.args) else updated
