"""Tiny checkpoints are small and complete; an incomplete one gives one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from porter.verify.cases import corpus_root
from porter.verify.checkpoint import check_checkpoint
from porter.verify.outcome import VerifyError
from porter.verify.pipeline_spec import load_spec

PIPELINES = sorted(p.stem for p in (corpus_root() / "pipelines").glob("*.yaml"))


LARGE = dict.fromkeys(("HunyuanImagePipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"), 22e6)
"""Their denoisers hold a projection of 2048 by 2048, which the source writes out: no configuration makes it smaller."""


def make(bench: Any, folder: Path, pipeline: str = "QwenImagePipeline") -> dict[str, Any]:
    spec = load_spec(pipeline)
    assert spec is not None
    return bench.engine({"job": "checkpoint", "class": pipeline, "spec": dict(spec.data), "folder": str(folder)})


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_tiny_checkpoint_is_small_quick_and_whole(bench: Any, tmp_path: Path, pipeline: str) -> None:
    made = make(bench, tmp_path / "c", pipeline)
    print(f"{pipeline}: {made['bytes'] / 1e6:.1f} MB in {made['seconds']:.1f} s")
    assert made["bytes"] < LARGE.get(pipeline, 20e6)
    assert made["seconds"] < 10
    assert check_checkpoint(tmp_path / "c") == (pipeline,)


def test_a_component_class_without_a_builder_says_where_to_add_one() -> None:
    pytest.importorskip("transformers")
    from porter.verify.tiny import build_component

    with pytest.raises(VerifyError, match="porter/verify/tiny"):
        build_component("NoSuchEncoder", {}, {})
