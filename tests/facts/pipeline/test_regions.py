"""Cutting a loop, naming its guidance, finding the end of the call."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import guidance, regions, tail
from porter.facts.pipeline.regions import Regions
from porter.model import Unknown

LOOP = """
latents = start()
for i, t in enumerate(timesteps):
    u = t.expand(latents.shape[0])
    p = self.net(x=latents, t=u)[0]
    if guided:
        n = self.net(x=latents, t=u, text=negative)[0]
        p = n + scale * (p - n)
    latents = self.scheduler.step(p, t, latents)[0]
image = decode(latents)
"""


def cut(text: str) -> Regions | Unknown:
    return regions(list(cst.parse_module(text).body), ["net"])


def known(text: str) -> Regions:
    found = cut(text)
    assert isinstance(found, Regions)
    return found


def test_the_five_regions() -> None:
    found = known(LOOP)
    assert [len(r) for r in (found.encode, found.predict, found.guide, found.step, found.decode)] == [1, 2, 1, 1, 1]
    assert (found.loop.index, found.loop.timestep) == ("i", "t")


def test_a_progress_bar_around_the_loop_is_looked_through() -> None:
    inner = LOOP.split("\n", 2)[2].rsplit("image", 1)[0]
    text = "with self.progress_bar(total=3) as bar:\n" + "".join(f"    {line}\n" for line in inner.split("\n") if line)
    assert isinstance(cut(text), Regions)


def test_no_loop_no_guess() -> None:
    assert isinstance(cut("latents = self.net(x)\n"), Unknown)


def test_a_loop_inside_a_loop_is_not_cut() -> None:
    text = "for chunk in chunks:\n" + "".join(f"    {line}\n" for line in LOOP.strip().split("\n")[1:-1])
    assert isinstance(cut(text), Unknown)


def test_textbook_guidance_has_a_scale() -> None:
    found = guidance(known(LOOP), ["net"], lambda _: [])
    assert not isinstance(found, Unknown)
    assert found.combination is not None and found.combination.textbook and not found.combination.normalize


def test_positive_minus_negative_the_other_way_round_is_not_textbook() -> None:
    found = guidance(known(LOOP.replace("(p - n)", "(n - p)")), ["net"], lambda _: [])
    assert not isinstance(found, Unknown)
    assert found.combination is not None and not found.combination.textbook


def test_a_second_call_that_reads_the_first_result_is_not_split() -> None:
    found = guidance(known(LOOP.replace("    n = self", "    v = p * 2\n        n = self")), ["net"], lambda _: [])
    assert isinstance(found, Unknown)


def test_a_denoiser_chosen_per_step_is_found_through_its_local() -> None:
    text = LOOP.replace("    p = self.net", "    model = self.net if t > 1 else self.other\n    p = model").replace(
        "n = self.net", "n = model"
    )
    found = guidance(known(text), ["net", "other"], lambda _: [])
    assert not isinstance(found, Unknown)
    assert isinstance(found.positive.callee, cst.Name)


def test_post_processing_is_taken_out_and_remembered() -> None:
    text = (
        'if output_type == "latent":\n    image = latents\nelse:\n    image = self.vae.decode(latents)\n'
        "    image = self.processor.postprocess(image, output_type=output_type, clip=True)\nreturn pkg·Out(images=image)\n"
    )
    found = tail(list(cst.parse_module(text).body))
    assert not isinstance(found, Unknown)
    assert found.post_process is not None and found.post_process.processor == "processor"
    assert [name for name, _ in found.post_process.options] == ["clip"]
    assert "postprocess" not in cst.Module(body=list(found.statements)).code


def test_two_results_are_not_understood() -> None:
    assert isinstance(tail(list(cst.parse_module("return Out(images=a, flags=b)\n").body)), Unknown)
