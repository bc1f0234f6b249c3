"""Convert mutants of Diffusers' files: `python -m tests.robustness [--first N] [--count N] [--engine]`.

Prints each crash and each bad output, then how many mutants were converted, diagnosed and refused. Exit status 1 if there
was a crash, a bad output, or, with --engine, a port that silently differs from Diffusers run from the same source.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.robustness.trial import count, trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--engine", action="store_true", help="also run what converts, beside Diffusers")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    if options.engine:
        from tests.robustness.semantics import run

        return run(numbers, options.verbose)
    verdicts: Counter[str] = Counter()
    for number in numbers:
        found, _ = trial(number)
        verdicts[found.verdict] += 1
        if options.verbose or found.verdict in ("crashed", "bad output"):
            print(found.line(), flush=True)
    print(f"{len(numbers)} mutants: {count(verdicts)}")
    return 1 if verdicts["crashed"] or verdicts["bad output"] else 0


if __name__ == "__main__":
    sys.exit(main())
