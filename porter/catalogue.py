"""The live pipelines of Diffusers, by tier and family: `tests/corpus/catalogue.csv`.

Tiers say what a pipeline needs. 1: a transformer whose attention is in processors of its own; 2: a transformer whose
attention is in shared blocks or old processors; a: text in, b: media in, c: special parts (ControlNets, several loops);
3: a UNet; 4: something else. Deprecated pipelines are left out. A test compares the file with Diffusers' source.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from porter.model import Diagnostic, PorterError

FILE = "catalogue.csv"


@dataclass(frozen=True, slots=True)
class LivePipeline:
    """One pipeline class; `denoisers` are the classes that its constructor may take as denoiser."""

    name: str
    tier: str
    family: str
    denoisers: tuple[str, ...]

    @property
    def in_scope(self) -> bool:
        """Tiers 1 and 2: pipelines around a diffusion transformer."""
        return self.tier[0] in "12"


def live_pipelines(corpus: Path) -> tuple[LivePipeline, ...]:
    """All of them by name. Raises PorterError (PORT013) where the corpus has no such file."""
    path = corpus / FILE
    if not path.is_file():
        raise PorterError(Diagnostic("PORT013", f"there is no {path}", advice="name the corpus with --corpus"))
    with path.open(newline="", encoding="utf-8") as stream:
        return tuple(
            LivePipeline(row["pipeline"], row["tier"], row["family"], tuple(row["denoisers"].split()))
            for row in csv.DictReader(stream)
        )
