"""Facts of a unit that is a few lines of text."""

from __future__ import annotations

from textwrap import dedent

import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.tensor_parallel import tensor_parallel

HEAD = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

"""


@pytest.fixture
def facts():
    """Tensor-parallel facts of a text; the last class is the root."""

    def analyse(text):
        return tensor_parallel(unit_of(HEAD + dedent(text)))

    return analyse


def build(*lines, forward, name="Net", parameters="dim", arguments="x"):
    """A class out of constructor lines and a forward."""
    init = "".join(f"        {line}\n" for line in ("super().__init__()", *lines))
    body = "".join(f"        {line}\n" for line in forward.strip().split("\n"))
    return (
        f"class {name}(nn.Module):\n    def __init__(self, {parameters}):\n{init}"
        f"    def forward(self, {arguments}):\n{body}\n"
    )


def linears(*names, width="dim"):
    return [f"self.{n} = nn.Linear(dim, {width})" for n in names]
