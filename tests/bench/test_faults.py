"""Faults of single processes cost their own figures only. The faults are real: limits and signals of the system."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from porter.bench import drive
from porter.bench.drive import Crew, Options, bench
from porter.bench.parallel import Pair
from porter.bench.record import Record, read
from porter.bench.run import run
from porter.bench.sides import SIDES, Side
from porter.bench.workload import Workload
from porter.exits import USAGE, VERIFICATION
from porter.verify.bench import Worker
from porter.verify.cases import ModuleCase
from porter.verify.environment import check_environment
from porter.verify.manifest import Manifest
from porter.verify.outcome import VerifyError

needs_diffusers = pytest.mark.skipif(bool(check_environment()), reason="Diffusers and torch are not installed")
MODEL = "FluxTransformer2DModel"
WIDE = 1_500_000
"""Width of the encoded text: its projection takes more megabytes than a process under the limit may have."""


def workload() -> Workload:
    config = {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": WIDE, "pooled_projection_dim": 8,
              "axes_dims_rope": [4, 6, 6]}  # fmt: skip
    inputs = {"hidden_states": {"randn": [1, 6, 4]}, "encoder_hidden_states": {"randn": [1, 3, WIDE]},
              "pooled_projections": {"randn": [1, 8]}, "timestep": {"values": [0.5]}, "img_ids": {"grid": [2, 3]},
              "txt_ids": {"zeros": [3, 3]}}  # fmt: skip
    return Workload(MODEL, (ModuleCase("plain", MODEL, config, inputs),), config)


def starve(pid: int) -> None:
    """No more memory than the process has now, and a little."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (150 << 20),) * 2)


FAULTS = {
    "starved": starve,
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "hung": lambda pid: os.kill(pid, signal.SIGSTOP),
}


@needs_diffusers
def test_memory_that_runs_out_and_dead_and_hung_processes_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FAULTS:
        monkeypatch.setitem(SIDES, name, Side(name, name, "diffusers", "diffusers"))
    monkeypatch.setattr(drive, "workload_of", lambda *_: workload())
    monkeypatch.setattr(drive, "denoisers_of", lambda names, _manifest: tuple(names))
    monkeypatch.setattr(drive, "read_manifest", lambda path: Manifest(path, "", "", ()))
    greet = Crew.greet

    def greet_and_break(self: Crew, timeout: float) -> dict[str, dict[str, Any]]:
        found = greet(self, timeout)
        for name, fault in FAULTS.items():
            process = self.workers[name].process
            assert process is not None
            fault(process.pid)
        return found

    monkeypatch.setattr(Crew, "greet", greet_and_break)
    out = tmp_path / "record.json"
    options = Options(device="cpu", out=out, sides=("diffusers-eager", *FAULTS), rounds=1, step_seconds=25.0)
    assert run([MODEL], options) == VERIFICATION

    row = read(out)["denoisers"][MODEL]
    assert row["sides"]["diffusers-eager"]["rounds"]["plain"] and not row["sides"]["diffusers-eager"]["failures"]
    assert 0 < row["agreement"]["plain"]["diffusers-eager"]["reference"] < 0.1
    said = {name: row["sides"][name]["failures"] for name in FAULTS}
    assert {name: len(messages) for name, messages in said.items()} == dict.fromkeys(FAULTS, 1), said
    assert "out of memory" in said["starved"][0] and "--depth" in said["starved"][0]
    assert "exit status -9" in said["killed"][0]
    assert "no answer in" in said["hung"][0]
    assert len(read(out)["problems"]) == len(FAULTS)


def test_a_machine_without_a_card_is_told_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run([MODEL], Options(device="cuda", out=tmp_path / "record.json")) == USAGE
    assert "no accelerator" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_an_unknown_side_device_or_class_is_a_mistake_in_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    assert run([MODEL], Options(device="cpu", out=out, sides=("fast",))) == USAGE
    assert run([MODEL], Options(device="abacus", out=out)) == USAGE
    assert run(["Nothing"], Options(device="cpu", out=out)) == USAGE
    said = capsys.readouterr().err
    assert "no side called fast" in said and "no device called abacus" in said and "Nothing" in said


@needs_diffusers
def test_a_spent_budget_is_said_and_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "LEAST_SECONDS", 10_000.0)
    options = Options(device="cpu", out=tmp_path / "r.json", sides=("diffusers-eager",), tiny=True, step_seconds=9e9)
    data = bench([MODEL], options)
    assert [p["message"] for p in read(tmp_path / "r.json")["problems"]] == ["skipped: the time budget is spent"]
    assert data["denoisers"] == {}


