"""Which buffers are part of a checkpoint, and that they get its dtype."""

from __future__ import annotations

import pytest

from porter.emit.templates import render
from porter.engine.absolute_text import unit_of
from porter.facts.persistent_buffers import persistent_buffers
from porter.source.library import Library
from tests.facts.conftest import HEAD, build

EMBED = """
import torch
import torch.nn as nn


class Embed(nn.Module):
    def __init__(self, dim, largest=None, learned=False):
        super().__init__()
        persistent = True if largest else False
        self.register_buffer("table", torch.zeros(dim), persistent=persistent)
        kept = learned
        self.register_buffer("places", torch.zeros(dim), persistent=kept)
"""


def found(*lines, parameters="dim"):
    return persistent_buffers(unit_of(HEAD + build(*lines, forward="return x", parameters=parameters)), None)


def imported(tmp_path, call):
    (tmp_path / "models").mkdir()
    for file, text in {"__init__.py": "", "models/__init__.py": "", "models/embeddings.py": EMBED}.items():
        (tmp_path / file).write_text(text)
    text = "from diffusers.models.embeddings import Embed\n" + HEAD
    text += build(f"self.embed = {call}", forward="return x", parameters="dim, largest=None")
    return persistent_buffers(unit_of(text), Library(tmp_path, "0"))


def test_a_buffer_is_persistent_unless_said_otherwise():
    assert found('self.register_buffer("table", torch.zeros(dim))') == ("Net.table",)
    assert found('self.register_buffer("table", torch.zeros(dim), True)') == ("Net.table",)
    assert found('self.register_buffer("table", torch.zeros(dim), persistent=False)') == ()


def test_a_constructor_without_buffers_has_none():
    assert found("self.table = torch.zeros(dim)", "self.linear = nn.Linear(dim, dim)") == ()


def test_a_buffer_that_a_parameter_decides_on_may_be_persistent():
    line = 'self.register_buffer("table", torch.zeros(dim), persistent=kept)'
    assert found(line, parameters="dim, kept=False") == ("Net.table",)


def test_what_a_call_gives_decides_for_a_class_of_the_library(tmp_path):
    assert imported(tmp_path, "Embed(dim)") == ()


@pytest.mark.parametrize(
    ("call", "buffers"),
    [
        ("Embed(dim, largest=largest)", ("Embed.table",)),
        ("Embed(dim, largest, True)", ("Embed.table", "Embed.places")),
        ("Embed(dim, **largest)", ("Embed.table", "Embed.places")),
    ],
)
def test_a_value_that_is_given_may_be_true(tmp_path, call, buffers):
    assert imported(tmp_path, call) == buffers


@pytest.mark.parametrize("kept", [False, True])
def test_only_floating_buffers_of_a_checkpoint_get_the_default_dtype(kept):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        _keep_in_fp32_modules = ("exact",)

    scope: dict = {}
    exec(render("transformer/loaded_dtypes.py.jinja", kept=kept, buffers=True), scope)
    net = Net()
    net.exact = torch.nn.Linear(2, 2)
    net.exact.register_buffer("table", torch.zeros(2, dtype=torch.float64))
    net.register_buffer("table", torch.zeros(2, dtype=torch.float64))
    net.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    net.register_buffer("made", torch.zeros(2, dtype=torch.float64), persistent=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        scope["loaded_dtypes"](net)
    finally:
        torch.set_default_dtype(before)
    exact = torch.float32 if kept else torch.bfloat16
    assert (net.table.dtype, net.exact.table.dtype) == (torch.bfloat16, exact)
    assert (net.count.dtype, net.made.dtype, net.exact.weight.dtype) == (torch.int64, torch.float64, torch.float32)
