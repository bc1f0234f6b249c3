"""What holds for the whole repository, whichever module changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from porter.source.library import open_library

ROOT = Path(__file__).resolve().parents[1]
SUBJECT = "diffusers.QwenImagePipeline"
SEEDS = 20

LONG = {
    "porter/facts/follow.py": "one abstract interpreter, a method for each kind of statement and expression",
    "porter/facts/sequence/follow.py": "one abstract interpreter, a method for each kind of statement and expression",
    "porter/specialise/interpret.py": "one interpreter, a method for each kind of statement and expression",
    "porter/verify/baseline.py": "one program, run by path: it may import nothing that porter wrote",
    "tests/verify/faults.py": "a list of wrong ports, one after another",
}
"""Modules above 400 lines, and why each is better whole."""


def files(*suffixes: str) -> Iterator[Path]:
    """Files of text that are, or will be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.endswith(".png") and (not suffixes or name.endswith(suffixes)):
            yield ROOT / name


def lines_with(pattern: re.Pattern[str], paths: Iterator[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def porter(*arguments: str, seed: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"PYTHONHASHSEED": seed} if seed is not None else {})}
    command = [sys.executable, "-m", "porter", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


def tree_digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of the subject, made by the command."""
    out = tmp_path_factory.mktemp("converted")
    porter("convert", SUBJECT, "--out", str(out))
    return out


def test_the_compiler_names_no_model() -> None:
    names: set[str] = set()
    for port in json.loads((ROOT / "generated/manifest.json").read_text())["ports"]:
        names |= {port["source"].rpartition(".")[2], port["arch"], port["folder"], port["module"], port["class"]}
        for denoiser in port["denoisers"].values():
            names |= {denoiser["source"].rpartition(".")[2], denoiser["module"], denoiser["class"]}
    words = "|".join(sorted(re.escape(n) for n in names if n))
    inside = (p for p in files(".py", ".yaml", ".jinja") if p.relative_to(ROOT).parts[0] in ("porter", "templates"))
    assert lines_with(re.compile(rf"\b({words})\b", re.IGNORECASE), inside) == []


def test_nothing_is_put_off() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")
    written = (p for p in files() if p.suffix not in (".json", ".html"))
    own = (p for p in written if p.relative_to(ROOT).parts[0] != "generated")
    assert lines_with(marks, own) == []


def test_modules_are_short_or_say_why_not() -> None:
    long = {
        p.relative_to(ROOT).as_posix()
        for p in files(".py")
        if p.relative_to(ROOT).parts[0] in ("porter", "tests") and len(p.read_text().splitlines()) > 400
    }
    assert long - set(LONG) == set()
    assert set(LONG) - long == set(), "short by now: take it off the list"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = re.compile(r"(?<![\w.$}])/(" + "|".join(["work", "root", "home", "tmp", "opt", "Users", "mnt"]) + r")/\w")
    assert lines_with(places, files()) == []


WITHOUT_FRAMEWORKS = """
import sys
heavy = {"torch", "diffusers", "vllm", "vllm_omni", "transformers"}
asked = set()
sys.addaudithook(lambda event, args: asked.add(args[0].split(".")[0]) if event == "import" else None)
from porter.cli import main
code = main(sys.argv[1:])
found = heavy & (asked | {name.split(".")[0] for name in sys.modules})
assert not found, f"imported: {sorted(found)}"
sys.exit(code)
"""


def test_converting_imports_no_framework(tmp_path: Path, converted: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, "convert", SUBJECT, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree_digest(tmp_path) == tree_digest(converted)


def test_converting_runs_nothing_that_it_reads(tmp_path: Path, converted: Path) -> None:
    source, out, witness = tmp_path / "diffusers", tmp_path / "out", tmp_path / "executed"
    shutil.copytree(open_library().root, source, ignore=shutil.ignore_patterns("__pycache__"))
    for path in source.rglob("*.py"):
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"\nopen({str(witness)!r}, 'w').close()\nraise SystemExit('the source was executed')\n")
    porter("convert", SUBJECT, "--source", str(source), "--out", str(out))
    assert not witness.exists()
    for path in converted.rglob("*.py"):
        assert (out / path.relative_to(converted)).read_bytes() == path.read_bytes()


def test_hash_seeds_change_no_byte(tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        out = tmp_path / str(seed)
        porter("convert", SUBJECT, "--out", str(out), seed=str(seed))
        return tree_digest(out)

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(digest, range(SEEDS)))) == 1


def test_a_second_conversion_changes_nothing(converted: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    again = porter("convert", SUBJECT, "--out", str(converted))
    assert re.search(r"\b0 changed", again.stderr)
    assert {p: p.stat().st_mtime_ns for p in converted.rglob("*")} == times
    assert "0 files would change" in porter("convert", SUBJECT, "--diff", "--out", str(converted)).stderr
