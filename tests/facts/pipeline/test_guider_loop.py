"""A guider's loop over its branches is recognised where nothing else happens in it."""

from __future__ import annotations

import libcst as cst
import pytest

from porter.facts.pipeline.guider_loop import GuiderLoop, guider_loop
from porter.model import Unknown
from porter.pipeline.branches import branch_code
from porter.source.tree import code

LOOP = """
state = guider.prepare_inputs(inputs)
for batch in state:
    guider.prepare_models(self.net)
    given = {n: getattr(batch, n) for n in inputs.keys()}
    name = getattr(batch, guider.key)
    # one branch
    batch.noise_pred = self.net(x=latents, return_dict=False, **given)[0]
    guider.cleanup_models(self.net)
"""


def found(old: str = "", new: str = "") -> GuiderLoop | Unknown:
    return guider_loop(list(cst.parse_module(LOOP.replace(old, new) if old else LOOP).body))


def printed(old: str = "", new: str = "") -> tuple[str, str]:
    loop = found(old, new)
    assert isinstance(loop, GuiderLoop), loop
    return tuple("".join(code(s) for s in part) for part in branch_code(loop))  # type: ignore[return-value]


def test_each_branch_becomes_an_entry_of_the_engine_s_call() -> None:
    text, _ = printed()
    assert "for branch, batch in enumerate(state):" in text
    assert '"guider": guider' in text and '"x": latents' in text and "**given" in text
    assert "return_dict" not in text and "batch.noise_pred = noise_pred" in text
    assert "# one branch" in text


def test_what_the_call_does_not_read_is_left_out() -> None:
    text, _ = printed()
    assert "guider.key" not in text


def test_the_guider_prepares_the_model_as_if_the_branches_before_had_run_here() -> None:
    _, methods = printed()
    assert methods.index("guider._count_prepared = branch") < methods.index("guider.prepare_models(self.net)")
    assert methods.index("noise_pred = self.net(**kwargs)[0]") < methods.index("guider.cleanup_models(self.net)")


def test_a_guider_of_the_pipeline_s_own_is_not_handed_around() -> None:
    text, methods = printed("guider", "self.guider")
    assert '"guider"' not in text and "self.guider.prepare_models(self.net)" in methods


def test_a_prediction_may_take_a_name_before_it_is_stored() -> None:
    stored = "p = self.net(x=latents, **given)[0].clone()\n    batch.noise_pred = p"
    _, methods = printed("batch.noise_pred = self.net(x=latents, return_dict=False, **given)[0]", stored)
    assert "noise_pred = self.net(**kwargs)[0].clone()" in methods


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    guider.cleanup_models(self.net)\n", ""),
        ("guider.cleanup_models(self.net)", "other.cleanup_models(self.net)"),
        ("    guider.cleanup", "    total = total + batch.noise_pred\n    guider.cleanup"),
        ("self.net(x=latents,", "self.net(latents,"),
        ("    name = getattr(batch, guider.key)\n", "    if last:\n        break\n"),
        ("    name = getattr(batch, guider.key)\n", "    state = state[1:]\n"),
    ],
)
def test_a_loop_that_does_anything_else_stays_as_it_is(old: str, new: str) -> None:
    assert isinstance(found(old, new), Unknown)
