"""Exit codes of the command line; `porter --help` and the README list them."""

OK = 0
DRIFT = 1
USAGE = 2
FINDINGS = 3
EXAMPLES = 4
VERIFICATION = 5
INTERNAL = 70
INTERRUPTED = 130
