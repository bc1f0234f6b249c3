"""The static rung needs no torch: imports are resolved in source text."""

from __future__ import annotations

from pathlib import Path

import pytest

from porter.verify.api import Api
from porter.verify.rungs.static import static


@pytest.fixture
def api(tmp_path: Path) -> Api:
    root = tmp_path / "site" / "vllm_omni"
    (root / "layers").mkdir(parents=True)
    (root / "__init__.py").write_text("def __getattr__(name):\n    return {'Lazy': 1}[name]\n")
    (root / "layers" / "__init__.py").write_text("from .rope import *\n")
    (root / "layers" / "rope.py").write_text("try:\n    import x\nexcept ImportError:\n    x = None\nclass Rope: ...\n")
    return Api({"vllm_omni": root})


def run(tmp_path: Path, api: Api, text: str) -> tuple[str, str]:
    folder = tmp_path / "generated" / "foo"
    folder.mkdir(parents=True)
    (folder / "helper.py").write_text("def assist(): ...\n")
    (folder / "foo_transformer.py").write_text(text)
    case = next(c for c in static(tmp_path / "generated", "foo", api).cases if c.name == "foo_transformer.py")
    return case.status, case.message


@pytest.mark.parametrize(
    "text",
    [
        "from vllm_omni.layers.rope import Rope\n",
        "from vllm_omni.layers import rope, Rope\n",
        "from vllm_omni import Lazy\n",
        "import vllm_omni.layers.rope\n",
        "from .helper import assist\n",
        "from . import helper\n",
    ],
)
def test_what_exists_passes(tmp_path: Path, api: Api, text: str) -> None:
    assert run(tmp_path, api, text)[0] == "passed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from vllm_omni.layers.rope import Rop\n", "defines no Rop"),
        ("from vllm_omni.layer import Rope\n", "module vllm_omni.layer does not exist"),
        ("from .helpers import assist\n", ".helpers does not exist"),
        ("from .helper import assists\n", "defines no assists"),
        ("def f(:\n", "invalid syntax"),
        ("class A:\n    def f(self):\n        return self.gradient_checkpointing\n", "gradient_checkpointing is left"),
        ("@register_to_config\ndef f(): ...\n", ":1: register_to_config is left over"),
        ("x = model.set_attn_processor(p)\n", "set_attn_processor is left over"),
    ],
)
def test_what_does_not_is_named_with_its_line(tmp_path: Path, api: Api, text: str, said: str) -> None:
    status, message = run(tmp_path, api, text)
    assert status == "failed"
    assert said in message
