"""Two halves of a conversion at once: what stands around the denoisers is converted in a process of its own.

It is forked when everything is imported and the rules are loaded, so that no work is done twice; the smaller half of the
work then takes no time. It is the quicker one, so it begins with something for the other: definitions that the denoisers
will need. The bytes and the findings are the same: what does not come in time is made where it is needed, and so is
everything where no processor is idle. It saves a quarter of the time of a pipeline with one denoiser, for a fifth more
work in all.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Generic, TypeVar

Made = TypeVar("Made")
_STOPPING = frozenset({signal.SIGINT, signal.SIGTERM})
_ROOM = 1 << 20
"""Bytes that may wait in a pipe until they are asked for."""
_LENGTH = 8
"""Bytes ahead of each message: how long it is."""


def usable() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle() -> bool:
    """Whether a processor has nothing to do: else another process would take the time from this one."""
    try:
        running = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])  # this one, too
    except (OSError, ValueError, IndexError):
        return False
    return running < usable()


class Other(Generic[Made]):
    """The other process as this one sees it. Where there is none, this one does the work."""

    def __init__(self, work: Callable[[], Made], reading: int | None = None) -> None:
        self.work, self.reading = work, reading
        self._text = bytearray()
        self._made: tuple[Made] | None = None

    def sent_ahead(self) -> list[object]:
        """What has come by now and was not given yet."""
        if self.reading is None:
            return []
        while select.select([self.reading], [], [], 0)[0] and self._read():
            pass
        return self._messages()

    def result(self) -> Made:
        """What it made; this waits for it."""
        if self.reading is not None:
            while self._read():
                pass
            self._messages()
        return self._made[0] if self._made is not None else self.work()

    def _read(self) -> bool:
        """Read what is there, or wait for it; False if nothing more comes."""
        assert self.reading is not None
        text = os.read(self.reading, _ROOM)
        self._text += text
        return bool(text)

    def _messages(self) -> list[object]:
        """Whole messages but the last one of all, which is the result."""
        found: list[object] = []
        while len(self._text) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._text[:_LENGTH], "big")
            if len(self._text) < end:
                break
            ahead, value = pickle.loads(self._text[_LENGTH:end])
            del self._text[:end]
            if ahead:
                found.append(value)
            else:
                self._made = (value,)
        return found


@contextmanager
def beside(work: Callable[[], Made], ahead: Callable[[], Iterable[object]] = tuple) -> Iterator[Other[Made]]:
    """Starts another process that sends what `ahead` gives, one by one, and then the result of `work`, all of which can be
    pickled. No process is left at the end."""
    alone = threading.active_count() == 1  # locks of other threads would stay locked in a fork
    if sys.platform != "linux" or not alone or not idle():
        yield Other(work)
        return
    reading, writing = os.pipe()
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # until each process knows what to do about them
    process = os.fork()
    if process == 0:
        _answer(work, ahead, writing)
    os.close(writing)
    other = Other(work, reading)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
        yield other
    finally:
        other.reading = None
        os.close(reading)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _answer(work: Callable[[], object], ahead: Callable[[], Iterable[object]], writing: int) -> None:
    """The life of the other process. It says nothing; what goes wrong in it goes wrong in the first one, too."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what reaches both at the terminal is for the first one to act on
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        _widen(writing)
        with os.fdopen(writing, "wb") as stream:
            for each in ahead():
                _send(stream, (True, each))
            _send(stream, (False, work()))
    finally:
        os._exit(0)


def _widen(pipe: int) -> None:
    """Room for what is sent ahead, so that the first process need not come for it. Less of it is slower, and no more."""
    import fcntl

    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _ROOM)
    except OSError:
        return


def _send(stream: IO[bytes], message: tuple[bool, object]) -> None:
    text = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    stream.write(len(text).to_bytes(_LENGTH, "big") + text)
    stream.flush()
