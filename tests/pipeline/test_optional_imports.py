"""Packages that need not be installed."""

from __future__ import annotations

import libcst as cst

from porter.model import Definition
from porter.pipeline.optional_imports import import_where_used
from tests.pipeline.conftest import HEAD, PIPELINE, Studio, printed

GUARDED = HEAD.replace(
    "import torch\n", "import torch\nfrom ..utils import is_tidy_available\nif is_tidy_available():\n    import tidy\n"
)


def test_a_guarded_import_moves_to_the_statement_that_needs_it(studio: Studio) -> None:
    source = PIPELINE.replace(HEAD, GUARDED).replace(
        "        # longest prompt decides\n", "        if is_tidy_available():\n            prompt = tidy.up(prompt)\n"
    )
    code = printed(studio.port(source))
    assert "            from tidy import up\n            prompt = up(prompt)" in code
    assert not code.startswith("import tidy")


def test_an_ordinary_import_stays_at_the_top(studio: Studio) -> None:
    assert "            import torch" not in printed(studio.port())


def test_a_condition_gets_its_import_ahead_of_the_branch() -> None:
    node = cst.parse_statement("def f(x):\n    if isinstance(x, extra·Checker):\n        g(x)\n")
    found = import_where_used(Definition("f", node, "m", "m.py"), {"extra"})
    text = cst.Module(body=[found.node]).code  # type: ignore[list-item]
    assert "    from extra import Checker\n    if isinstance(x, Checker):\n" in text
