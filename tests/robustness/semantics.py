"""What a port of a changed source computes, beside Diffusers run from the same changed source.

The Diffusers process imports the changed file in place of the installed one; the engine runs the port that porter made
of it. A port may differ only if porter said something about it that it does not say about the unchanged source.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from porter.convert import Conversion
from porter.emit.write import write_atomically
from porter.verify.bench import Bench, JobError
from porter.verify.cases import ModuleCase, build_inputs, load_cases
from porter.verify.compare import worst_difference
from porter.verify.manifest import find, read_manifest
from porter.verify.outcome import BOUND, VerifyError
from porter.verify.rungs.module import engine_job
from tests.robustness.trial import Trial, count, trial

Outcome = Literal["equal", "Diffusers raises", "the port raises", "differs"]
WORST: tuple[Outcome, ...] = ("equal", "Diffusers raises", "the port raises", "differs")
CASES = 3
RESTART_AFTER = 40
MEMORY = 3 * 2**30


def compare(bench: Bench, found: Trial, made: Conversion, folder: Path) -> tuple[Outcome, str]:
    """The worst outcome over the first cases of a denoiser, and what was seen."""
    generated, changed = folder / "generated", folder / "changed.py"
    write_atomically(made.files, generated)
    changed.write_text(found.mutant.text, encoding="utf-8")
    _, denoisers = find(read_manifest(generated), found.target.name)
    outcomes = [
        _case(bench, found, generated, denoisers[0], case, changed) for case in load_cases(found.target.name)[:CASES]
    ]
    return max(outcomes, key=lambda o: WORST.index(o[0]), default=("equal", "no case"))


def _case(
    bench: Bench, found: Trial, generated: Path, denoiser: Any, case: ModuleCase, changed: Path
) -> tuple[Outcome, str]:
    import torch

    files = {"inputs": bench.path("inputs"), "reference": bench.path("reference")}
    torch.save(build_inputs(case.inputs, case.seed), files["inputs"])
    module = "diffusers." + found.target.file.removesuffix(".py").replace("/", ".")
    job = {"job": "module", "class": case.denoiser, "config": dict(case.config), "seed": case.seed}
    job |= {"inputs": files["inputs"], "out": files["reference"], "file": str(changed), "module_of_file": module}
    try:
        bench.baseline.call(job)
    except JobError as error:
        return "Diffusers raises", f"{case.name}: {error}"[:200]
    out = bench.path("port")
    try:
        answer = bench.engine(engine_job(generated, denoiser, case) | files | {"out": out})
    except (JobError, VerifyError) as error:
        return "the port raises", f"{case.name}: {error}"[:300]
    if answer["missing"]:
        return "the port raises", f"{case.name}: not loaded: {', '.join(answer['missing'][:4])}"
    got, want = (torch.load(path, weights_only=True)["output"] for path in (out, files["reference"]))
    error = _difference(got, want)
    return ("equal", "") if error <= BOUND else ("differs", f"{case.name}: relative L2 error {error:.1e}")


def _difference(got: list[Any], want: list[Any]) -> float:
    """Largest relative L2 error; values that are not finite must be so on both sides."""
    import torch

    if len(got) == len(want):
        for a, b in zip(got, want, strict=True):
            if a.shape == b.shape and not torch.equal(torch.isfinite(a), torch.isfinite(b)):
                return float("inf")
    cleaned = [[torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in side] for side in (got, want)]
    return float(worst_difference(*cleaned)["rel_l2"]) if got or want else 0.0


def run(numbers: range, verbose: bool, seconds: float | None = None) -> tuple[range, Counter[str], list[str]]:
    """Trials of denoisers among `numbers` on the engine, as many as begin within `seconds`. Prints what differs.

    Gives the numbers that were tried, how often each outcome came, and a line for each port that differs in silence.
    """
    outcomes: Counter[str] = Counter()
    silent: list[str] = []
    started = time.monotonic()
    with Bench() as bench:
        for number in numbers:
            if seconds is not None and time.monotonic() - started > seconds:
                numbers = range(numbers.start, number)
                break
            found, made = trial(number)
            if found.target.file.startswith("pipelines/"):
                continue
            if made is None or found.verdict == "bad output":
                outcomes[found.verdict] += 1
                continue
            with tempfile.TemporaryDirectory() as folder:
                bench.limit(120)
                try:
                    outcome, detail = compare(bench, found, made, Path(folder))
                except VerifyError as error:
                    outcome, detail = "the port raises", error.message
            bench.limit(None)
            bench.tidy(restart_after=RESTART_AFTER, memory=MEMORY)
            outcomes[f"{outcome} ({found.verdict})"] += 1
            wrong = outcome == "differs" and found.verdict == "converted"
            line = f"{found.line()}: {outcome} {detail}"
            silent += [line] if wrong else []
            if verbose or wrong:
                print(line, flush=True)
    print(f"{sum(outcomes.values())} mutants of denoisers: {count(outcomes)}; {len(silent)} differ in silence")
    return numbers, outcomes, silent