RANK = """
import sys, time, os
print('{"ok": true}', flush=True)
for line in sys.stdin:
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), 9)
    if sys.argv[1] == "raises":
        print('{"ok": false, "type": "ValueError", "error": "no heads to divide"}', flush=True)
    else:
        time.sleep(600)
"""


@pytest.mark.parametrize(("fate", "message"), [("dies", "exit status -9"), ("raises", "no heads to divide")])
def test_a_rank_that_fails_takes_its_waiting_peer_down(tmp_path: Path, fate: str, message: str) -> None:
    command = [sys.executable, "-c", RANK]
    pair = object.__new__(Pair)
    team = {
        f"rank{r}": Worker(f"rank{r}", [*command, f], dict(os.environ), tmp_path) for r, f in enumerate(("waits", fate))
    }
    pair.crew = type("Crew", (), {"workers": team})()  # type: ignore[assignment]
    pair.budget = drive.Budget(60.0, 30.0)
    with pytest.raises(Exception, match=message):
        pair._all(2, {"job": "run"})
    assert all(worker.process is None for worker in team.values())


def test_a_hung_rank_ends_both_after_the_time_of_a_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, "waits"]
    pair = object.__new__(Pair)
    team = {f"rank{r}": Worker(f"rank{r}", command, dict(os.environ), tmp_path) for r in range(2)}
    pair.crew = type("Crew", (), {"workers": team})()  # type: ignore[assignment]
    pair.budget = drive.Budget(60.0, 2.0)
    with pytest.raises(VerifyError, match="no answer in"):
        pair._all(2, {"job": "run"})
    assert all(worker.process is None for worker in team.values())


POISONED = """
import json, os, sys
print('{"ok": true}', flush=True)
failed = False
for line in sys.stdin:
    job = json.loads(line)
    failed = failed or job["job"] == "run"
    answer = {"ok": True, "pid": os.getpid()}
    if failed:
        answer = {"ok": False, "type": sys.argv[1], "error": sys.argv[2]}
    print(json.dumps(answer), flush=True)
"""
ASSERT = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in the documentation"
CUBLAS = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb )`"


def subject_with(command: list[str], folder: Path) -> tuple[drive.Subject, Worker]:
    """One denoiser whose only worker is `command`."""
    worker = Worker("diffusers-eager", command, dict(os.environ), folder)
    subject = object.__new__(drive.Subject)
    subject.name, subject.say, subject.budget = MODEL, lambda _: None, drive.Budget(60.0, 30.0)
    crew = object.__new__(Crew)
    crew.workers = {worker.name: worker}
    subject.crew = crew
    subject.record = Record(folder / "record.json", {})
    subject.record.denoiser(MODEL, {})
    return subject, worker


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("AcceleratorError", ASSERT),
        ("RuntimeError", CUBLAS),
        ("InternalTorchDynamoError", f"AcceleratorError: {ASSERT}"),
    ],
)
def test_after_an_error_inside_a_kernel_the_next_denoiser_gets_a_fresh_process(
    tmp_path: Path, kind: str, message: str
) -> None:
    subject, worker = subject_with([sys.executable, "-c", POISONED, kind, message], tmp_path)
    side = SIDES["diffusers-eager"]
    try:
        before = subject._call(side, {"job": "load"})
        assert subject._call(side, {"job": "run"}) is None
        assert subject._call(side, {"job": "release"}) is None, "what is left of this denoiser is not tried"
        after = subject._call(side, {"job": "load"})
        assert before is not None and after is not None and before["pid"] != after["pid"]
        assert len(subject.record.data["problems"]) == 1
    finally:
        worker.kill()


@pytest.mark.parametrize(
    ("kind", "message"), [("OutOfMemory", "CUDA error: out of memory"), ("ValueError", "no heads")]
)
def test_other_errors_keep_the_process(tmp_path: Path, kind: str, message: str) -> None:
    subject, worker = subject_with([sys.executable, "-c", POISONED, kind, message], tmp_path)
    try:
        subject._call(SIDES["diffusers-eager"], {"job": "load"})
        subject._call(SIDES["diffusers-eager"], {"job": "run"})
        assert worker.process is not None and len(subject.record.data["problems"]) == 1
    finally:
        worker.kill()
