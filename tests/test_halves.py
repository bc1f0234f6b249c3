"""A second process converts the denoisers of a pipeline; nothing but the time depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from porter import halves
from porter.convert import convert, convert_denoisers
from porter.model import Diagnostic, PorterError
from tests.circumstances import stopped
from tests.test_bad_input import WAYS, needs_proc

PIPELINE = "CogView4Pipeline"
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor converts in one process")


class Told(halves.Helper):
    """A helper that gives one answer."""

    def __init__(self, given: object) -> None:
        self.given = given

    def answer(self):
        return self.given


@pytest.fixture(scope="module")
def alone():
    return convert([PIPELINE])


def test_what_another_process_made_is_what_this_one_makes(alone) -> None:
    assert convert([PIPELINE], helper=Told(convert_denoisers(PIPELINE, None, None))) == alone


def test_without_an_answer_this_process_does_it_all(alone) -> None:
    assert convert([PIPELINE], helper=Told(None)) == alone


def test_denoisers_that_cannot_be_ported_end_the_conversion() -> None:
    with pytest.raises(PorterError, match="PORT101 no"):
        convert([PIPELINE], helper=Told(PorterError(Diagnostic("PORT101", "no"))))


def test_a_denoiser_alone_is_nothing_for_two() -> None:
    assert convert_denoisers("CogView4Transformer2DModel", None, None) is None


def test_a_process_that_ended_gives_no_answer() -> None:
    requests, answers = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        os._exit(1)
    os.close(requests[0])
    os.close(answers[1])
    helper = halves.Helper(process, os.fdopen(requests[1], "wb"), os.fdopen(answers[0], "rb"))
    helper.ask(PIPELINE, None, None)
    assert helper.answer() is None
    helper.end()


def command(folder: Path, *arguments: str) -> dict[str, bytes]:
    subprocess.run(
        [sys.executable, *arguments, "convert", PIPELINE, "--out", str(folder)], check=True, capture_output=True
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@needs_two
def test_the_command_writes_the_same_with_and_without_it(tmp_path: Path) -> None:
    single = "import sys; from porter.cli import main; sys.exit(main(sys.argv[1:]))"
    assert command(tmp_path / "two", "-m", "porter") == command(tmp_path / "one", "-c", single)


@needs_two
@needs_proc
@pytest.mark.parametrize(("how", "everyone"), WAYS, ids=["Ctrl-C", "SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_neither_process_behind(tmp_path: Path, how: int, everyone: bool) -> None:
    stopped(["convert", PIPELINE, "--out", str(tmp_path / "new")], 1, how, everyone, tmp_path)
    assert not (tmp_path / "new").exists()
