"""What Diffusers itself can't run is said, and what it can is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from porter.model import PorterError
from porter.pipeline.analysis import analyse
from porter.pipeline.tables import load_tables
from porter.source.library import Library, open_library

PIPELINE = "diffusers.pipelines.lone.pipeline_lone.LonePipeline"
SOURCE = """
from ..pipeline_utils import DiffusionPipeline
from ...models.transformers.transformer_lone import LoneTransformer
from ...schedulers import Scheduler
from ...image_processor import Processor


class LonePipeline(DiffusionPipeline):
    def __init__(self, transformer: LoneTransformer, scheduler: Scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def encode(self, prompt):
        return prompt

    def __call__(self, prompt, height=None, return_dict=True):
        x = self.encode(prompt)
        for t in self.scheduler.timesteps:
            p = self.transformer(x, t)[0]
            x = self.scheduler.step(p, t, x)[0]
        return Output(images=x)
"""
TRANSFORMER = """
import torch.nn as nn


class LoneTransformer(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x, t):
        return (self.lin(x),)
"""


def lone(tmp_path: Path, old: str = "", new: str = "") -> Library:
    root = tmp_path / "diffusers"
    files = {
        "pipelines/lone/pipeline_lone.py": SOURCE.replace(old, new) if old else SOURCE,
        "models/transformers/transformer_lone.py": TRANSFORMER,
        "pipelines/pipeline_utils.py": "class DiffusionPipeline:\n    pass\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).with_name("__init__.py").touch()
    for folder in ("pipelines", "models"):
        (root / folder / "__init__.py").touch()
    (root / "__init__.py").write_text('__version__ = "0.40.0"\n')
    return open_library(root)


def found(library: Library) -> list[str]:
    return [d.message for d in analyse(library, PIPELINE, load_tables()).diagnostics if d.code == "PORT506"]


def test_a_pipeline_that_runs_is_not_complained_about(tmp_path: Path) -> None:
    assert (
        found(
            lone(tmp_path, "x = self.encode(prompt)", "x = self.encode(prompt=prompt) * self.transformer.config.width")
        )
        == []
    )


@pytest.mark.parametrize(
    ("new", "what"),
    [
        ("x = self.encode(prompt, index=0)", "self.encode takes no `index`"),
        ("x = self.transformer.config.depth", "no `depth`"),
        ("if self.transformer.config.depth:\n            prompt = prompt\n        x = prompt", "no `depth`"),
    ],
)
def test_what_every_request_runs_into_keeps_the_pipeline_from_being_ported(tmp_path: Path, new: str, what: str) -> None:
    with pytest.raises(PorterError, match=f"every request.*{what}") as refused:
        found(lone(tmp_path, "x = self.encode(prompt)", new))
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "PORT506" and diagnostic.span is not None and diagnostic.span.line == 17


@pytest.mark.parametrize(
    "new",
    [
        "x = height or self.transformer.config.depth",
        "x = self.transformer.config.depth if height else prompt",
        "x = prompt\n        if height:\n            x = self.encode(prompt, index=self.transformer.config.depth)",
    ],
)
def test_what_only_some_requests_run_into_is_a_finding(tmp_path: Path, new: str) -> None:
    messages = found(lone(tmp_path, "x = self.encode(prompt)", new))
    assert any("no `depth`" in m for m in messages)


def test_values_that_a_configuration_may_lack_can_be_asked_for(tmp_path: Path) -> None:
    assert found(lone(tmp_path, "x = self.encode(prompt)", 'x = self.transformer.config.get("depth", 1)')) == []
