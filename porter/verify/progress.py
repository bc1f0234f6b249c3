"""How far a sweep is, on stderr: a bar where a person looks on, a line per class where a log is written."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from porter.verify.sweep import Job


class Bar:
    """Follows a sweep; use as a context manager."""

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(
            *columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not sys.stderr.isatty()
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, job: Job, number: int, total: int, text: str) -> None:
        """The job is at `text`, or done where that is empty."""
        done = number if not text else number - 1
        self._progress.update(self._task, total=total, completed=done, description=text or job.name)
        if self._progress.disable and not text:
            print(f"{number}/{total} {job.name}", file=sys.stderr, flush=True)
