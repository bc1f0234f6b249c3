"""One trial: a target, a mutant of its source file, and what porter makes of it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Literal

from porter.catalogue import live_pipelines
from porter.convert import Conversion, _Conversion, _joined, rules_digest
from porter.engine import load_rules
from porter.model import Diagnostic, PorterError
from porter.resources import CORPUS, RULES
from porter.source.library import Library, open_library
from porter.targets import find_target
from porter.transformer.policy import load_policy
from porter.transformer.port import TransformerPort
from tests.robustness.mutate import Mutant, mutant_of, parses

HANG = 120
"""Seconds after which a conversion counts as hanging."""

Verdict = Literal["converted", "diagnosed", "refused", "crashed", "bad output"]


@dataclass(frozen=True, slots=True)
class Target:
    """A class to convert and the file, below Diffusers, that is changed."""

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a mutant. diagnosed: converted, with findings that the unchanged source does not give."""

    number: int
    target: Target
    mutant: Mutant
    verdict: Verdict
    detail: str = ""

    def line(self) -> str:
        where = f"{self.target.file}:{self.mutant.line}"
        return f"{self.number} {self.target.name} {self.mutant.kind} ({where}): {self.verdict} {self.detail}".rstrip()


@cache
def targets() -> tuple[Target, ...]:
    """Denoisers and pipelines of tiers 1 and 2, denoiser and pipeline by turns."""
    library = installed()
    live = [p for p in live_pipelines(CORPUS) if p.in_scope]
    pipelines = [_target(library, p.name) for p in live]
    denoisers = [_target(library, d) for d in sorted({d for p in live for d in p.denoisers})]
    longer = max(len(pipelines), len(denoisers))
    pairs = ((denoisers[i % len(denoisers)], pipelines[i % len(pipelines)]) for i in range(longer))
    return tuple(target for pair in pairs for target in pair)


def _target(library: Library, name: str) -> Target:
    span = library.span(find_target(library, name).qualified)
    assert span is not None
    return Target(name, span.file)


@contextmanager
def overlay(file: str, text: str) -> Iterator[Path]:
    """A Diffusers package whose `file` has another text; everything else is a link to the installed one."""
    root = installed().root
    with tempfile.TemporaryDirectory() as folder:
        here, there = Path(folder) / "diffusers", root
        here.mkdir()
        for part in Path(file).parts:
            for entry in os.scandir(there):
                if entry.name not in (part, "__pycache__"):
                    os.symlink(entry.path, here / entry.name)
            here, there = here / part, there / part
            if there.is_dir():
                here.mkdir()
        here.write_text(text, encoding="utf-8")
        yield Path(folder) / "diffusers"
        shutil.rmtree(Path(folder) / "diffusers")


class Hanging(Exception):
    """A conversion took longer than HANG seconds."""


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise Hanging


@cache
def installed() -> Library:
    """The unchanged source, read once."""
    return open_library()


@cache
def unchanged(name: str) -> tuple[Mapping[str, TransformerPort], Counter[str]]:
    """The denoisers of a class and the findings about it, from the unchanged source."""
    run = _Conversion(installed(), load_rules(RULES), load_policy(RULES))
    try:
        run.add(find_target(installed(), name), alone=True)
    except PorterError as error:
        return {}, _findings(error.diagnostics)
    return run.transformers, _findings(printed(run).diagnostics)


def converted(target: Target, source: Path) -> Conversion:
    """What `porter convert` gives. Files that did not change are not read again, denoisers not ported again."""
    library = open_library(source)
    changed = "diffusers." + target.file.removesuffix(".py").replace("/", ".")
    find_target(installed(), target.name)
    library._modules.update({n: m for n, m in installed()._modules.items() if n != changed})
    run = _Conversion(library, load_rules(RULES), load_policy(RULES))
    if target.file.startswith("pipelines/"):
        run.transformers.update(unchanged(target.name)[0])
    run.add(find_target(library, target.name), alone=True)
    return printed(run)


def printed(run: _Conversion) -> Conversion:
    """The end of a conversion of one target."""
    return _joined([run.finish(None, {0: tuple(run.diagnostics)}, rules_digest())], run.library.version)


def _findings(found: tuple[Diagnostic, ...]) -> Counter[str]:
    return Counter(f"{d.code} {d.message}" for d in found)


def trial(number: int) -> tuple[Trial, Conversion | None]:
    """Trial `number`; the same number is the same trial everywhere. The conversion comes along if there is one."""
    target = targets()[number % len(targets())]
    text = (installed().root / target.file).read_text(encoding="utf-8")
    mutant = mutant_of(text, number)
    verdict, detail, made = attempt(target, mutant)
    return Trial(number, target, mutant, verdict, detail), made


def attempt(target: Target, mutant: Mutant) -> tuple[Verdict, str, Conversion | None]:
    """Convert a target from a changed source. Anything but a result or a PorterError is a crash."""
    gc.set_threshold(100_000, 10, 10)
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(HANG)
    try:
        with overlay(target.file, mutant.text) as source:
            made = converted(target, source)
    except PorterError as error:
        return "refused", _said(error.diagnostics), None
    except Exception as error:  # noqa: BLE001 - a crash is the finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "crashed", f"{type(error).__name__}: {error} at {Path(place.filename).name}:{place.lineno}"[:300], None
    finally:
        signal.alarm(0)
    if bad := [name for name, text in made.files.items() if name.endswith(".py") and not parses(text)]:
        return "bad output", f"{', '.join(bad)} does not parse", made
    fresh = _findings(made.diagnostics) - unchanged(target.name)[1]
    return ("diagnosed", "; ".join(sorted(fresh))[:300], made) if fresh else ("converted", "", made)


def _said(found: tuple[Diagnostic, ...]) -> str:
    return "; ".join(f"{d.code} {d.message}" for d in found)[:300]


def count(trials: Mapping[str, int]) -> str:
    """Numbers of verdicts, as one line."""
    return ", ".join(f"{n} {verdict}" for verdict, n in sorted(trials.items()))
