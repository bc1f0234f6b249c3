"""Exit codes of the command line; `porter --help` and the README list them."""

import sys

OK = 0
DRIFT = 1
USAGE = 2
FINDINGS = 3
EXAMPLES = 4
VERIFICATION = 5
INTERNAL = 70
INTERRUPTED = 130


def interrupted() -> int:
    """Say so, and give the code."""
    print("porter: interrupted; output files are as they were (PORT010)", file=sys.stderr)
    return INTERRUPTED
