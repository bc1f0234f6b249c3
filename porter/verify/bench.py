"""The processes of one verify run: one Diffusers process and up to two engine ranks, started once, used by all rungs.

Imports cost far more than the work, so nothing is started twice; nothing is started that no rung asks for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from porter.interrupts import end_session, uninterrupted
from porter.verify.environment import check_environment
from porter.verify.outcome import VerifyError
from porter.verify.platform import bootstrap

HERE = Path(__file__).resolve().parent
START_TIMEOUT = 300.0
JOB_TIMEOUT = 600.0
GRACE = 3.0


class JobError(Exception):
    """A job raised on the other side. `kind` is the exception's class name there."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace


class Worker:
    """A program that answers one JSON line per JSON line. Tensors travel in files."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], folder: Path) -> None:
        self.name, self.command, self.env, self.log = name, command, env, folder / f"{name}.log"
        self.process: subprocess.Popen[str] | None = None
        self.import_seconds = 0.0
        self.deadline: float | None = None
        self.greeting: dict[str, Any] = {}
        self._greeted = False

    def start(self) -> None:
        """Start importing; returns at once."""
        if self.process is None:
            with uninterrupted(), self.log.open("w") as log:
                # A session of its own: an interrupt at the terminal is for the parent, which ends its workers.
                self.process = subprocess.Popen(
                    self.command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    start_new_session=True,
                )  # fmt: skip

    def ready(self) -> None:
        """Wait until the imports are done."""
        self.greet(START_TIMEOUT)

    def greet(self, timeout: float) -> dict[str, Any]:
        """Wait until the imports are done; what the program said of itself then."""
        self.start()
        if not self._greeted:
            self.greeting = self._read(timeout)
            self.import_seconds = self.greeting.get("import_seconds", 0.0)
            self._greeted = True
        return self.greeting

    def send(self, job: dict[str, Any]) -> None:
        self.ready()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None

    def receive(self, timeout: float = JOB_TIMEOUT) -> dict[str, Any]:
        answer = self._read(timeout)
        if not answer.get("ok"):
            raise JobError(answer.get("type", "Error"), answer.get("error", ""), answer.get("traceback", ""))
        return answer

    def call(self, job: dict[str, Any], timeout: float = JOB_TIMEOUT) -> dict[str, Any]:
        self.send(job)
        return self.receive(timeout)

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if self.deadline is not None and self._greeted:
            timeout = max(0.0, min(timeout, self.deadline - time.monotonic()))
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            self.kill(grace=0.0)
            raise VerifyError(f"{self.name} gave no answer in {timeout:.0f} s", f"its last lines:\n{self._tail()}")
        line = self.process.stdout.readline()
        if not line:
            raise self._dead()
        return json.loads(line)

    def _dead(self) -> VerifyError:
        code = self.process.wait(5) if self.process else None
        self.process, self._greeted = None, False
        return VerifyError(f"{self.name} ended with exit status {code}", f"its last lines:\n{self._tail()}")

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""

    def resident(self) -> int:
        """Bytes of memory that the process holds; 0 where there is none or the system does not say."""
        status = Path(f"/proc/{self.process.pid}/statm") if self.process else None
        if status is None or not status.exists():
            return 0
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def hang_up(self) -> None:
        """Let the process know that no job follows: it ends after the one it is at."""
        for stream in (self.process.stdin, self.process.stdout) if self.process else ():
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def kill(self, grace: float = GRACE) -> None:
        """End the process and what it started, after `grace` seconds by force; a later job starts a fresh one."""
        self.hang_up()
        process, self.process, self._greeted = self.process, None, False
        if process is None:
            return
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_session(process)


class Bench:
    """Owns the workers and a scratch folder. Use as a context manager; `generated` may change between jobs."""

    def __init__(self, *, threads: int = 1, keep: Path | None = None) -> None:
        problems = check_environment()
        if problems:
            raise VerifyError(problems[0].title, problems[0].advice, problems[0].code)
        self.folder = Path(tempfile.mkdtemp(prefix="porter_verify_")) if keep is None else keep
        self._keep = keep is not None
        self._numbers = itertools.count()
        self._subjects = 0
        env = bootstrap.environment() | {"PORTER_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        plain = {k: v for k, v in env.items() if k not in ("PYTHONPATH",)} | (
            {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
        )
        self.env = env
        self.baseline = Worker("diffusers", [sys.executable, "-P", str(HERE / "baseline.py")], plain, self.folder)
        engine = [sys.executable, "-P", "-m", "porter.verify.engine_worker"]
        self.ranks = tuple(Worker(f"engine{r}", [*engine, str(r)], env, self.folder) for r in range(2))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, within a few seconds in all."""
        workers = (self.baseline, *self.ranks)
        limit = time.monotonic() + GRACE
        try:
            for worker in workers:
                worker.hang_up()
            for worker in workers:
                worker.kill(max(0.0, limit - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill(0.0)
            if not self._keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def warm(self, *, engine: int = 1, baseline: bool = True) -> None:
        """Start the imports of the processes that will be needed, all at once."""
        if baseline:
            self.baseline.start()
        for worker in self.ranks[:engine]:
            worker.start()

    def ready(self) -> None:
        """Wait for every process that was started."""
        for worker in (self.baseline, *self.ranks):
            if worker.process is not None:
                worker.ready()

    def limit(self, seconds: float | None) -> None:
        """From now on, all jobs together may take so long; the worker that is late is ended. None: no limit."""
        for worker in (self.baseline, *self.ranks):
            worker.deadline = None if seconds is None else time.monotonic() + seconds

    def check_time(self) -> None:
        """Raise VerifyError when the limit is over."""
        if self.baseline.deadline is not None and time.monotonic() > self.baseline.deadline:
            raise VerifyError("no time is left of the limit for one class")

    def tidy(self, *, restart_after: int, memory: int) -> None:
        """Forget what a subject left behind: references, checkpoints, scratch files.

        Workers keep the modules they imported, so all of them end after `restart_after` subjects, and one that holds
        more than `memory` bytes at once; the next job starts them again.
        """
        for kept in ("module_references", "pipeline_references", "checkpoints"):
            self.__dict__.pop(kept, None)
        for entry in list(os.scandir(self.folder)):
            if not entry.name.endswith(".log"):
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        self._subjects += 1
        for worker in (self.baseline, *self.ranks):
            if self._subjects % restart_after == 0 or worker.resident() > memory:
                worker.kill()

    def path(self, stem: str, suffix: str = ".pt") -> str:
        """A fresh file name in the scratch folder."""
        return str(self.folder / f"{next(self._numbers):04d}-{stem}{suffix}")

    def engine(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job on one rank alone."""
        return self.ranks[0].call(job | {"rank": 0, "world": 1, "port": free_port()})

    def engine_pair(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The same job on both ranks of a group of two. The first error wins; both answers are always read."""
        port = free_port()
        for rank, worker in enumerate(self.ranks):
            worker.start()
            worker.send(job | {"rank": rank, "world": 2, "port": port, "out": f"{job['out']}.rank{rank}"})
        answers: list[dict[str, Any]] = []
        errors: list[Exception] = []
        deadline = JOB_TIMEOUT
        for worker in self.ranks:
            try:
                answers.append(worker.receive(deadline))
            except (JobError, VerifyError) as error:
                errors.append(error)
                deadline = 20.0  # a peer that waits for a dead rank does not answer
        if errors:
            if len(errors) == 1 or any(isinstance(e, VerifyError) for e in errors):
                for worker in self.ranks:
                    worker.kill()
            raise errors[0]
        return answers

    @property
    def import_seconds(self) -> float:
        """Sum over processes of the time spent importing (they overlap in wall time)."""
        return sum(w.import_seconds for w in (self.baseline, *self.ranks))


PORTS = range(20_000, 32_000)
"""Below the range from which systems take the local ends of connections: nobody takes one before a rank listens."""


def free_port() -> int:
    """A TCP port of PORTS that nothing is bound to. Raises VerifyError when there is none."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise VerifyError(
        f"no free TCP port between {PORTS.start} and {PORTS.stop}", "the ranks need one to find each other"
    )


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start
