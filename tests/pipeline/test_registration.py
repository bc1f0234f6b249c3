"""Files around the ports."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path

import pytest

from porter.pipeline.registration import PortRow, folder_init, package_files, registry_rows

ROW = PortRow("TinyPipeline", "tiny", "pipeline_tiny", "TinyPipeline", None, "get_tiny_post_process_func")
HALF = PortRow("HalfPipeline", "tiny", None, None)


def test_a_folder_exports_what_is_there() -> None:
    text = folder_init("tiny", [("tiny_transformer", "TinyTransformer")], [ROW, HALF])
    assert "from .pipeline_tiny import TinyPipeline, get_tiny_post_process_func" in text
    assert "HalfPipeline" not in text
    ast.parse(text)


def test_rows_leave_out_a_port_without_a_pipeline() -> None:
    text = registry_rows([ROW, HALF])
    assert '"TinyPipeline": ("tiny", "pipeline_tiny", "TinyPipeline")' in text
    assert "HalfPipeline" not in text


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`register` of a generated package beside a stand-in for the engine's registry."""
    package = tmp_path / "tiny_ports"
    package.mkdir()
    (package / "__init__.py").write_text(package_files(["tiny"], "1.0")["__init__.py"])
    port = {"arch": "TinyPipeline", "folder": "tiny", "module": "pipeline_tiny", "class": "TinyPipeline",
            "pre_process": None, "post_process": "get_tiny_post_process_func"}  # fmt: skip
    half = {**port, "arch": "HalfPipeline", "class": None, "module": None}
    (package / "manifest.json").write_text(json.dumps({"ports": [port, half]}))
    registry = types.ModuleType("vllm_omni.diffusion.registry")
    registry._DIFFUSION_MODELS = {}
    registry._DIFFUSION_PRE_PROCESS_FUNCS = {"TinyPipeline": "of_the_built_in", "Other": "of_another"}
    registry._DIFFUSION_POST_PROCESS_FUNCS = {}
    calls: list[str] = []
    registry.register_diffusion_model = lambda arch, module, cls, **kw: calls.append(f"{arch} {module} {cls}")
    for name in ("vllm_omni", "vllm_omni.diffusion"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.registry", registry)
    sys.modules["vllm_omni.diffusion"].registry = registry  # type: ignore[attr-defined]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PORTER_REPLACE", raising=False)
    monkeypatch.delitem(sys.modules, "tiny_ports", raising=False)
    import tiny_ports

    return tiny_ports, registry, calls


def test_a_new_architecture_is_registered_and_an_unfinished_port_is_not(plug_in) -> None:
    package, _, calls = plug_in
    package.register()
    assert calls == ["TinyPipeline tiny_ports.tiny.pipeline_tiny TinyPipeline"]


def test_a_built_in_is_replaced_only_when_asked(plug_in, monkeypatch: pytest.MonkeyPatch) -> None:
    package, registry, calls = plug_in
    registry._DIFFUSION_MODELS["TinyPipeline"] = ("tiny", "pipeline_tiny", "TinyPipeline")
    package.register()
    assert calls == []
    assert "TinyPipeline" in registry._DIFFUSION_PRE_PROCESS_FUNCS
    monkeypatch.setenv("PORTER_REPLACE", "OtherPipeline,TinyPipeline")
    package.register()
    assert len(calls) == 1
    assert registry._DIFFUSION_PRE_PROCESS_FUNCS == {"Other": "of_another"}  # the built-in's does not fit the port
