"""What the kept code of a pipeline reads on the pipeline object: components, attributes, denoiser settings."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline.members import self_reads
from porter.pipeline.analysis import Analysis
from porter.pipeline.pieces import Pieces
from porter.source.tree import find, self_attribute


def code_nodes(analysis: Analysis) -> list[cst.CSTNode]:
    return [
        *analysis.cut.encode,
        *analysis.cut.denoise,
        *analysis.tail.statements,
        *(h.node for h in analysis.helpers),
    ]


def used_components(analysis: Analysis) -> frozenset[str]:
    reads = {n for node in code_nodes(analysis) for n in self_reads(node)}
    constructor = kept_constructor(analysis)
    reads |= {n for s in constructor for n in self_reads(s)}
    return frozenset(c.name for c in analysis.components if c.name in reads)


def kept_constructor(analysis: Analysis) -> list[cst.BaseStatement]:
    """Constructor statements whose attributes the kept code reads."""
    reads = {n for node in code_nodes(analysis) for n in self_reads(node)}
    out: list[cst.BaseStatement] = []
    for each in reversed(analysis.constructor):
        written = {a for assign in find(each, cst.Assign) for t in assign.targets if (a := self_attribute(t.target))}
        if written and not written & reads:
            continue
        reads |= self_reads(each)
        out.append(each)
    return list(reversed(out))


def denoiser_reads(analysis: Analysis) -> dict[str, tuple[str, ...]]:
    """Attributes of each denoiser the pipeline reads: what the transformer port must offer."""
    found: dict[str, set[str]] = {c.name: set() for c in analysis.denoisers}
    for node in code_nodes(analysis):
        for each in find(node, cst.Attribute):
            base, path = each.value, each.attr.value
            if isinstance(base, cst.Attribute) and base.attr.value == "config":
                base, path = base.value, f"config.{path}"
            name = self_attribute(base)
            if name in found and path != "config":
                found[name].add(path)
    return {n: tuple(sorted(v)) for n, v in found.items()}


PROVIDED = frozenset({
    "od_config", "parallel_config", "device", "dtype", "scheduler_step_maybe_with_cfg", "predict_noise", "progress_bar",
    "predict_noise_maybe_with_cfg", "predict_noise_with_multi_branch_cfg", "__class__", "step_latents",
})  # fmt: skip
"""Attributes every port has: set by the shell, or methods of the engine's mixins."""


def unresolved(analysis: Analysis, cut: Pieces) -> list[str]:
    """Names `x` of `self.x` in the kept code that nothing sets."""
    constructor = kept_constructor(analysis)
    known = PROVIDED | {c.name for c in analysis.components} | {h.name for h in analysis.helpers} | analysis.kept_state
    for each in constructor:
        known |= {a for n in find(each, cst.Assign) for t in n.targets if (a := self_attribute(t.target))}
    nodes = [*code_nodes(analysis), *constructor, *cut.encode, *cut.predict, *cut.step, *cut.denoise, *cut.decode]
    names = {n for node in nodes for n in self_reads(node)} - known
    return sorted(n for n in names if analysis.members.class_statement(n) is None)


def class_statements(analysis: Analysis) -> list[cst.BaseStatement]:
    """Class attributes that the kept code reads."""
    names = sorted({n for node in [*code_nodes(analysis), *kept_constructor(analysis)] for n in self_reads(node)})
    found = [analysis.members.class_statement(n) for n in names]
    return [s for s in found if s is not None]
