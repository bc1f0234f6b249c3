"""What `porter bench` does: measure, write the record, print a short table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from porter.bench.drive import Options, bench
from porter.bench.judge import passed, short_table
from porter.bench.sides import SIDES
from porter.exits import OK, VERIFICATION
from porter.verify.outcome import VerifyError


def run(names: Sequence[str], options: Options, *, cards: int = 1, modes: Sequence[str] = ()) -> int:
    """Exit code 0 when every side ran and agrees, 5 otherwise. Raises VerifyError when nothing can run."""
    if unknown := set(options.sides) - set(SIDES):
        raise VerifyError(f"no side called {', '.join(sorted(unknown))}", f"the sides are: {', '.join(SIDES)}")
    if cards == 2:
        from porter.bench.parallel import bench_parallel

        data = bench_parallel(names, options, modes, _say)
    else:
        data = bench(names, options, _say)
    print(short_table(data))
    return OK if passed(data) else VERIFICATION


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
