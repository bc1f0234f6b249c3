"""A tiny Diffusers with one denoiser, specialised and folded to text."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from porter.emit.imports import resolve_imports
from porter.source import tree
from porter.source.library import Library
from porter.source.marks import strip
from porter.specialise.fold import fold
from porter.specialise.model import Driver
from porter.specialise.naming import class_names
from porter.transformer.policy import Policy

POLICY = Policy(
    copied=("diffusers.models.attention.", "diffusers.models.transformers."),
    imported=("diffusers.models.embeddings.",),
    refused=frozenset({"attention_kwargs"}),
    outcomes={"diffusers.utils.is_available": False},
    constants={},
    rules=Path(),
)
ATTENTION = """
import torch.nn as nn
import torch.nn.functional as F


class Processor:
    backend = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(context), attn.to_v(context)
        if attn.norm is not None:
            query = attn.norm(query)
        return F.scaled_dot_product_attention(query, key, value)


class Stateful(Processor):
    def __init__(self):
        self.scale = 2

    def __call__(self, attn, hidden_states):
        return hidden_states * self.scale


class Attention(nn.Module):
    def __init__(self, dim, norm=None, cross_dim=None, processor=None):
        super().__init__()
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(cross_dim if cross_dim is not None else dim, dim)
        self.to_v = nn.Linear(cross_dim if cross_dim is not None else dim, dim)
        if norm is None:
            self.norm = None
        else:
            self.norm = nn.LayerNorm(dim)
        if processor is None:
            processor = Processor()
        self.set_processor(processor)

    def set_processor(self, processor):
        self.processor = processor

    def fuse(self):
        self.fused = True

    def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
        return self.processor(self, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)


class FeedForward(nn.Module):
    def __init__(self, dim, activation="gelu", bias=True):
        super().__init__()
        self.inner = nn.Linear(dim, dim, bias=bias)
        self.activation = nn.GELU() if activation == "gelu" else nn.SiLU()

    def forward(self, hidden_states):
        return self.activation(self.inner(hidden_states))
"""
HEAD = """
import torch
import torch.nn as nn
from typing import Optional
from ..attention import Attention, FeedForward, Processor, Stateful
from ..embeddings import Embedding
from ...utils import is_available


"""
FILES = {
    "__init__.py": '__version__ = "0.0.0"\n',
    "models/__init__.py": "",
    "models/attention.py": ATTENTION,
    "models/embeddings.py": "import torch.nn as nn\n\n\nclass Embedding(nn.Module):\n    pass\n",
    "models/transformers/__init__.py": "",
    "utils.py": "def is_available():\n    return True\n",
}


class Folded:
    """Classes of a specialised model, as text with ordinary names."""

    def __init__(self, model, definitions):
        self.model = model
        local = {f"{d.module}.{d.name}": d.name for d in definitions}
        self.classes = {d.name: resolve_imports(strip(tree.code(d.node)), local).body for d in definitions}

    def __getitem__(self, name):
        return self.classes[name]

    @property
    def names(self):
        return list(self.classes)

    def signature(self, name, method="forward"):
        """Parameter names of a method, receiver left out, stars kept."""
        found = re.search(rf"def {method}\((.*?)\)(?: ->.*?)?:", self.classes[name], re.DOTALL)
        return [re.split(r"[:=]", p)[0].strip() for p in found[1].split(",") if p.strip() and p.strip() != "self"]


class Specialiser:
    """Runs the interpreter over the text of a model file whose root is `FooTransformer2DModel`."""

    def __init__(self, root):
        self.root = root / "diffusers"

    def __call__(self, text, attention=""):
        files = {**FILES, "models/transformers/foo.py": HEAD + dedent(text)}
        files["models/attention.py"] += dedent(attention)
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.lstrip("\n"))
        library = Library(self.root, "0.0.0")
        name = "diffusers.models.transformers.foo.FooTransformer2DModel"
        model = Driver(library, name, POLICY, lambda definition: definition).run()
        return Folded(model, fold(model, class_names(model)))


@pytest.fixture
def specialise(tmp_path):
    return Specialiser(tmp_path)
