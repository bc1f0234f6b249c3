"""Run a command of porter, stop it halfway, and see what is left of its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from porter import exits

ROOT = Path(__file__).resolve().parents[1]


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def stopped(arguments: list[str], number: int, how: int, everyone: bool, temporary: Path) -> str:
    """Start a command, wait until it has `number` children, send it (or its group) a signal. Gives what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-m", "porter", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while len(found := children(process.pid)) < number and process.poll() is None:
            assert time.monotonic() < deadline, "it never started its processes"
            time.sleep(0.05)
        (os.killpg if everyone else os.kill)(process.pid, how)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == exits.INTERRUPTED, said
    assert printed == "" and "Traceback" not in said and said.count("PORT010") == 1, said
    assert len(found) == number and not [c for c in found if alive(c)], "children are left"
    return said
