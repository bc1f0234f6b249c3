"""Run by `test_frozen_weights.py` in a process with the engine's environment."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from porter.verify.bench import free_port
from porter.verify.cases import load_cases
from porter.verify.engine_session import session
from porter.verify.manifest import read_manifest
from porter.verify.ports import load_class

GENERATED = Path(__file__).resolve().parents[2] / "generated"
SUBJECT = "SanaTransformer2DModel"  # its linear attention gives a transposed tensor to an output projection


def operators(layer: torch.nn.Module, given: torch.Tensor) -> list[str]:
    """What a layer becomes under inference, by name."""
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        seen.extend(str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(layer, backend=aot_autograd(fw_compiler=compiler))(given)
    return seen


@pytest.fixture
def port():
    manifest = read_manifest(GENERATED)
    subject = manifest.denoisers()[SUBJECT]
    config = load_cases(SUBJECT)[0].config
    arch = next(p.arch for p in manifest.ports if any(d.source == subject.source for d in p.denoisers))
    with session(arch, port=free_port(), config=config) as engine:
        model = engine.build(load_class(GENERATED, subject.folder, subject.module, subject.cls), config)
        yield engine, model


def test_a_loaded_port_copies_no_transposed_input_of_a_linear_layer(port):
    engine, model = port
    layer = model.transformer_blocks[0].attn1.to_out[0]
    transposed = torch.randn(2, layer.in_features, 5).transpose(1, 2)
    assert "clone" in operators(layer, transposed), "what this is about: torch copies while weights could be trained"
    engine.load_only(model, {})
    assert not any(p.requires_grad for p in model.parameters())
    seen = operators(layer, transposed)
    assert "bmm" in seen and "clone" not in seen
