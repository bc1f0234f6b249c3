"""A second process for the conversion of one pipeline: it converts the denoisers, the first one what stands around them.

The denoisers take three quarters of the work, so that is what a conversion waits for; the rest of it, and reading the
command line, take no time of their own. The process is forked before anything is imported, when there are no threads.
With one processor there is none, and what it could not do (it ended, or the source made it fail) the first process does
itself; so the bytes and the findings are the same, and only the first one speaks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from porter.convert import Denoisers
    from porter.model import PorterError


class Helper:
    """The other process, as the first one sees it."""

    def __init__(self, process: int, requests: IO[bytes], answers: IO[bytes]) -> None:
        self.process, self.requests, self.answers = process, requests, answers

    def ask(self, name: str, source: Path | None, rules: Path | None) -> None:
        """Let it convert the denoisers of a pipeline."""
        import pickle

        try:
            pickle.dump((name, source, rules), self.requests)
            self.requests.close()
        except BrokenPipeError:
            return  # there will be no answer either

    def answer(self) -> Denoisers | PorterError | None:
        """What it made, or why nothing can be made; None if the first process has to see for itself."""
        import pickle

        try:
            found: Denoisers | PorterError | None = pickle.load(self.answers)
        except (EOFError, pickle.UnpicklingError):
            return None
        return found

    def end(self) -> None:
        """End it, whatever it does."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


_helper: Helper | None = None
_STOPPING = frozenset({signal.SIGINT, signal.SIGTERM})


def start(arguments: Sequence[str]) -> None:
    """Start the process if the command line has work for it. Called before anything else is imported."""
    global _helper
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if usable < 2 or "--all" in arguments:
        return
    requests, answers = os.pipe(), os.pipe()
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until each process knows what to do about them
    process = os.fork()
    if process == 0:
        os.close(requests[1])
        os.close(answers[0])
        _serve(requests[0], answers[1])
    os.close(requests[0])
    os.close(answers[1])
    _helper = Helper(process, os.fdopen(requests[1], "wb"), os.fdopen(answers[0], "rb"))
    signal.pthread_sigmask(signal.SIG_SETMASK, waiting)


def asked(names: Sequence[str], source: Path | None, rules: Path | None) -> Helper | None:
    """The helper at work on the denoisers of the only class there is; None if there is none, or several classes."""
    if _helper is None or _helper.requests.closed:
        return None
    if len(names) != 1:
        end()
        return None
    _helper.ask(names[0], source, rules)
    return _helper


def end() -> None:
    """Leave no process behind."""
    global _helper
    if _helper is not None:
        _helper.end()
        _helper = None


def _serve(requests: int, answers: int) -> NoReturn:
    """The life of the helper: import, read the request, answer it."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what reaches both at the terminal is for the first one to act on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        import pickle

        from porter.convert import convert_denoisers  # takes as long as the first process needs to ask

        with os.fdopen(requests, "rb") as incoming:
            request = pickle.load(incoming)
        with os.fdopen(answers, "wb") as outgoing:
            pickle.dump(convert_denoisers(*request), outgoing, pickle.HIGHEST_PROTOCOL)
    except BaseException:  # noqa: BLE001 - no answer: the first process comes to the same point and says what is wrong
        os._exit(1)
    os._exit(0)
