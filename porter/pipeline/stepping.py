"""The scheduler step as code: the engine's own step where the source does just that, else a method of the port."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from porter.facts.pipeline import Guidance
from porter.facts.pipeline.liveness import writes
from porter.pipeline.analysis import Analysis
from porter.pipeline.own_scheduler import SCHEDULER, scheduler_name
from porter.pipeline.predicting import returns
from porter.source.marks import inherit
from porter.source.tree import code, same, statement, transform


def plain_step(
    step: Sequence[cst.BaseStatement], call: cst.Call | None, noise: str, t: str, latents: str
) -> cst.BaseExpression | None:
    """The generator argument ("None" if there is none) of a step that is exactly the engine's own."""
    if len(step) != 1 or call is None:
        return None
    for generator in (None, "generator"):
        extra = f", generator={generator}" if generator else ""
        for order in (f"{extra}, return_dict=False", f", return_dict=False{extra}"):
            text = f"{latents} = self.scheduler.step({noise}, {t}, {latents}{order})[0]"
            if same(step[0], statement(text)):
                return cst.Name(generator or "None")
    return None


def step_code(
    step: Sequence[cst.BaseStatement],
    plain: cst.BaseExpression | None,
    analysis: Analysis,
    noise: str,
    extras: Sequence[str],
    carried: Sequence[str],
    inputs: Sequence[str],
    sample: str | None,
) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement], list[cst.BaseStatement]]:
    t, index, latents = analysis.regions.loop.timestep, analysis.regions.loop.index, carried[0]
    do_cfg = _condition(analysis, inputs)
    if plain is not None:
        generator = code(plain)
        more = ", generator=generator" if generator != "None" else ""
        new = statement(
            f"{latents} = self.scheduler_step_maybe_with_cfg({noise}, {t}, {latents}, do_true_cfg={do_cfg}{more})"
        )
        new = inherit(new, step[0], "scheduler-step").with_changes(leading_lines=step[0].leading_lines)
        sampler = ", generator=state.sampling.generator" if more else ""
        state = statement(
            f"state.latents = self.scheduler_step_maybe_with_cfg(noise_pred, state.current_timestep, state.latents, "
            f"do_true_cfg=False, per_request_scheduler=state.scheduler{sampler})"
        )
        return [new], [state], []
    given = [n for n in dict.fromkeys([noise, *extras, t, *inputs]) if n != SCHEDULER]
    results = [cst.Name(n) for n in carried]
    function = cst.ensure_type(
        statement(f"def step_latents(self, scheduler, {', '.join(given)}):\n    pass\n"), cst.FunctionDef
    )
    value = results[0] if len(results) == 1 else cst.Tuple([cst.Element(r) for r in results], lpar=[], rpar=[])
    inner = [*(transform(s, {cst.Attribute: scheduler_name}) for s in step), returns(value)]
    function = function.with_changes(body=cst.IndentedBlock(inner))
    arguments = ", ".join(f"{n}={n}" for n in given)
    call = statement(f"{', '.join(carried)} = self.step_latents(self.scheduler, {arguments})")
    values = {
        noise: "noise_pred",
        t: "state.current_timestep",
        "timesteps": "state.timesteps",
        SCHEDULER: "state.scheduler",
    }
    if sample is not None:
        values[sample] = "state.latents"
    if index:
        values[index] = "state.step_index"
    places = {n: values.get(n) or f'inputs["{n}"]' for n in (*given, *carried)}
    passed = ", ".join(f"{n}={places[n]}" for n in given)
    state_code = [f"{', '.join(places[n] for n in carried)} = self.step_latents(state.scheduler, {passed})"]
    if any(n not in values for n in (*given, *carried)):
        state_code.insert(0, 'inputs = state.extra["denoise"]')
    return [call], [statement(s) for s in state_code], [function]


def _condition(analysis: Analysis, inputs: Sequence[str]) -> str:
    """Whether the step is a guided one, as the loop itself can tell."""
    guide = analysis.guidance
    condition = guide.condition if isinstance(guide, Guidance) else None
    if not isinstance(condition, cst.Name) or condition.value in writes(analysis.regions.predict):
        return "False"
    return condition.value
