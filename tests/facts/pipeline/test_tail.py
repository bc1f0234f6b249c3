"""Pictures that are post-processed in another form than one tensor of normalized pictures."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import tail
from porter.facts.pipeline.tail import PostProcess, Tail
from porter.source.tree import code

GROUPED = """
image = self.vae.decode(latents)
image = self.image_processor.postprocess(image, output_type=output_type)
images = []
for i in range(b):
    images.append(image[i * n : (i + 1) * n])
return Output(images=images)
"""
CHECKED = """
image, flagged = self.check(self.vae.decode(latents))
normalized = [not f for f in flagged]
image = self.image_processor.postprocess(image, output_type=output_type, do_denormalize=normalized)
return Output(images=image, nsfw_content_detected=flagged)
"""


def analysed(text: str) -> tuple[Tail, str]:
    found = tail(list(cst.parse_module(text).body))
    assert isinstance(found, Tail), found
    return found, "".join(code(s) for s in found.statements)


def test_pictures_handed_out_in_groups_are_post_processed_group_by_group() -> None:
    found, text = analysed(GROUPED)
    assert found.post_process == PostProcess("image_processor", "postprocess", grouped=True)
    assert "postprocess" not in text and "images.append(image[i * n : (i + 1) * n])" in text
    assert code(found.result) == "images"


def test_groups_whose_pictures_are_changed_on_the_way_stay_as_they_are() -> None:
    found, text = analysed(GROUPED.replace("append(image[i * n : (i + 1) * n])", "append(f(image[i]))"))
    assert found.post_process is None and "postprocess" in text


def test_pictures_that_a_checker_blacked_out_are_normalized_like_the_others() -> None:
    found, text = analysed(CHECKED)
    assert found.post_process == PostProcess("image_processor", "postprocess")
    assert "one if normalized else 2 * one - 1" in text and "zip(image, normalized)" in text


def test_the_verdict_of_a_checker_is_no_media() -> None:
    found, _ = analysed(CHECKED)
    assert [v.field for v in found.values] == ["images"]
