"""Which part of the sweep a test run takes: all parts have their turn as commits go by, and each commit has one part."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def turn() -> int:
    """PORTER_TURN where it is set, else by the commit that is checked out, else by the day."""
    if "PORTER_TURN" in os.environ:
        return int(os.environ["PORTER_TURN"])
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout[:4], 16)
    return datetime.datetime.now(datetime.UTC).date().toordinal()


def share(names: Sequence[str], parts: int, number: int | None = None) -> list[str]:
    """The names of one part out of `parts`; over as many turns each name comes once."""
    wanted = turn() if number is None else number
    return [name for i, name in enumerate(sorted(names)) if i % parts == wanted % parts]
