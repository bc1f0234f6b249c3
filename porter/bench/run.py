"""What `porter bench` does: measure, write the record, print a short table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from porter.bench.drive import Options, bench
from porter.bench.judge import passed, short_table
from porter.bench.sides import SIDES
from porter.exits import OK, USAGE, VERIFICATION
from porter.verify.outcome import VerifyError


def run(
    classes: Sequence[str], options: Options, *, cards: int = 1, modes: Sequence[str] = (), whole: bool = False
) -> int:
    """Exit code 0 when every side ran and agrees, 5 otherwise, 2 when nothing can run."""
    try:
        return _run(classes, options, cards, modes, whole)
    except VerifyError as error:
        _say(f"porter bench: {error}")
        return USAGE


def _run(classes: Sequence[str], options: Options, cards: int, modes: Sequence[str], whole: bool) -> int:
    if options.device not in ("cuda", "cpu"):
        raise VerifyError(f"no device called {options.device}", "cuda or cpu")
    if unknown := set(options.sides) - set(SIDES):
        raise VerifyError(f"no side called {', '.join(sorted(unknown))}", f"the sides are: {', '.join(SIDES)}")
    if whole and cards == 2:
        raise VerifyError("whole requests run on one card", "leave out --whole or --cards")
    if whole:
        from porter.bench.whole.drive import bench_whole

        data = bench_whole(classes, options, _say)
    elif cards == 2:
        from porter.bench.parallel import bench_parallel

        data = bench_parallel(classes, options, modes, _say)
    else:
        data = bench(classes, options, _say)
    print(short_table(data))
    return OK if passed(data) else VERIFICATION


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def names(text: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
