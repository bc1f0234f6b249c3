"""The door of verification: which rungs run for a pipeline or denoiser, in which order, on one bench."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from porter.evidence import Finding, remember
from porter.verify.bench import Bench, Clock, JobError
from porter.verify.cases import ModuleCase, corpus_root, load_cases
from porter.verify.environment import versions
from porter.verify.manifest import Denoiser, Port, find, read_manifest, refresh_features
from porter.verify.outcome import CaseResult, RungResult, VerifyError, rung_of, skipped
from porter.verify.pipeline_spec import PipelineSpec, load_spec
from porter.verify.report import FEATURE_OF_RUNG, VerifyReport, command_line, feature_states

DENOISER_RUNGS = ("static", "weights", "module", "bf16", "tp", "sp")
PIPELINE_RUNGS = ("pipeline", "cfg", "step", "batch", "cache", "serve")
RUNGS = DENOISER_RUNGS + PIPELINE_RUNGS
PAIRED = frozenset({"tp", "sp", "cfg"})

Progress = Callable[[str], None]


def verify(
    name: str,
    generated_dir: Path | str = "generated",
    rungs: Iterable[str] | None = None,
    checkpoint: Path | str | None = None,
    *,
    corpus: Path | str | None = None,
    threads: int = 1,
    report: Path | str | None = None,
    evidence: Path | str | None = None,
    progress: Progress | None = None,
    bench: Bench | None = None,
) -> VerifyReport:
    """Verify the port of a pipeline or denoiser class on the real engine beside Diffusers.

    `rungs` is a choice of RUNGS (default: all that fit). `checkpoint` replaces the tiny random checkpoint.
    `corpus` is a folder like tests/corpus. `report` names a JSON file to write. `evidence` names the file
    in which the results are recorded; the manifest then cites them. A given `bench` stays open.
    Raises VerifyError when nothing can run: unknown name, engine missing or of another version, broken manifest.
    """
    chosen = chosen_rungs(rungs)
    manifest = read_manifest(generated_dir)
    port, denoisers = find(manifest, name)
    if checkpoint is not None:
        from porter.verify.checkpoint import check_checkpoint

        check_checkpoint(checkpoint)
    clock = Clock()
    say = progress or (lambda _text: None)
    results: list[RungResult] = []
    if "static" in chosen:
        results += [static_rung(generated_dir, folder, say) for folder in _folders(port, denoisers)]
    heavy = [r for r in chosen if r != "static"]
    imports = 0.0
    if heavy:
        own = bench is None
        bench = bench or Bench(threads=threads)
        try:
            bench.warm(engine=2 if PAIRED & set(heavy) else 1)
            say("importing the engine and Diffusers")
            bench.ready()
            for denoiser in denoisers:
                results += denoiser_rungs(bench, generated_dir, denoiser, heavy, corpus, say)
            if port is not None:
                results += pipeline_rungs(bench, generated_dir, port, heavy, corpus, checkpoint, say)
            imports = bench.import_seconds
        finally:
            if own:
                bench.close()
    done = VerifyReport(name, command_line(), versions(), tuple(results), clock(), imports)
    if report is not None:
        done.write(report)
    if evidence is not None:
        record(evidence, generated_dir, done.rungs, corpus)
        refresh_features(generated_dir, evidence)
    return done


def record(
    evidence: Path | str, generated: Path | str, rungs: Iterable[RungResult], corpus: Path | str | None = None
) -> None:
    """Bind results to the code of the classes that they are about. Rung `static` says nothing about a feature."""
    by_class: dict[str, list[RungResult]] = {}
    for rung in rungs:
        if rung.rung in FEATURE_OF_RUNG:
            by_class.setdefault(rung.subject, []).append(rung)
    findings = {
        name: Finding(
            feature_states(tuple(found)),
            {FEATURE_OF_RUNG[r.rung]: r.seconds for r in found if r.status != "skipped"},
            cases_digest(name, corpus),
        )
        for name, found in by_class.items()
    }
    remember(Path(evidence), Path(generated), findings)


def cases_digest(name: str, corpus: Path | str | None = None) -> str:
    """Twelve digits of the file that holds the cases of a class; empty where there is none."""
    root = Path(corpus) if corpus else corpus_root()
    for path in (root / "configs" / f"{name}.yaml", root / "pipelines" / f"{name}.yaml"):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return ""


def chosen_rungs(rungs: Iterable[str] | None, default: tuple[str, ...] = RUNGS) -> tuple[str, ...]:
    """The rungs of a choice, in the order of the ladder. Raises VerifyError for an unknown one."""
    wanted = tuple(default if rungs is None else rungs)
    if unknown := [r for r in wanted if r not in RUNGS]:
        raise VerifyError(f"no rung called {', '.join(unknown)}", f"the rungs are: {', '.join(RUNGS)}", "PORT013")
    return tuple(r for r in RUNGS if r in wanted)


def _folders(port: Port | None, denoisers: tuple[Denoiser, ...]) -> list[str]:
    return sorted({d.folder for d in denoisers} | ({port.folder} if port else set()))


def static_rung(generated: Path | str, folder: str, say: Progress) -> RungResult:
    """Rung `static` on a folder."""
    from porter.verify.rungs.static import static

    say(f"static {folder}")
    return static(generated, folder)


def denoiser_rungs(
    bench: Bench,
    generated: Path | str,
    denoiser: Denoiser,
    wanted: Iterable[str],
    corpus: Path | str | None,
    say: Progress,
) -> list[RungResult]:
    """Those of the wanted rungs that are about a denoiser. What goes wrong in one is its result; the others run."""
    from porter.verify.rungs.bf16 import bf16
    from porter.verify.rungs.module import module
    from porter.verify.rungs.tp import sp, tp
    from porter.verify.rungs.weights import weights

    table: dict[str, Callable[[Bench, Path | str, Denoiser, Iterable[ModuleCase]], RungResult]] = {
        "weights": weights, "module": module, "bf16": bf16, "tp": tp, "sp": sp
    }  # fmt: skip
    name = denoiser.source_class
    cases = load_cases(name, Path(corpus) / "configs" if corpus else None)
    results = []
    for rung in (r for r in table if r in wanted):
        say(f"{rung} {name}")
        if not cases:
            results.append(skipped(rung, name, f"no tests/corpus/configs/{name}.yaml"))
            continue
        results.append(attempt(bench, rung, name, partial(table[rung], bench, generated, denoiser, cases)))
    return results


def pipeline_rungs(
    bench: Bench,
    generated: Path | str,
    port: Port,
    wanted: Iterable[str],
    corpus: Path | str | None,
    checkpoint: Path | str | None,
    say: Progress,
) -> list[RungResult]:
    """Those of the wanted rungs that are about a pipeline.

    A mode that the port was generated without is not run: the port says why. Without a checkpoint, and where no request
    works, the other rungs are skipped.
    """
    from porter.verify.rungs.batch import batch
    from porter.verify.rungs.cache import cache
    from porter.verify.rungs.modes import cfg, step
    from porter.verify.rungs.pipeline import pipeline
    from porter.verify.rungs.serve import serve

    name = port.source_class
    spec = load_spec(name, Path(corpus) / "pipelines" if corpus else None)
    if spec is not None and checkpoint is not None:
        bench.__dict__.setdefault("checkpoints", {})[spec.pipeline] = str(Path(checkpoint).resolve())
    table: dict[str, Callable[[Bench, Path | str, Port, PipelineSpec | None], RungResult]] = {
        "pipeline": pipeline, "cfg": cfg, "step": step, "batch": batch, "cache": cache, "serve": serve
    }  # fmt: skip
    without = generated_without(generated, port)
    results: list[RungResult] = []
    for rung in (r for r in table if r in wanted and FEATURE_OF_RUNG[r] not in without):
        say(f"{rung} {name}")
        if results and results[0].rung == "pipeline" and not any(c.status == "passed" for c in results[0].cases):
            reason = results[0].reason or "no request works in rung pipeline"
            results.append(skipped(rung, name, reason))
            continue
        results.append(attempt(bench, rung, name, partial(table[rung], bench, generated, port, spec)))
    return results


def generated_without(generated: Path | str, port: Port) -> dict[str, str]:
    """Features that the port was generated without, and why."""
    path = Path(generated) / port.folder / "port.json"
    if not path.is_file():
        return {}
    data: dict[str, Any] = json.loads(path.read_text())
    declared = data.get("pipelines", {}).get(port.arch, {}).get("features", {})
    return {name: feature["reason"] for name, feature in declared.items() if feature["status"] == "unsupported"}


def attempt(bench: Bench, rung: str, subject: str, run: Callable[[], RungResult]) -> RungResult:
    """The result of a rung, or the failure to carry it out."""
    clock = Clock()
    try:
        bench.check_time()
        return run()
    except (JobError, VerifyError) as error:
        where = {"traceback": error.trace} if isinstance(error, JobError) else None
        case = CaseResult("set-up", "failed", str(error)[:600], seconds=clock(), where=where)
    except Exception as error:  # noqa: BLE001 - one rung that breaks must not end a run over many ports
        where = {"traceback": traceback.format_exc()}
        case = CaseResult("set-up", "failed", f"{type(error).__name__}: {error}"[:600], seconds=clock(), where=where)
    return rung_of(rung, subject, [case], clock())
