"""Which calls of a denoiser Cache-DiT would take for another step."""

from __future__ import annotations

import libcst as cst
import pytest

from porter.pipeline.caching import Branches, is_refusing, with_refusals

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
    return cst.Module(body=[with_refusals(node, {"transformer", "transformer_2"}, branches)]).code  # type: ignore[arg-type]


@pytest.mark.parametrize("branches", ["two", "several"])
def test_a_call_beside_those_of_branches_is_refused(branches: Branches) -> None:
    refusal = (
        "            refuse_cache_dit(self.transformer)\n            other = self.transformer(positive, skip=True)\n"
    )
    assert printed(branches) == SOURCE.lstrip().replace(
        "            other = self.transformer(positive, skip=True)\n", refusal
    )


def test_without_branches_the_first_call_is_free() -> None:
    assert printed("").count("refuse_cache_dit") == 1
    assert "refuse_cache_dit(self.transformer)\n            other" in printed("")
    second = SOURCE.replace("self.transformer(positive", "self.transformer_2(positive")
    assert "refuse_cache_dit(self.transformer_2)" in printed("", second)


def test_one_call_is_never_refused_and_other_models_may_be_called() -> None:
    alone = SOURCE.replace("self.transformer(positive, skip=True)", "self.controlnet(positive)")
    assert printed("", alone) == printed("two", alone) == alone.lstrip()
    assert not is_refusing(cst.parse_module(alone)) and is_refusing(cst.parse_module(printed("two")))
