"""A tiny Diffusers under a temporary folder, and definitions read from it."""

from __future__ import annotations

from textwrap import dedent

import pytest

from porter.model import Definition
from porter.source import tree
from porter.source.library import Library
from porter.source.marks import strip


class Shelf:
    """Writes source files and reads definitions back."""

    def __init__(self, root):
        self.root = root / "diffusers"
        self.write({"__init__.py": '__version__ = "0.0.0"\n'})

    def write(self, files):
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text).lstrip("\n"))
        return self

    @property
    def library(self):
        return Library(self.root, "0.0.0")

    def definition(self, text, name="f"):
        found = self.write({"m.py": text}).library.definition(f"diffusers.m.{name}")
        assert isinstance(found, Definition), found
        return found

    def absolute(self, text, name="f"):
        """The definition's code with absolute names, without marks."""
        return strip(tree.code(self.definition(text, name).node))


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)
