"""What the README shows of a command is what the command prints."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from porter.cli import app

ROOT = Path(__file__).resolve().parents[1]


def test_the_explained_line_is_explained_so() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^    \$ porter (explain (\S+):\d+)\n((?:    .+\n)+)", text, re.M)
    assert found is not None
    shown = [line[4:] for line in found[3].splitlines()]
    result = CliRunner().invoke(app, [*found[1].replace(found[2], str(ROOT / found[2])).split()])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == shown
