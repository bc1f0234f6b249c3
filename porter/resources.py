"""Where rules, templates, the corpus and the workloads lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str, beside: str) -> Path:
    packed = _PACKAGE / f"_{name}"
    return packed if packed.is_dir() else _PACKAGE.parent / beside


RULES = _folder("rules", "rules")
TEMPLATES = _folder("templates", "templates")
CORPUS = _folder("corpus", "tests/corpus")
BENCHMARKS = _folder("benchmarks", "benchmarks")
