"""Guidance idioms come apart into branches, or are refused with a reason."""

from __future__ import annotations

import libcst as cst
import pytest

from porter.facts.pipeline import Guidance, guidance, regions
from porter.facts.pipeline.regions import Regions
from porter.model import Unknown
from porter.source.tree import code, statement

BATCHED = """
guided = scale > 1
if guided:
    text = torch·cat([negative_text, text], dim=0)
text = text.to(device)
for i, t in enumerate(timesteps):
    both = torch·cat([latents] * 2) if guided else latents
    u = t.expand(both.shape[0])
    p = self.net(x=both, t=u, text=text)[0]
    if guided:
        a, b = p.chunk(2)
        p = a + scale * (b - a)
    latents = self.scheduler.step(p, t, latents)[0]
image = decode(latents)
"""


def found(text: str, **helpers: str) -> Guidance | Unknown:
    cut = regions(list(cst.parse_module(text).body), ["net"])
    assert isinstance(cut, Regions)
    functions = {n: cst.ensure_type(statement(h), cst.FunctionDef) for n, h in helpers.items()}
    return guidance(cut, ["net"], lambda _: [], functions)


def known(text: str, **helpers: str) -> Guidance:
    result = found(text, **helpers)
    assert isinstance(result, Guidance), result
    return result


def texts(statements) -> list[str]:
    return [cst.Module(body=[s]).code.strip() for s in statements]


def test_a_batched_call_is_two_branches_with_the_formula_of_the_engine() -> None:
    guide = known(BATCHED)
    assert guide.negative is not None and guide.combination is not None and guide.combination.textbook
    assert code(guide.negative.arguments["text"]) == "negative_text"
    assert code(guide.negative.arguments["x"]) == code(guide.positive.arguments["x"]) == "both"
    assert "both = latents" in texts(guide.before)
    assert texts(guide.before_negative) == ["negative_text, text = text.chunk(2)"]


def test_the_formula_says_which_half_is_conditional() -> None:
    guide = known(BATCHED.replace("a + scale * (b - a)", "b + scale * (a - b)"))
    assert texts(guide.before_negative) == ["text, negative_text = text.chunk(2)"]


def test_an_axis_of_the_concatenation_is_the_axis_of_the_cut() -> None:
    guide = known(BATCHED.replace("dim=0)", "dim=1)"))
    assert texts(guide.before_negative) == ["negative_text, text = text.chunk(2, dim=1)"]


def test_what_is_done_to_the_prediction_before_guidance_each_branch_does() -> None:
    guide = known(BATCHED.replace("    if guided:\n        a,", "    p = p.float()\n    if guided:\n        a,"))
    assert texts(guide.process) == ["p = p.float()"]


def test_a_statement_on_a_doubled_variable_belongs_to_each_branch() -> None:
    guide = known(
        BATCHED.replace("    p = self.net", "    masked = text * 2.5\n    p = self.net").replace(
            "text=text", "text=masked"
        )
    )
    assert texts(guide.prepare) == ["masked = text * 2.5"]
    assert set(guide.positive.arguments) == {"text", "both", "u"}


def test_a_later_rescale_that_reads_a_branch_is_part_of_the_combination() -> None:
    rescale = "    if guided and phi > 0.0:\n        p = rescale(p, b, phi)\n    latents = self.scheduler"
    guide = known(BATCHED.replace("    latents = self.scheduler", rescale))
    assert guide.combination is not None and not guide.combination.textbook
    assert guide.combination.reads == ("phi", "rescale", "scale")
    assert "guided" not in texts(guide.combination.statements)[-1].split("\n")[0]


def test_two_cases_that_differ_by_a_repetition_are_one_case() -> None:
    cases = "    if guided:\n        both = torch·cat([latents, latents], dim=0)\n        u = f(t).repeat(2)\n"
    cases += "    else:\n        both = latents\n        u = f(t)\n"
    start, end = BATCHED.index("    both ="), BATCHED.index("    p = self")
    guide = known(BATCHED[:start] + cases + BATCHED[end:])
    assert texts(guide.before) == ["both = latents", "u = f(t)"]


def test_a_helper_that_concatenates_under_its_own_flag_is_followed() -> None:
    helper = "def both(self, x, guide):\n    if guide:\n        x = torch·cat([x] * 2)\n    return x\n"
    text = BATCHED.replace("for i", "mask = self.both(mask, guide=guided)\nfor i", 1).replace(
        "text=text", "text=text, m=mask"
    )
    guide = known(text, both=helper)
    assert "negative_mask, mask = mask.chunk(2)" in texts(guide.before_negative)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("text = text.to(device)", "text = shuffle(text)"),
        ("torch·cat([latents] * 2) if guided", "noisy(latents) if guided"),
        ("    latents = self.scheduler", "    p = p + b\n    latents = self.scheduler"),
    ],
)
def test_what_is_not_followed_is_not_split(old: str, new: str) -> None:
    assert isinstance(found(BATCHED.replace(old, new)), Unknown)


MASKED = """    if masked:
        m = torch·cat([mask, mask]) if guided else mask
    u = t.expand(both.shape[0])
    if masked:
        u = torch·min(u, 1 - m)
"""
HALVED = "a, b = p.chunk(2)\n        u, _ = u.chunk(2)"


def test_a_doubling_under_a_condition_of_its_own_is_taken_apart() -> None:
    guide = known(BATCHED.replace("    u = t.expand(both.shape[0])\n", MASKED))
    assert "m = mask" in "\n".join(texts(guide.before))
    assert "guided" not in "\n".join(texts(guide.before))


