"""`python -m porter`, and the installed command."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end(code: int) -> NoReturn:
    """End without taking all trees apart first, which takes as long as printing them."""
    with suppress(BrokenPipeError, ValueError):  # nobody listens
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def entry() -> NoReturn:
    """The command, and a quick end. What ends it from outside is an interrupt to it, from the first import on."""
    signal.signal(signal.SIGTERM, _stop)
    converting = sys.argv[1:2] == ["convert"]
    if converting:
        gc.disable()  # trees hold no cycles and live until the port is printed, and so does all that is imported
    try:
        from porter.cli import main

        code = main()
    except KeyboardInterrupt:
        from porter.exits import interrupted

        code = interrupted()
    if converting:
        _end(code)
    gc.freeze()  # what is left lives as long as the process: a last search for cycles in it is lost time
    sys.exit(code)


if __name__ == "__main__":
    entry()
