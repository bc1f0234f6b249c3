"""A picture taken out of a post-processed video."""

from __future__ import annotations

import libcst as cst

from porter.facts.pipeline import tail
from porter.facts.pipeline.tail import PostProcess, Tail
from porter.source.names import absolute
from porter.source.tree import code

DECODE = """
if output_type != "latent":
    video = self.vae.decode(latents)
    if self.checker is not None:
        video = self.checker(self.video_processor.postprocess_video(video, output_type="np"))
        video = self.video_processor.postprocess_video(video, output_type=output_type)
    else:
        video = self.video_processor.postprocess_video(video, output_type=output_type)
    image = [batch[PLACE] for batch in video]
    if isinstance(video, TENSOR):
        image = STACK(image)
    elif isinstance(video, ARRAY):
        image = NUMPY(image)
else:
    image = latents[:, :, 0]
return Output(images=image)
"""
NAMES = {"TENSOR": "torch.Tensor", "STACK": "torch.stack", "ARRAY": "numpy.ndarray", "NUMPY": "numpy.stack"}


def analysed(place: str = "0", end: str = "") -> Tail:
    text = DECODE.replace("PLACE", place).replace("else:\n    image = lat", f"{end}else:\n    image = lat")
    for short, full in NAMES.items():
        text = text.replace(short, absolute(full))
    found = tail(list(cst.parse_module(text).body))
    assert isinstance(found, Tail)
    return found


def test_the_first_frame_is_taken_before_post_processing() -> None:
    found = analysed()
    assert found.post_process == PostProcess("video_processor", "postprocess")
    text = "".join(code(s) for s in found.statements)
    assert text.count("image = video[:, :, 0]") == 2
    assert "stack" not in text and "batch" not in text


def test_post_processing_for_a_checker_stays() -> None:
    text = "".join(code(s) for s in analysed().statements)
    assert 'self.video_processor.postprocess_video(video, output_type="np")' in text


def test_another_frame_stays_as_it_is() -> None:
    found = analysed(place="1")
    assert found.post_process is None
    assert "batch[1] for batch in video" in "".join(code(s) for s in found.statements)


def test_a_video_that_is_read_again_stays_as_it_is() -> None:
    assert analysed(end="    keep(video)\n").post_process is None
