"""`python -m porter`, and the installed command."""

from __future__ import annotations

import gc
import signal
import sys
from types import FrameType
from typing import NoReturn


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def entry() -> NoReturn:
    """The command, and a quick end. What ends it from outside is an interrupt to it, from the first import on."""
    signal.signal(signal.SIGTERM, _stop)
    if sys.argv[1:2] == ["convert"]:
        gc.disable()  # trees hold no cycles and live until the port is printed, and so does all that is imported
    try:
        from porter.cli import main

        code = main()
    except KeyboardInterrupt:
        from porter.exits import interrupted

        code = interrupted()
    gc.freeze()  # what is left lives as long as the process: a last search for cycles in it is lost time
    sys.exit(code)


if __name__ == "__main__":
    entry()
