"""Convert mutants of Diffusers' files: `python -m tests.robustness [--first N] [--count N] [--engine]`.

Prints each crash and each bad output, then how many mutants were converted, diagnosed and refused. Exit status 1 if there
was a crash, a bad output, or, with --engine, a port that silently differs from Diffusers run from the same source.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.robustness.record import record
from tests.robustness.trial import count, trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--engine", action="store_true", help="also run what converts, beside Diffusers")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    parser.add_argument("--seconds", type=float, help="begin no mutant after so many seconds")
    parser.add_argument("--record", action="store_true", help="put the counts into results.json")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    started = time.monotonic()
    if options.engine:
        from tests.robustness.semantics import run

        done, outcomes, silent = run(numbers, options.verbose, options.seconds)
        if options.record:
            record("engine", _command(), done, outcomes, silent, time.monotonic() - started)
        return 1 if silent else 0
    verdicts: Counter[str] = Counter()
    bad: list[str] = []
    for number in numbers:
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            numbers = range(numbers.start, number)
            break
        found, _ = trial(number)
        verdicts[found.verdict] += 1
        if found.verdict in ("crashed", "bad output"):
            bad.append(found.line())
        if options.verbose or found.verdict in ("crashed", "bad output"):
            print(found.line(), flush=True)
    print(f"{len(numbers)} mutants: {count(verdicts)}")
    if options.record:
        record("convert", _command(), numbers, verdicts, bad, time.monotonic() - started)
    return 1 if bad else 0


def _command() -> str:
    return " ".join(["python -m tests.robustness", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
