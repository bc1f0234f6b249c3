"""A guider keeps state from step to step, so the loop of one request takes it as an input."""

from __future__ import annotations

from textwrap import dedent

import pytest

from porter.facts.pipeline import Regions
from porter.facts.pipeline.regions import regions
from porter.pipeline.own_guider import guiders, own_guider
from porter.source.tree import code, statements

LOOP = """
latents = noise
for i, t in enumerate(timesteps):
    self.guider.set_state(step=i, num_inference_steps=steps, timestep=t)
    batches = self.guider.prepare_inputs(inputs)
    for batch in batches:
        self.guider.prepare_models(self.transformer)
        batch.noise_pred = self.transformer(latents, t)
        self.guider.cleanup_models(self.transformer)
    noise = self.guider(batches)[0]
    latents = self.scheduler.step(noise, t, latents)[0]
"""


def cut(text: str) -> Regions:
    found = regions(statements(dedent(text)), ["transformer"])
    assert isinstance(found, Regions)
    return own_guider(found)


def test_a_guider_of_the_pipeline_becomes_an_input_of_the_loop():
    found = cut(LOOP)
    assert code(found.encode[-1]).strip() == "guider = self.guider"
    assert "self.guider" not in "".join(code(s) for s in found.denoise)
    assert guiders(found) == ("guider",)


def test_a_guider_that_the_call_chose_is_one_already():
    found = cut(LOOP.replace("self.guider", "chosen"))
    assert len(found.encode) == 1
    assert guiders(found) == ("chosen",)


@pytest.mark.parametrize("text", [LOOP.replace(".set_state(", ".tell("), LOOP.replace(".prepare_inputs(", ".split(")])
def test_another_component_stays_the_pipeline_s(text):
    assert guiders(cut(text)) == ()
    assert "self.guider" in "".join(code(s) for s in cut(text).denoise)


def test_a_name_that_the_call_has_for_something_else_is_not_taken():
    found = cut("guider = 7\n" + LOOP)
    assert len(found.encode) == 2 and guiders(found) == ()
