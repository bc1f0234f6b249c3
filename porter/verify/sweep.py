"""Verification at the scale of the catalogue: many classes on one bench, each denoiser once, results kept as they come.

A sweep is a list of jobs, one per class. It runs only what the evidence does not settle yet for the code and cases of
today, so one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from porter.evidence import digests, read_evidence, reader
from porter.verify.bench import Bench, Clock
from porter.verify.environment import versions
from porter.verify.manifest import Denoiser, Manifest, Port, find, read_manifest, refresh_features
from porter.verify.outcome import Again, CaseResult, RungResult, VerifyError, rung_of
from porter.verify.report import FEATURE_OF_RUNG, VerifyReport, command_line
from porter.verify.run import (
    DENOISER_RUNGS,
    PAIRED,
    PIPELINE_RUNGS,
    RUNGS,
    cases_digest,
    chosen_rungs,
    denoiser_rungs,
    generated_without,
    pipeline_rungs,
    record,
    static_rung,
)

DEFAULT_RUNGS = tuple(r for r in RUNGS if r != "serve")
"""`serve` starts the engine anew for each port, which takes longer than all other rungs; it runs when asked for."""

LIMIT = 300.0
"""Seconds that one class may take."""
RESTART_AFTER = 25
MEMORY = 3 * 2**30
"""Workers end after so many classes, or when one holds so many bytes: they keep each module that they imported."""

SETTLED: Mapping[Again, tuple[str, ...]] = {
    Again.unproven: ("validated", "not tested"),
    Again.unknown: ("validated", "not tested", "limited", "unsupported"),
    Again.all: (),
}
"""Statuses that a sweep takes from the evidence."""


@dataclass(frozen=True, slots=True)
class Job:
    """The rungs of one class that are to run. Exactly one of `port` and `denoiser` is there."""

    name: str
    rungs: tuple[str, ...]
    port: Port | None = None
    denoiser: Denoiser | None = None


Follow = Callable[[Job, int, int, str], None]
"""Is told the job, its number, the number of jobs, and what runs; after a job, with an empty text."""


def plan(
    manifest: Manifest,
    generated: Path,
    names: Iterable[str],
    rungs: tuple[str, ...],
    evidence: Path,
    again: Again,
    corpus: Path | None = None,
) -> list[Job]:
    """Jobs for `names` (all classes if empty): denoisers first, each once, then pipelines. Raises VerifyError."""
    ports, denoisers = _subjects(manifest, names)
    known, current = read_evidence(evidence), _digests(manifest, generated)
    jobs = []
    for name, denoiser in denoisers.items():
        open_rungs = [r for r in rungs if r in DENOISER_RUNGS and r in FEATURE_OF_RUNG]
        jobs.append(Job(name, _pending(name, open_rungs, known, current, again, corpus), denoiser=denoiser))
    for name, port in ports.items():
        without = generated_without(generated, port)
        open_rungs = [r for r in rungs if r in PIPELINE_RUNGS and FEATURE_OF_RUNG[r] not in without]
        jobs.append(Job(name, _pending(name, open_rungs, known, current, again, corpus), port=port))
    return [job for job in jobs if job.rungs]


def _subjects(manifest: Manifest, names: Iterable[str]) -> tuple[dict[str, Port], dict[str, Denoiser]]:
    found = [find(manifest, name) for name in names] or [(p, p.denoisers) for p in manifest.ports]
    ports = {p.source_class: p for p, _ in found if p is not None and p.module is not None}
    denoisers = {d.source_class: d for _, ds in found for d in ds}
    return dict(sorted(ports.items())), dict(sorted(denoisers.items()))


def _digests(manifest: Manifest, generated: Path) -> dict[str, str]:
    current: dict[str, str] = {}
    for port in manifest.ports:
        row: dict[str, Any] = {"folder": port.folder, "source": port.source, "module": port.module}
        row["denoisers"] = {d.component: {"source": d.source, "module": d.module} for d in port.denoisers}
        current.update(digests(row, reader(generated)))
    return current


def _pending(
    name: str,
    rungs: list[str],
    known: Mapping[str, Any],
    current: Mapping[str, str],
    again: Again,
    corpus: Path | None,
) -> tuple[str, ...]:
    row = known.get(name, {})
    if row.get("digest") != current[name]:
        return tuple(rungs)
    cases = cases_digest(name, corpus)
    settled = {
        feature
        for feature, state in row["features"].items()
        if state["status"] in SETTLED[again] and row.get("cases", {}).get(feature) == cases
    }
    return tuple(r for r in rungs if FEATURE_OF_RUNG[r] not in settled)


def sweep(
    names: Iterable[str],
    generated: Path | str = "generated",
    rungs: Iterable[str] | None = None,
    *,
    evidence: Path,
    again: Again = Again.unproven,
    corpus: Path | None = None,
    threads: int = 1,
    limit: float = LIMIT,
    follow: Follow = lambda job, number, total, text: None,
    bench: Bench | None = None,
) -> VerifyReport:
    """Verify classes one after the other; results are in `evidence` after each, and in the manifest at the end.

    `limit` is the time in seconds that one class may take. A given `bench` stays open.
    Raises VerifyError when nothing can run: unknown name, engine missing or of another version, broken manifest.
    """
    generated = Path(generated)
    chosen = chosen_rungs(rungs, DEFAULT_RUNGS)
    manifest = read_manifest(generated)
    names = list(names)
    jobs = plan(manifest, generated, names, chosen, evidence, again, corpus)
    clock, results, own = Clock(), _static(manifest, generated, names, chosen), bench is None
    if jobs:
        bench = bench or Bench(threads=threads)
        try:
            for number, job in enumerate(jobs, 1):
                found = _run(bench, generated, job, corpus, limit, partial(follow, job, number, len(jobs)))
                record(evidence, generated, found, corpus)
                results += found
                follow(job, number, len(jobs), "")
        finally:
            if own:
                bench.close()
            refresh_features(generated, evidence)
    return VerifyReport("catalogue", command_line(), versions(), tuple(results), clock(), 0.0)


def _static(manifest: Manifest, generated: Path, names: list[str], chosen: tuple[str, ...]) -> list[RungResult]:
    if "static" not in chosen:
        return []
    ports, denoisers = _subjects(manifest, names)
    folders = {p.folder for p in ports.values()} | {d.folder for d in denoisers.values()}
    return [static_rung(generated, folder, lambda _text: None) for folder in sorted(folders)]


def _run(
    bench: Bench, generated: Path, job: Job, corpus: Path | None, limit: float, say: Callable[[str], None]
) -> list[RungResult]:
    """The rungs of one job; afterwards nothing of it is left on the bench."""
    try:
        bench.warm(engine=2 if PAIRED & set(job.rungs) else 1)
        bench.ready()
        bench.limit(limit)
        if job.denoiser is not None:
            return denoiser_rungs(bench, generated, job.denoiser, job.rungs, corpus, say)
        assert job.port is not None
        return pipeline_rungs(bench, generated, job.port, job.rungs, corpus, None, say)
    except VerifyError as error:
        case = CaseResult("set-up", "failed", error.message)
        return [rung_of(rung, job.name, [case], 0.0) for rung in job.rungs]
    finally:
        bench.limit(None)
        bench.tidy(restart_after=RESTART_AFTER, memory=MEMORY)
