"""Where rules, templates, the corpus and the workloads lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str, beside: str) -> Path:
    packed = _PACKAGE / f"_{name}"
    return packed if packed.is_dir() else _PACKAGE.parent / beside


RULES = _folder("rules", "rules")
TEMPLATES = _folder("templates", "templates")
CORPUS = _folder("corpus", "tests/corpus")
BENCHMARKS = _folder("benchmarks", "benchmarks")


def table(path: Path, *keys: str) -> dict[str, Any]:
    """A table of symbols or a hint. Raises PorterError: PORT210 no YAML, PORT211 unreadable, PORT223 a key is missing."""
    import yaml

    from porter.model import Diagnostic, PorterError, Span

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PorterError(Diagnostic("PORT210", f"not a YAML file: {error.problem}", Span(str(path), line))) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PorterError(Diagnostic("PORT211", f"can't read {path}: {error}", Span(str(path), 1))) from None
    if not isinstance(data, dict) or (missing := [k for k in keys if k not in data]):
        lacks = ", ".join(missing) if isinstance(data, dict) else "its keys"
        raise PorterError(Diagnostic("PORT223", f"{path} lacks {lacks}", Span(str(path), 1)))
    return data
