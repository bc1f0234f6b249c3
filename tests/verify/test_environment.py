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