def test_halves_that_differ_under_a_condition_of_their_own_are_not_split() -> None:
    text = BATCHED.replace("    u = t.expand(both.shape[0])\n", MASKED.replace("[mask, mask]", "[other, mask]"))
    assert isinstance(found(text), Unknown)


def test_an_input_that_is_halved_beside_the_prediction_is_whole_in_each_branch() -> None:
    text = BATCHED.replace("    u = t.expand(both.shape[0])\n", MASKED).replace("a, b = p.chunk(2)", HALVED)
    guide = known(text.replace("step(p, t, latents)", "step(p, t, latents, u)"))
    assert guide.combination is not None and guide.combination.textbook


def test_what_the_combination_computes_for_the_step_keeps_the_branches_together() -> None:
    text = BATCHED.replace("a, b = p.chunk(2)", "a, b = p.chunk(2)\n        w = 2 * scale")
    assert isinstance(found(text.replace("step(p, t, latents)", "step(p, t, latents, w)")), Unknown)


def test_what_stands_between_the_call_and_guidance_and_reads_no_prediction_is_computed_ahead() -> None:
    between = "    p = p.float()\n    if dynamic:\n        scale = f(t)\n    if guided:\n        a,"
    guide = known(BATCHED.replace("    if guided:\n        a,", between))
    assert texts(guide.process) == ["p = p.float()"]
    assert texts(guide.before)[-1].startswith("if dynamic:")


@pytest.mark.parametrize("between", ["scale = f(p)", "text = f(t)"])
def test_what_can_t_be_computed_ahead_of_the_call_keeps_the_branches_together(between: str) -> None:
    assert isinstance(
        found(BATCHED.replace("    if guided:\n        a,", f"    {between}\n    if guided:\n        a,")), Unknown
    )


def test_branches_that_differ_in_nothing_known_are_not_split() -> None:
    text = BATCHED.replace("text = torch·cat([negative_text, text], dim=0)", "other = 1")
    assert isinstance(found(text), Unknown)


def test_a_concatenation_without_guidance_is_no_doubling() -> None:
    guide = known(
        BATCHED.replace("for i", "more = torch·cat([left, right])\nfor i", 1).replace("text=text", "text=text, m=more")
    )
    assert guide.negative is not None
    assert code(guide.negative.arguments["m"]) == "more"


TWO = """
for t in timesteps:
    c = self.net(x=latents, text=text)[0]
    if guided:
        u = self.net(x=latents, text=negative)[0]
        p = u + scale * (c - u)
    else:
        p = c
    latents = self.scheduler.step(p, t, latents)[0]
"""


def test_a_prediction_stored_under_its_own_name_on_both_paths() -> None:
    guide = known(TWO)
    assert (guide.result, guide.positive.result) == ("p", "c")


def test_an_unguided_path_that_does_something_else_is_not_split() -> None:
    assert isinstance(found(TWO.replace("p = c", "p = c * 2")), Unknown)


def test_both_predictions_processed_alike() -> None:
    text = TWO.replace("    if guided", "    c = k * c.float()\n    if guided").replace(
        "        p = u", "        u = k * u.float()\n        p = u"
    )
    assert texts(known(text).process) == ["c = k * c.float()"]
    assert isinstance(found(text.replace("u = k * u", "u = 2 * u")), Unknown)


def test_two_calls_on_every_step_need_no_condition() -> None:
    text = "for t in timesteps:\n    c = self.net(x=latents)[0]\n    u = self.other(x=latents)[0]\n"
    text += "    p = w * c + (1 - w) * u\n"
    text += "    latents = self.scheduler.step(-p, t, latents)[0]\n"
    cut = regions(list(cst.parse_module(text).body), ["net", "other"])
    assert isinstance(cut, Regions)
    guide = guidance(cut, ["net", "other"], lambda _: [], {})
    assert isinstance(guide, Guidance) and guide.negative is not None
    assert (code(guide.condition), code(guide.negative.callee)) == ("True", "self.other")  # type: ignore[arg-type]


def test_a_further_call_inside_guidance_belongs_to_the_combination() -> None:
    skip = "        if skip is not None:\n            s = self.net(x=latents, t=u, text=plain, skip=skip)[0]\n"
    skip += "            p = p + k * (b - s)\n    latents = self.scheduler"
    guide = known(BATCHED.replace("    latents = self.scheduler", skip))
    assert guide.combination is not None and not guide.combination.textbook
    assert {"latents", "plain", "skip", "k"} <= set(guide.combination.reads)


def test_parts_of_a_list_of_doubled_tensors_are_such_lists() -> None:
    lists = "    layers = [torch·cat([negative_layers[n], layers[n]], dim=0) for n in range(len(layers))]\n"
    text = BATCHED.replace("    text = torch·cat", lists + "    text = torch·cat")
    text = text.replace(
        "text = text.to(device)", "text = text.to(device)\nlayers = layers[1:] + [layers[-1]] * (3 - len(layers))"
    )
    guide = known(text.replace("text=text", "text=text, layers=layers"))
    assert "negative_layers = [each.chunk(2)[0] for each in layers]" in texts(guide.before_negative)


def test_branches_that_differ_in_nothing_are_not_split() -> None:
    assert isinstance(
        found(BATCHED.replace("text = torch·cat([negative_text, text], dim=0)", "text = both(text)")), Unknown
    )
