"""The benchmark measures what it says; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path

from porter import benchmark
from porter.cli import main
from porter.exits import USAGE
from porter.source.library import open_library

SUBJECT = "diffusers.QwenImageTransformer2DModel"


def test_only_sources_that_were_opened_count(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.txt"):
        (tmp_path / name).write_text("x = 1\n")
    read = benchmark.files_read(lambda: [(tmp_path / n).read_text() for n in ("a.py", "c.txt")], tmp_path)
    (tmp_path / "b.py").read_text()
    assert read == [tmp_path / "a.py"]


def test_a_process_is_divided_without_remainder() -> None:
    parts = benchmark.process_parts([SUBJECT], 1)
    assert min(parts.interpreter, parts.import_libcst, parts.import_porter, parts.work) > 0
    assert parts.peak_mib > 1


def test_the_command_writes_figures_with_versions(tmp_path: Path, capsys) -> None:
    file = tmp_path / "results" / "one.json"
    assert main(["benchmark", SUBJECT, "--repeats", "1", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    (row,) = data["convert"]
    assert row["ratio"] > 0 and row["files"] > 1 and row["subject"] == SUBJECT
    assert row["command_over_import"] > 1 and row["command"] > row["process"]["import_libcst"]
    assert data["versions"]["diffusers"] == open_library().version
    assert str(tmp_path.parent) not in json.dumps({k: v for k, v in data.items() if k != "command"})
    assert SUBJECT in capsys.readouterr().out


def test_classes_are_measured_as_one_conversion_when_told_so(capsys) -> None:
    other = "diffusers.DiTTransformer2DModel"
    assert main(["benchmark", SUBJECT, other, "--together", "--repeats", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and rows[1].startswith("2 classes")


def test_no_class_is_one_clear_error(capsys) -> None:
    assert main(["benchmark"]) == USAGE
    assert "PORT013" in capsys.readouterr().err
