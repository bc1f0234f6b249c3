"""The door of verification: which rungs run for a pipeline or denoiser, in which order, on one bench."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from porter.evidence import remember
from porter.verify.bench import Bench, Clock
from porter.verify.cases import ModuleCase, load_cases
from porter.verify.environment import versions
from porter.verify.manifest import Denoiser, Manifest, Port, find, merge_features, read_manifest
from porter.verify.outcome import RungResult, VerifyError, skipped
from porter.verify.pipeline_spec import load_spec
from porter.verify.report import VerifyReport, command_line, feature_states

DENOISER_RUNGS = ("static", "weights", "module", "tp", "sp")
PIPELINE_RUNGS = ("pipeline", "cfg", "step", "batch", "serve")
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
    update_manifest: bool = False,
    evidence: Path | str | None = None,
    progress: Progress | None = None,
    bench: Bench | None = None,
) -> VerifyReport:
    """Verify the port of a pipeline or denoiser class on the real engine beside Diffusers.

    `rungs` is a choice of RUNGS (default: all that fit). `checkpoint` replaces the tiny random checkpoint.
    `corpus` is a folder like tests/corpus. `report` names a JSON file to write. A given `bench` stays open.
    Raises VerifyError when nothing can run: unknown name, engine missing or of another version, broken manifest.
    """
    chosen = _chosen(rungs)
    manifest = read_manifest(generated_dir)
    port, denoisers = find(manifest, name)
    clock = Clock()
    say = progress or (lambda _text: None)
    results: list[RungResult] = []
    if "static" in chosen:
        results += [_static(generated_dir, folder, say) for folder in _folders(port, denoisers)]
    heavy = [r for r in chosen if r != "static"]
    imports = 0.0
    if heavy:
        if checkpoint is not None:
            from porter.verify.checkpoint import check_checkpoint

            check_checkpoint(checkpoint)
        own = bench is None
        bench = bench or Bench(threads=threads)
        try:
            bench.warm(engine=2 if PAIRED & set(heavy) else 1)
            say("importing the engine and Diffusers")
            bench.ready()
            for denoiser in denoisers:
                results += _denoiser_rungs(bench, generated_dir, denoiser, heavy, corpus, say)
            if port is not None:
                results += _pipeline_rungs(bench, generated_dir, port, heavy, corpus, checkpoint, say)
            imports = bench.import_seconds
        finally:
            if own:
                bench.close()
    done = VerifyReport(name, command_line(), versions(), tuple(results), clock(), imports)
    if report is not None:
        done.write(report)
    if update_manifest:
        record(generated_dir, manifest, port, denoisers, done, evidence)
    return done


def record(
    generated: Path | str,
    manifest: Manifest,
    port: Port | None,
    denoisers: tuple[Denoiser, ...],
    report: VerifyReport,
    evidence: Path | str | None = None,
) -> None:
    """Merge a report into the manifest's features: of the port, or of every port that uses the denoiser."""
    states = feature_states(tuple(r for r in report.rungs if r.rung != "static"))
    sources = {d.source for d in denoisers}
    rows = [port] if port is not None else [p for p in manifest.ports if sources & {d.source for d in p.denoisers}]
    found = {p.arch: states for p in rows}
    merge_features(generated, found)
    if evidence is not None:
        remember(Path(evidence), Path(generated), found)


def _chosen(rungs: Iterable[str] | None) -> tuple[str, ...]:
    wanted = tuple(RUNGS if rungs is None else rungs)
    if unknown := [r for r in wanted if r not in RUNGS]:
        raise VerifyError(f"no rung called {', '.join(unknown)}", f"the rungs are: {', '.join(RUNGS)}")
    return tuple(r for r in RUNGS if r in wanted)


def _folders(port: Port | None, denoisers: tuple[Denoiser, ...]) -> list[str]:
    return sorted({d.folder for d in denoisers} | ({port.folder} if port else set()))


def _static(generated: Path | str, folder: str, say: Progress) -> RungResult:
    from porter.verify.rungs.static import static

    say(f"static {folder}")
    return static(generated, folder)


def _denoiser_rungs(
    bench: Bench, generated: Path | str, denoiser: Denoiser, wanted: list[str], corpus: Path | str | None, say: Progress
) -> list[RungResult]:
    from porter.verify.rungs.module import module
    from porter.verify.rungs.tp import sp, tp
    from porter.verify.rungs.weights import weights

    table: dict[str, Callable[[Bench, Path | str, Denoiser, Iterable[ModuleCase]], RungResult]] = {
        "weights": weights, "module": module, "tp": tp, "sp": sp
    }  # fmt: skip
    cases = load_cases(denoiser.source_class, Path(corpus) / "configs" if corpus else None)
    results = []
    for rung, run in table.items():
        if rung in wanted:
            say(f"{rung} {denoiser.source_class}")
            reason = f"no tests/corpus/configs/{denoiser.source_class}.yaml"
            results.append(
                run(bench, generated, denoiser, cases) if cases else skipped(rung, denoiser.source_class, reason)
            )
    return results


def _pipeline_rungs(
    bench: Bench,
    generated: Path | str,
    port: Port,
    wanted: list[str],
    corpus: Path | str | None,
    checkpoint: Path | str | None,
    say: Progress,
) -> list[RungResult]:
    from porter.verify.rungs.modes import batch, cfg, step
    from porter.verify.rungs.pipeline import pipeline
    from porter.verify.rungs.serve import serve

    spec = load_spec(port.source_class, Path(corpus) / "pipelines" if corpus else None)
    if spec is not None and checkpoint is not None:
        bench.__dict__.setdefault("checkpoints", {})[spec.pipeline] = str(Path(checkpoint).resolve())
    table = {"pipeline": pipeline, "cfg": cfg, "step": step, "batch": batch, "serve": serve}
    results = []
    for rung, run in table.items():
        if rung in wanted:
            say(f"{rung} {port.source_class}")
            results.append(run(bench, generated, port, spec))
    return results
