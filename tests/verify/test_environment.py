"""What is said when something is missing, and that nothing heavy is needed to say it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from porter.verify import environment
from porter.verify.platform import bootstrap, plugins

ROOT = Path(__file__).resolve().parents[2]


def test_importing_the_package_imports_neither_torch_nor_the_engine() -> None:
    code = (
        "import sys, porter.verify, porter.verify.run, porter.verify.report, porter.verify.install\n"
        "import porter.verify.rungs.pipeline, porter.verify.rungs.modes, porter.verify.rungs.static\n"
        "print(sorted({'torch', 'vllm', 'vllm_omni', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"vllm-omni": None, "diffusers": "0.40.0"}, "the engine is not installed"),
        ({"vllm-omni": "0.29.0", "diffusers": "0.40.0"}, "wrong engine: vllm-omni 0.29.0 is installed, 0.30.0"),
        ({"vllm-omni": "0.30.0", "diffusers": "0.38.0"}, "wrong Diffusers: diffusers 0.38.0 is installed, 0.40.0"),
    ],
)
def test_a_missing_or_wrong_version_is_said_first(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str | None], said: str
) -> None:
    monkeypatch.setattr(environment, "version_of", found.get)
    problems = environment.check_environment()
    assert said in problems[0].title
    assert "porter.verify.install" in problems[0].advice


def test_on_a_machine_with_an_accelerator_no_platform_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bootstrap, environment):
        monkeypatch.setattr(module, "gpu_present", lambda: True)
    folder = bootstrap.plugin_directory()
    entries = next(folder.glob("*.dist-info/entry_points.txt")).read_text()
    assert "platform_plugins" not in entries
    assert "general_plugins" in entries
    assert not (folder / "sitecustomize.py").exists()
    assert plugins.platform_plugin() is None
    assert "VLLM_TARGET_DEVICE" not in set(bootstrap.environment()) - set(__import__("os").environ)


def test_without_one_both_plugins_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "gpu_present", lambda: False)
    env = bootstrap.environment("generated", ("FooPipeline",))
    entries = next(Path(env["PYTHONPATH"].split(":")[0]).glob("*.dist-info/entry_points.txt")).read_text()
    assert "porter_cpu = " in entries and "porter_ports = " in entries
    assert env["PORTER_ARCHS"] == "FooPipeline"
