"""A sweep runs what is not settled, keeps results as they come, and outlives a port that breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from porter.verify import sweep as module
from porter.verify.outcome import Again, CaseResult, RungResult, VerifyError, rung_of
from porter.verify.report import FEATURE_OF_RUNG
from porter.verify.sweep import sweep

ROWS = {"Net": "net_transformer", "OnePipeline": "pipeline_one", "TwoPipeline": "pipeline_two"}
RUNGS = ("module", "tp", "pipeline", "step")


class Bench:
    """Stands in for the processes: counts what is asked of it."""

    def __init__(self) -> None:
        self.tidied = 0

    def warm(self, *, engine: int) -> None: ...

    def ready(self) -> None: ...

    def limit(self, seconds: float | None) -> None: ...

    def tidy(self, **_: Any) -> None:
        self.tidied += 1


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    folder = tmp_path / "generated"
    (folder / "net").mkdir(parents=True)
    for name in ROWS.values():
        (folder / f"net/{name}.py").write_text(f"{name} = 1\n")
    net = {"transformer": {"source": "diffusers.Net", "module": "net_transformer", "class": "Net"}}
    ports = [
        {"source": f"diffusers.{n}", "arch": n, "folder": "net", "module": m, "class": n, "denoisers": net}
        for n, m in ROWS.items()
        if n != "Net"
    ]
    features = {"step_execution": {"status": "unsupported", "reason": "two loops"}}
    (folder / "port.json").write_text("{}")
    (folder / "net/port.json").write_text(json.dumps({"pipelines": {"TwoPipeline": {"features": features}}}))
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "ports": ports}))
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was run, as (class, rung, ...); a class named in `failing` fails, one named in `broken` raises."""
    seen: list[tuple[str, ...]] = []

    def result(name: str, rung: str) -> RungResult:
        status = "failed" if (name, rung) in FAILING else "passed"
        return rung_of(rung, name, [CaseResult("a", status, "", {"rel_l2": 0.0})], 1.0)

    def run(_bench: Any, _generated: Any, subject: Any, wanted: Any, *_: Any) -> list[RungResult]:
        seen.append((subject.source_class, *wanted))
        if subject.source_class in BROKEN:
            raise VerifyError("the case file is wrong")
        return [result(subject.source_class, rung) for rung in wanted]

    FAILING.clear()
    BROKEN.clear()
    monkeypatch.setattr(module, "denoiser_rungs", run)
    monkeypatch.setattr(module, "pipeline_rungs", run)
    return seen


FAILING: set[tuple[str, str]] = set()
BROKEN: set[str] = set()


def go(catalogue: Path, *names: str, rungs: tuple[str, ...] = RUNGS, again: Again = Again.unproven) -> Any:
    return sweep(names, catalogue, rungs, evidence=catalogue / "evidence.json", again=again, bench=Bench())  # type: ignore[arg-type]


ALL = [("Net", "module", "tp"), ("OnePipeline", "pipeline", "step"), ("TwoPipeline", "pipeline")]


def test_each_denoiser_runs_once_and_a_mode_that_a_port_lacks_does_not_run(catalogue, ran):
    assert go(catalogue).passed
    assert ran == ALL


def test_a_second_sweep_runs_nothing(catalogue, ran):
    go(catalogue)
    ran.clear()
    go(catalogue)
    assert ran == []


def test_a_change_in_one_pipeline_runs_that_pipeline_again(catalogue, ran):
    go(catalogue)
    ran.clear()
    (catalogue / "net/pipeline_one.py").write_text("x = 2\n")
    go(catalogue)
    assert ran == ALL[1:2]


def test_a_change_in_the_denoiser_runs_everything_that_uses_it(catalogue, ran):
    go(catalogue)
    ran.clear()
    (catalogue / "net/net_transformer.py").write_text("x = 2\n")
    go(catalogue)
    assert ran == ALL


def test_a_rung_that_is_new_runs_alone(catalogue, ran):
    go(catalogue, rungs=("module",))
    ran.clear()
    go(catalogue, rungs=("weights", "module"))
    assert ran == [("Net", "weights")]


def test_what_failed_runs_again_unless_only_changes_are_asked_for(catalogue, ran):
    FAILING.add(("OnePipeline", "step"))
    assert go(catalogue).failed
    ran.clear()
    assert not go(catalogue, again=Again.unknown).failed
    assert ran == []
    go(catalogue)
    assert ran == [("OnePipeline", "step")]
    ran.clear()
    go(catalogue, again=Again.all)
    assert ran == ALL


def test_other_cases_run_again(catalogue, ran, monkeypatch):
    go(catalogue)
    ran.clear()
    for place in ("porter.verify.sweep", "porter.verify.run"):
        monkeypatch.setattr(f"{place}.cases_digest", lambda name, corpus=None: "new" if name == "Net" else "")
    go(catalogue)
    assert ran == ALL[:1]


def test_a_port_that_breaks_does_not_end_the_sweep(catalogue, ran):
    BROKEN.add("Net")
    report = go(catalogue)
    assert ran == ALL
    assert [r.rung for r in report.rungs if r.status == "failed"] == ["module", "tp"]


def test_results_are_kept_when_a_sweep_is_interrupted(catalogue, ran, monkeypatch):
    run = module.pipeline_rungs

    def interrupted(bench: Any, generated: Any, port: Any, *rest: Any) -> list[RungResult]:
        if port.source_class == "TwoPipeline":
            raise KeyboardInterrupt
        return run(bench, generated, port, *rest)

    monkeypatch.setattr(module, "pipeline_rungs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(catalogue)
    monkeypatch.setattr(module, "pipeline_rungs", run)
    ran.clear()
    go(catalogue)
    assert ran == ALL[2:]
    features = json.loads((catalogue / "manifest.json").read_text())["ports"][0]["features"]
    assert {features[FEATURE_OF_RUNG[r]]["status"] for r in RUNGS} == {"validated"}


def test_a_named_pipeline_brings_its_denoiser(catalogue, ran):
    go(catalogue, "TwoPipeline")
    assert ran == [ALL[0], ALL[2]]


def test_an_unknown_name_is_refused_before_anything_runs(catalogue, ran):
    with pytest.raises(VerifyError, match="no port of Nobody"):
        go(catalogue, "Nobody")
    assert ran == []


def test_the_bench_is_cleared_after_every_class(catalogue, ran):
    bench = Bench()
    sweep([], catalogue, RUNGS, evidence=catalogue / "evidence.json", bench=bench)  # type: ignore[arg-type]
    assert bench.tidied == len(ALL)


def test_serve_runs_only_when_asked_for(catalogue, ran):
    sweep([], catalogue, evidence=catalogue / "evidence.json", bench=Bench())  # type: ignore[arg-type]
    assert "serve" not in {rung for _, *rungs in ran for rung in rungs}
    ran.clear()
    go(catalogue, rungs=("serve",))
    assert ran == [("OnePipeline", "serve"), ("TwoPipeline", "serve")]
