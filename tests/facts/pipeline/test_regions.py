"""Cutting a loop, naming its guidance, finding the end of the call."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import guidance, regions, stages, tail
from porter.facts.pipeline.regions import Regions
from porter.facts.pipeline.tail import Tail
from porter.model import Unknown
from porter.source.tree import code

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


def test_a_round_that_may_end_early_is_not_cut() -> None:
    early = LOOP.replace("    u = t.expand", "    if t == 0:\n        continue\n    u = t.expand")
    assert isinstance(cut(early), Unknown)
    inner = LOOP.replace("    u = t.expand", "    for s in t:\n        continue\n    u = t.expand")
    assert isinstance(cut(inner), Regions)


def test_textbook_guidance_has_a_scale() -> None:
    found = guidance(known(LOOP), ["net"], lambda _: [], {})
    assert not isinstance(found, Unknown)
    assert found.combination is not None and found.combination.textbook and not found.combination.normalize


def test_positive_minus_negative_the_other_way_round_is_not_textbook() -> None:
    found = guidance(known(LOOP.replace("(p - n)", "(n - p)")), ["net"], lambda _: [], {})
    assert not isinstance(found, Unknown)
    assert found.combination is not None and not found.combination.textbook


def test_a_second_call_that_reads_the_first_result_is_not_split() -> None:
    found = guidance(known(LOOP.replace("    n = self", "    v = p * 2\n        n = self")), ["net"], lambda _: [], {})
    assert isinstance(found, Unknown)


def test_a_denoiser_chosen_per_step_is_found_through_its_local() -> None:
    text = LOOP.replace("    p = self.net", "    model = self.net if t > 1 else self.other\n    p = model").replace(
        "n = self.net", "n = model"
    )
    found = guidance(known(text), ["net", "other"], lambda _: [], {})
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


def test_flags_beside_the_result_are_not_understood() -> None:
    assert isinstance(tail(list(cst.parse_module("return Out(images=a, flags=b)\n").body)), Unknown)


def ending(text: str) -> Tail:
    found = tail(list(cst.parse_module(text).body))
    assert isinstance(found, Tail)
    return found


def test_video_and_sound_are_two_results() -> None:
    found = ending(
        "video = self.p.postprocess_video(video, output_type=output_type)\nreturn Out(frames=video, audio=sound)\n"
    )
    assert [v.field for v in found.values] == ["frames", "audio"]
    assert [v.post_process is not None for v in found.values] == [True, False]
    assert code(found.result) == "video, sound"


def test_an_early_return_gives_the_bare_result() -> None:
    found = ending(
        'if output_type == "latent":\n    return pkg·Out(audios=x)\ny = self.vae(x)\nreturn pkg·Out(audios=y)\n'
    )
    assert "return x" in cst.Module(body=list(found.statements)).code


def test_conversion_of_sound_to_numpy_is_post_processing() -> None:
    found = ending('y = f(x)\nif output_type == "np":\n    y = y.cpu().float().numpy()\nreturn Out(audios=y)\n')
    assert found.post_process is not None and found.post_process.processor is None
    assert "numpy" not in cst.Module(body=list(found.statements)).code


def test_a_conversion_to_pixels_for_a_checker_is_no_post_processing() -> None:
    found = ending(
        'v = self.p.postprocess_video(v, output_type="np")\nv = check(v)\n'
        "v = self.p.postprocess_video(v, output_type=output_type)\nreturn Out(frames=v)\n"
    )
    assert 'output_type="np"' in cst.Module(body=list(found.statements)).code
    assert found.post_process is not None


def test_a_call_that_cannot_be_cut_has_three_stages() -> None:
    text = "a = f()\nfor chunk in a:\n    with self.progress_bar(total=3) as bar:\n        b = self.net(b)\nc = g(b)\n"
    found = stages(list(cst.parse_module(text).body), ["net"], {}, "why")
    assert not isinstance(found, Unknown)
    assert [len(part) for part in (found.encode, found.denoise, found.decode)] == [1, 1, 1]
    assert "progress_bar" not in cst.Module(body=list(found.denoise)).code


def test_a_method_that_calls_the_denoiser_denoises() -> None:
    method = cst.parse_statement("def stage(self, x):\n    return self.net(x)\n")
    found = stages(list(cst.parse_module("x = 1\ny = self.stage(x)\n").body), ["net"], {"stage": method}, "why")
    assert not isinstance(found, Unknown)
    assert len(found.denoise) == 1


def test_a_call_that_returns_before_it_denoises_has_no_stages() -> None:
    text = "if c:\n    return x\ny = self.net(x)\n"
    assert isinstance(stages(list(cst.parse_module(text).body), ["net"], {}, "why"), Unknown)
