"""What stands around the denoisers is converted in a second process; nothing but the time depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from porter.convert import convert
from porter.halves import Other, beside
from porter.model import Diagnostic, PorterError
from porter.shares import processes
from porter.shipment import Shipment, shipped
from porter.source.library import open_library
from porter.targets import find_target
from tests.circumstances import stopped
from tests.test_bad_input import WAYS, needs_proc

PIPELINE = "CogView4Pipeline"
needs_two = pytest.mark.skipif(processes(1) < 2, reason="one processor converts in one process")


def program(idle: bool) -> list[str]:
    """The command on a machine with an idle processor, or without one."""
    start = (
        f"import runpy, porter.halves as h; h.idle = lambda: {idle}; runpy.run_module('porter', run_name='__main__')"
    )
    return ["-c", start]


def written(folder: Path, idle: bool) -> dict[str, bytes]:
    """Files that the command writes."""
    command = [sys.executable, *program(idle), "convert", PIPELINE, "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def forking(monkeypatch):
    """Whatever else runs here: other processes, threads of pytest's own."""
    monkeypatch.setattr("porter.halves.idle", lambda: True)
    monkeypatch.setattr("threading.active_count", lambda: 1)


def test_the_number_of_processes_changes_no_byte_and_no_finding(forking) -> None:
    assert convert([PIPELINE], processes=2) == convert([PIPELINE])


@needs_two
def test_the_command_writes_the_same_where_no_processor_is_idle(tmp_path: Path) -> None:
    assert written(tmp_path / "two", idle=True) == written(tmp_path / "one", idle=False)


def test_a_pipeline_that_cannot_be_ported_leaves_its_transformer_and_says_why(forking) -> None:
    done = convert(["StableUnCLIPPipeline"], processes=2)
    assert [(p.source, p.module) for p in done.ports] == [("diffusers.StableUnCLIPPipeline", None)]
    assert done == convert(["StableUnCLIPPipeline"])


@needs_two
def test_work_is_done_in_another_process(forking) -> None:
    with beside(os.getpid) as other:
        assert other.result() != os.getpid()


@pytest.mark.parametrize("end", [lambda: os._exit(1), lambda: os.kill(os.getpid(), 9)], ids=["ended", "killed"])
def test_what_another_process_did_not_do_is_done_here(forking, end) -> None:
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            end()
        return os.getpid()

    with beside(work) as other:
        assert other.result() == here


def test_an_error_of_the_other_process_is_raised_here(forking) -> None:
    def work() -> None:
        raise PorterError(Diagnostic("PORT013", "no"))

    with beside(work) as other, pytest.raises(PorterError, match="PORT013 no"):
        other.result()


@needs_proc
def test_no_process_is_left_when_its_result_is_not_wanted(forking) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    with pytest.raises(PorterError), beside(lambda: os.read(os.pipe()[0], 1)):
        raise PorterError(Diagnostic("PORT013", "no"))
    assert children() == before


@needs_two
def test_what_is_sent_ahead_comes_once_and_in_order(forking) -> None:
    with beside(lambda: "made", lambda: ["a", "b" * 300_000]) as other:
        assert other.result() == "made"
    with beside(lambda: "made", lambda: ["a", "b" * 300_000]) as other:
        found: list[object] = []
        while len(found) < 2:
            found += other.sent_ahead()
        assert found == ["a", "b" * 300_000] and other.sent_ahead() == [] and other.result() == "made"


def test_without_another_process_nothing_is_sent_ahead() -> None:
    assert Other(lambda: "made").sent_ahead() == []


def test_definitions_that_were_shipped_are_those_that_the_library_reads() -> None:
    library = open_library()
    parcels = list(shipped(library, find_target(library, PIPELINE)))
    assert parcels
    shipment = Shipment(lambda: [parcels.pop()] if parcels else [])
    names = [p[0] for p in parcels]
    for name in names * 2:  # they arrive one by one
        if (found := shipment.definition(name)) is not None:
            own = library.definition(name)
            assert found.node.deep_equals(own.node)
            assert (found.name, found.module, found.file) == (own.name, own.module, own.file)
            names.remove(name)
    assert names == [] and shipment.definition("diffusers.models.attention.FeedForward") is None


@needs_two
@needs_proc
@pytest.mark.parametrize(("how", "everyone"), WAYS, ids=["Ctrl-C", "SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_neither_process_behind(tmp_path: Path, how: int, everyone: bool) -> None:
    stopped(["convert", PIPELINE, "--out", str(tmp_path / "new")], 1, how, everyone, tmp_path, program(idle=True))
    assert not (tmp_path / "new").exists()
