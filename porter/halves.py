"""Two halves of a conversion at once: what stands around the denoisers is converted in a process of its own.

It is forked when everything is imported and the rules are loaded, so that no work is done twice; the smaller half of the
work then takes no time. The bytes and the findings are the same: a half that gives no answer, for whatever reason, is
converted again where the other one is, and so is everything where there is one processor.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Made = TypeVar("Made")
_STOPPING = frozenset({signal.SIGINT, signal.SIGTERM})


def usable() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def beside(work: Callable[[], Made]) -> Iterator[Callable[[], Made]]:
    """Starts `work`, whose result can be pickled, in another process; the function waits for the result. No process is left
    at the end."""
    if (
        sys.platform != "linux" or usable() < 2 or threading.active_count() > 1
    ):  # locks of threads stay locked in a fork
        yield work
        return
    reading, writing = os.pipe()
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until each process knows what to do about them
    process = os.fork()
    if process == 0:
        _answer(work, writing)
    os.close(writing)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        with os.fdopen(reading, "rb") as stream:
            yield lambda: _answered(stream.read(), work)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _answered(text: bytes, work: Callable[[], Made]) -> Made:
    try:
        made: Made = pickle.loads(text)
    except (EOFError, pickle.UnpicklingError):
        return work()
    return made


def _answer(work: Callable[[], object], writing: int) -> None:
    """The life of the other process. It says nothing; what goes wrong in it goes wrong in the first one, too."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what reaches both at the terminal is for the first one to act on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        with os.fdopen(writing, "wb") as stream:
            stream.write(pickle.dumps(work(), pickle.HIGHEST_PROTOCOL))
    finally:
        os._exit(0)
