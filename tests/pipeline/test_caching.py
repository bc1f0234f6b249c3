"""Which calls of a denoiser Cache-DiT would take for another step."""

from __future__ import annotations

import libcst as cst
import pytest

from porter.pipeline.caching import Branches, said_of_cache, told_of_cache

SOURCE = """
class Pipeline:
    def predict_noise(self, **kwargs):
        return self.transformer(**kwargs)[0]

    def combine_cfg_noise(self, positive, negative):
        if self.skips:
            other = self.transformer(positive, skip=True)
            positive = positive + other
        return positive + self.controlnet(negative)
"""


def printed(branches: Branches, source: str = SOURCE) -> str:
    (node,) = cst.parse_module(source).body
    return cst.Module(body=[told_of_cache(node, {"transformer", "transformer_2"}, branches)]).code  # type: ignore[arg-type]


@pytest.mark.parametrize("branches", ["two", "several"])
def test_a_call_beside_those_of_branches_is_refused(branches: Branches) -> None:
    refusal = (
        "            refuse_cache_dit(self.transformer)\n            other = self.transformer(positive, skip=True)\n"
    )
    assert printed(branches) == SOURCE.lstrip().replace(
        "            other = self.transformer(positive, skip=True)\n", refusal
    )


def test_without_branches_the_first_call_of_each_denoiser_is_free() -> None:
    assert printed("").count("refuse_cache_dit") == 1
    assert "refuse_cache_dit(self.transformer)\n            other" in printed("")
    second = SOURCE.replace("self.transformer(positive", "self.transformer_2(positive")
    assert "refuse_cache_dit" not in printed("", second)


def test_one_call_is_never_refused_and_other_models_may_be_called() -> None:
    alone = SOURCE.replace("self.transformer(positive, skip=True)", "self.controlnet(positive)")
    assert printed("", alone) == printed("two", alone) == alone.lstrip()
    assert said_of_cache(cst.parse_module(alone)) == frozenset()
    assert said_of_cache(cst.parse_module(printed("two"))) == {"refuse_cache_dit"}


HEADERS = """
class Pipeline:
    def diffuse(self, x):
        both = self.transformer(x) + self.transformer(-x)
        if x is None:
            pass
        elif self.transformer(x):
            pass
        while self.transformer(x):
            x = x - 1
"""


def test_a_second_call_in_a_line_and_calls_in_headers_are_refused() -> None:
    refused = "        refuse_cache_dit(self.transformer)\n"
    lines = HEADERS.lstrip()
    for line in ("        both", "        if x", "        while"):
        lines = lines.replace(line, refused + line)
    assert printed("", HEADERS) == lines


LOOPS = """
class Pipeline:
    def diffuse(self, windows, timesteps):
        for window in windows:
            x = window

            # steps
            for t in timesteps:
                for _ in range(2):
                    noise = self.transformer(x, t)
                x = self.scheduler.step(noise, t, x)
            for other in x:
                self.keep(other)
        return x
"""


def test_every_innermost_loop_of_steps_begins_anew() -> None:
    anew = "            begin_anew(self.transformer)\n            begin_anew(self.transformer_2)\n"
    assert printed("", LOOPS) == LOOPS.lstrip().replace("            for t in", anew + "            for t in")
    assert said_of_cache(cst.parse_module(printed("", LOOPS))) == {"begin_anew"}


def test_a_refusal_inside_of_such_a_loop_stays() -> None:
    refused = " " * 20 + "refuse_cache_dit(self.transformer)\n"
    assert refused + " " * 20 + "noise =" in printed("two", LOOPS)


def test_a_loop_over_requests_is_no_loop_of_steps() -> None:
    assert "begin_anew" not in printed("", LOOPS.replace("def diffuse", "def denoise_step"))
