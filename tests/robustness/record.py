"""What runs found, as data: `results.json`, one entry for conversions and one for comparisons on the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from porter.emit.write import write_atomically
from porter.verify.environment import versions

RESULTS = Path(__file__).with_name("results.json")


def record(
    kind: str, command: str, mutants: range, outcomes: Mapping[str, int], found: Sequence[str], seconds: float
) -> None:
    """Replace the entry of `kind` by a run over mutants, whose numbers are their seeds.

    `found` has a line for each mutant that must not be: a crash, a bad output, a silent difference.
    """
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[kind] = {
        "command": command,
        "first": mutants.start,
        "found": list(found),
        "mutants": sum(outcomes.values()),
        "numbers": len(mutants),
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(seconds),
        "versions": versions(),
    }
    write_atomically({RESULTS.name: json.dumps(dict(sorted(known.items())), indent=1) + "\n"}, RESULTS.parent)
