"""What conversions of some classes give, without writing them: `tests/corpus/trial-<version>.csv` for a newer Diffusers.

A new version is tried with the rules as they are. What does not convert is in the table with what blocks it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from porter.convert import convert
from porter.model import Diagnostic, PorterError
from porter.source.library import open_library

COLUMNS = ("class", "diffusers", "transformers", "pipeline", "diagnostics", "blocked_by")
"""`transformers`: denoiser classes that convert, with their lines. `diagnostics`: codes of everything reported."""

OTHER_VERSION = "PORT006"
"""True of every row of a trial: the column `diffusers` says it."""


def trial(names: Iterable[str], source: Path | None = None) -> str:
    """CSV with a row per class. Raises PorterError when there is no such Diffusers source."""
    version = open_library(source).version
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name in sorted({n.removeprefix("diffusers.") for n in names}):
        writer.writerow({"class": name, "diffusers": version, **_row(name, source)})
    return text.getvalue()


def _row(name: str, source: Path | None) -> dict[str, str]:
    try:
        result = convert([name], source)
    except PorterError as error:
        return {"pipeline": "no", "blocked_by": _text(error.diagnostics)}
    port = result.ports[0]
    modules = {d["module"]: d["source"].rpartition(".")[2] for d in port.denoisers.values()}
    lines = {cls: result.files[f"{port.folder}/{module}.py"].count("\n") for module, cls in modules.items()}
    blocking = [d for d in result.diagnostics if d.code.startswith("PORT5")] if port.cls is None else []
    return {
        "transformers": " ".join(f"{cls}:{count}" for cls, count in lines.items()),
        "pipeline": "yes" if port.cls else "no",
        "diagnostics": " ".join(sorted({d.code for d in result.diagnostics} - {OTHER_VERSION})),
        "blocked_by": _text(blocking),
    }


def _text(found: Iterable[Diagnostic]) -> str:
    return "; ".join(f"{d.code} {d.span}: {d.message}" if d.span else f"{d.code} {d.message}" for d in found)
