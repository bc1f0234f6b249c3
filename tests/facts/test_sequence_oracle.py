"""Plans derived from dataflow beside those Diffusers ships for its own context parallelism.

Diffusers may divide at another place (ids instead of the tables made of them) or text that the port leaves whole in cross
attention; but both divide the image tokens along the same axis, and gather at the same layer.
"""

import ast
import re

import pytest

from porter.convert import convert
from porter.source.library import open_library

CLASSES = (
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
)


def plan_of(text: str, name: str) -> dict[str, str]:
    """The plan of a class as {place: text of what is done there}."""
    for cls in ast.walk(ast.parse(text)):
        if not isinstance(cls, ast.ClassDef):
            continue
        for item in cls.body:
            target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
            if isinstance(target, ast.Name) and target.id == name and isinstance(item.value, ast.Dict):  # type: ignore[attr-defined]
                return {k.value: ast.unparse(v) for k, v in zip(item.value.keys, item.value.values, strict=True)}  # type: ignore[attr-defined,union-attr]
    raise AssertionError(f"no {name}")


@pytest.fixture(scope="module")
def ports():
    return convert(CLASSES).files


def module(ports, name):
    return next(t for f, t in ports.items() if f.endswith("_transformer.py") and f"class {name}(" in t)


@pytest.mark.parametrize("name", CLASSES)
def test_the_result_is_gathered_where_diffusers_gathers_it(ports, name):
    library = open_library()
    theirs = plan_of(library.module(library.canonical(f"diffusers.{name}").rpartition(".")[0]).text, "_cp_plan")
    ours = plan_of(module(ports, name), "_sp_plan")
    gathers = {k for k, v in theirs.items() if v.startswith("ContextParallelOutput(gather_dim=1")}
    assert {k for k, v in ours.items() if v.startswith("SequenceParallelOutput(gather_dim=1")} == gathers


@pytest.mark.parametrize("name", CLASSES)
def test_image_tokens_are_divided_along_the_axis_diffusers_divides(ports, name):
    library = open_library()
    theirs = plan_of(library.module(library.canonical(f"diffusers.{name}").rpartition(".")[0]).text, "_cp_plan")
    ours = plan_of(module(ports, name), "_sp_plan")
    found = re.search(
        r"'hidden_states': ContextParallelInput\(split_dim=(\d), expected_dims=(\d)", str(theirs.values())
    )
    assert found is not None
    assert f"split_dim={found[1]}, expected_dims={found[2]}" in ours["shard_hidden_states"]


@pytest.mark.parametrize("name", CLASSES)
def test_rotary_tables_are_divided_wherever_diffusers_divides_them_or_their_ids(ports, name):
    text = module(ports, name)
    assert re.search(r"rotary_emb = (self\.shard_|tuple\(\s*shard_streams)", text)


@pytest.mark.parametrize("name", CLASSES)
def test_as_many_regions_are_opened_as_are_closed(ports, name):
    """The engine counts up where an output is divided, and down where one is gathered (hooks/sequence_parallel.py)."""
    plan = plan_of(module(ports, name), "_sp_plan").values()
    assert sum("split_output=True" in p for p in plan) == sum(p.startswith("SequenceParallelOutput") for p in plan)
