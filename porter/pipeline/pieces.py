"""The pieces of a generated pipeline, from its regions: inputs and outputs of each, and the code of predict and step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline import Guidance
from porter.facts.pipeline.feasible import carried_unbound
from porter.facts.pipeline.liveness import always_writes, changed, live_before, uses, writes
from porter.facts.pipeline.members import self_reads
from porter.model import Unknown
from porter.pipeline.analysis import Analysis, step_call
from porter.pipeline.own_scheduler import SCHEDULER
from porter.pipeline.predicting import branch_reads, predict_code, returns
from porter.pipeline.stepping import plain_step, step_code
from porter.source.marks import inherit
from porter.source.tree import code, find, statement


class Pieces(Struct, frozen=True, dict=True):
    """Code and data flow between the generated methods. Names are in a stable, readable order."""

    encode: tuple[cst.BaseStatement, ...]
    predict: tuple[cst.BaseStatement, ...]
    overrides: tuple[cst.BaseStatement, ...]
    step: tuple[cst.BaseStatement, ...]
    step_scheduler: tuple[cst.BaseStatement, ...]
    decode: tuple[cst.BaseStatement, ...]
    noise: str
    extras: tuple[str, ...]
    carried: tuple[str, ...]
    returned: tuple[str, ...]
    loop_inputs: tuple[str, ...]
    predict_inputs: tuple[str, ...]
    decode_inputs: tuple[str, ...]
    step_inputs: tuple[str, ...]
    splits: bool
    sample: str | None
    stepwise: Unknown | None
    denoise: tuple[cst.BaseStatement, ...] = ()

    @property
    def decode_signature(self) -> tuple[str, ...]:
        return (*self.returned, *self.decode_inputs)


def pieces(analysis: Analysis) -> Pieces | Unknown:
    """Cut the pieces; Unknown if the loop hands more than one value from its prediction to its step."""
    cut, loop = analysis.regions, analysis.regions.loop
    loop_names = {n for n in (loop.index, loop.timestep) if n} | {SCHEDULER} - bound_before(analysis)
    decode, result = analysis.tail.statements, analysis.tail.result
    after_loop = live_before([*decode, returns(result)])
    guide = analysis.guidance
    moved = guide.after if isinstance(guide, Guidance) else ()
    step = (*moved, *cut.step)
    head = branch_reads(guide) if isinstance(guide, Guidance) else [*cut.predict, *cut.guide]
    whole = [*head, *step]
    written = writes(whole) | changed(step)
    top = _from_before(analysis, whole, after_loop) - loop_names
    carried = ordered(written & (top | (after_loop & written)), cut.step)
    after_loop &= written | bound_before(analysis)
    before_step = live_before(step, after_loop | top)
    handed = (before_step & writes(head)) - loop_names
    noise = step_noise(analysis)
    if noise is None:
        return Unknown("the scheduler steps with an expression")
    extras = [n for n in ordered(handed, step) if n != noise]
    returned = [n for n in carried if n in after_loop]
    if len(returned) != 1:
        return Unknown(f"the loop hands {', '.join(returned) or 'nothing'} to the end of the call")
    predict_live = live_before(head, [noise, *extras])
    read = {n for each in whole for n in uses(each)}
    inputs = [n for n in ordered(top | loop_names, whole) if n in predict_live]
    reads = {n for each in step for n in uses(each)}
    step_inputs = [n for n in ordered(before_step & reads, step) if n not in (noise, *extras)]
    entering = [n for n in carried if n in top or n in bound_before(analysis)]
    sample = _sample(carried, returned, step)
    loop_inputs = [*entering, "timesteps", *[n for n in ordered(top & read, whole) if n not in (*carried, "timesteps")]]
    decode_inputs = [n for n in ordered(after_loop, decode) if n != returned[0]]
    loop_timesteps = [statement("timesteps = value", value=loop.iterable)] if code(loop.iterable) != "timesteps" else []
    encode = initialise([*cut.encode, *loop_timesteps], analysis, [*loop_inputs, *decode_inputs])
    predict, overrides = predict_code(analysis, noise, extras)
    simple = plain_step(step, step_call(cut), noise, loop.timestep, returned[0])
    steps, scheduler_code, more = step_code(
        step,
        simple,
        analysis,
        noise,
        [n for n in extras if n in reads],
        _stepped(carried, step, returned[0]),
        step_inputs,
        sample,
    )
    stepwise = _stepwise(analysis, sample)
    return Pieces(
        tuple(encode), tuple(predict), (*overrides, *more), tuple(steps), tuple(scheduler_code), tuple(decode), noise,
        tuple(extras), tuple(carried), tuple(returned), tuple(loop_inputs), tuple(inputs), tuple(decode_inputs),
        tuple(step_inputs), isinstance(guide, Guidance), sample, stepwise,
    )  # fmt: skip


def _stepped(carried: Sequence[str], step: Sequence[cst.BaseStatement], latents: str) -> list[str]:
    """Carried names that the step region sets, the latents first; the prediction hands over the others."""
    return [latents, *(n for n in carried if n != latents and n in changed(step))]


def _sample(carried: Sequence[str], returned: Sequence[str], step: Sequence[cst.BaseStatement]) -> str | None:
    """The variable that the scheduler moves: what its call reads as the sample, and sets."""
    moved = [n for n in carried if n in changed(step)]
    return next((n for n in ("latents", *returned) if n in moved), None)


def _from_before(analysis: Analysis, loop: Sequence[cst.BaseStatement], after: frozenset[str]) -> set[str]:
    """Names that one round of the loop takes from the round before it, or the first one from the encode region."""
    found = set(live_before(loop, after | live_before(loop)))
    unbound = found - bound_before(analysis)
    return found - unbound | carried_unbound(loop, after, unbound) if unbound else found


def bound_before(analysis: Analysis) -> frozenset[str]:
    """Names that something ahead of the loop may bind."""
    return writes(analysis.cut.encode) | {p.name.value for p in analysis.arguments}


def _stepwise(analysis: Analysis, sample: str | None) -> Unknown | None:
    """Why the engine's step execution can't run the loop; None if it can."""
    if sample is None:
        return Unknown("the loop carries no tensor from one scheduler step to the next")
    helpers = {h.name: h.node for h in analysis.helpers}
    pending = [n for each in (*analysis.regions.predict, *analysis.regions.guide, *analysis.regions.step)
               for n in self_reads(each)]  # fmt: skip
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in analysis.kept_state:
            return Unknown(f"the loop reads self.{name}, which belongs to one call")
        if name in helpers and name not in seen:
            seen.add(name)
            pending += self_reads(helpers[name])
    return None


def ordered(names: Iterable[str], where: Sequence[cst.BaseStatement]) -> list[str]:
    """Names in the order in which the statements mention them."""
    wanted = set(names)
    seen: dict[str, None] = {}
    for each in where:
        for node in find(each, cst.Name):
            if node.value in wanted:
                seen.setdefault(node.value)
    return [*seen, *sorted(wanted - set(seen))]


def step_noise(analysis: Analysis) -> str | None:
    """The variable that the scheduler steps with."""
    call = step_call(analysis.regions)
    if call is None:
        return None
    value = call.args[0].value
    for arg in call.args:
        if arg.keyword is not None and arg.keyword.value == "model_output":
            value = arg.value
    guide = analysis.guidance
    if isinstance(guide, Guidance):
        return guide.result
    if isinstance(value, cst.Name):
        return value.value
    made = uses(value) & writes([*analysis.regions.predict, *analysis.regions.guide])
    return next(iter(made)) if len(made) == 1 else None


def initialise(
    statements: Sequence[cst.BaseStatement], analysis: Analysis, wanted: Sequence[str]
) -> list[cst.BaseStatement]:
    """The encode region, with `x = None` ahead of variables that only some paths bind."""
    out = list(statements)
    bound = {p.name.value for p in analysis.arguments} | always_writes(out)
    for name in [n for n in wanted if n not in bound and n in writes(out)]:
        place = next(i for i, s in enumerate(out) if name in writes([s]))
        following = out[place]
        new = inherit(statement(f"{name} = None"), following, "initialise-optional")
        out[place : place + 1] = [
            new.with_changes(leading_lines=following.leading_lines),  # type: ignore[attr-defined]
            following.with_changes(leading_lines=[]),
        ]
    return out
