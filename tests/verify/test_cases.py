"""Case files: what they may say, and that together they reach every switch of a constructor."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from porter.verify.cases import build_inputs, corpus_root, load_cases, parse_cases
from porter.verify.outcome import VerifyError
from porter.verify.pipeline_spec import load_spec, request_table

GOOD: dict[str, Any] = {
    "denoiser": "Foo", "base": {"n": 1}, "inputs": {"x": {"randn": [2, 3]}}, "cases": [{"name": "a"}]
}  # fmt: skip
COMPLETE = (
    "FluxTransformer2DModel", "PixArtTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip
DENOISERS = sorted(p.stem for p in (corpus_root() / "configs").glob("*.yaml"))
PIPELINES = sorted(p.stem for p in (corpus_root() / "pipelines").glob("*.yaml"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"denoiser": "Bar"}, "the file's name says Foo"),
        ({"inputs": {"x": {"randm": [2]}}}, "one of randn"),
        ({"inputs": {"x": {"randn": [2, "a"]}}}, "takes a shape"),
        ({"inputs": {"x": {"randn": [2], "width": 3}}}, "takes no width"),
        ({"inputs": {"x": {"mask": [5], "width": 4}}}, "greater than the width"),
        ({"inputs": {"x": {"range": [5]}}}, "first number and the end"),
        ({"cases": [{"name": "a"}, {"name": "a"}]}, "used twice"),
        ({"cases": [{"name": "a", "konfig": {}}]}, "unknown key konfig"),
        ({"cases": [{}]}, "name missing"),
    ],
)
def test_a_wrong_case_file_is_refused_with_its_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        parse_cases(GOOD | change, "foo.yaml", "Foo")


def test_an_absent_input_is_not_passed() -> None:
    cases = parse_cases(GOOD | {"cases": [{"name": "a", "inputs": {"x": "absent"}}]}, "foo.yaml", "Foo")
    assert cases[0].inputs == {}


def test_inputs_are_the_same_for_the_same_seed_whatever_the_order() -> None:
    torch = pytest.importorskip("torch")
    specs = {"b": {"randn": [3]}, "a": {"randn": [3]}, "m": {"mask": [2, 3]}, "t": {"tuples": [[1, 2], [3, 4]]}}
    specs["r"] = {"range": [28, 31]}
    one, two = build_inputs(specs, 5), build_inputs(dict(reversed(specs.items())), 5)
    assert torch.equal(one["a"], two["a"]) and torch.equal(one["b"], two["b"])
    assert one["m"].tolist() == [[True, True, False], [True, True, True]]
    assert one["t"] == [(1, 2), (3, 4)]
    assert one["r"].tolist() == [28, 29, 30]


def _constructor(class_name: str) -> ast.FunctionDef:
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("diffusers is not installed")
    for path in (Path(spec.submodule_search_locations[0]) / "models" / "transformers").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                return next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    raise AssertionError(class_name)


@pytest.mark.parametrize("denoiser", COMPLETE)
def test_every_boolean_and_optional_of_the_constructor_takes_two_values(denoiser: str) -> None:
    arguments = _constructor(denoiser).args
    defaults = dict(zip([a.arg for a in arguments.args][-len(arguments.defaults) :], arguments.defaults, strict=True))
    cases = load_cases(denoiser)
    assert len(cases) >= 3
    fixed = {"attention_type"}  # the other value needs another network (GLIGEN)
    for argument in arguments.args[1:]:
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if argument.arg in fixed or not ("bool" in kind or "None" in kind or kind == "str"):
            continue
        default = ast.literal_eval(defaults[argument.arg])
        values = {repr(case.config.get(argument.arg, default)) for case in cases}
        if argument.arg in ("norm_type", "qk_norm", "num_embeds_ada_norm", "cross_attention_dim"):
            continue
        assert len(values) >= 2, f"{argument.arg} is always {values}"


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_every_case_file_is_well_formed(denoiser: str) -> None:
    assert load_cases(denoiser)


@pytest.mark.parametrize("denoiser", COMPLETE)
def test_heads_divide_by_two_and_text_lengths_differ_where_masked(denoiser: str) -> None:
    for case in load_cases(denoiser):
        assert case.config["num_attention_heads"] % 2 == 0
    masks = [spec["mask"] for c in load_cases(denoiser) for spec in c.inputs.values() if "mask" in spec]
    assert not masks or any(len(set(m)) > 1 for m in masks)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_request_table_has_the_cases_that_ports_get_wrong(pipeline: str) -> None:
    spec = load_spec(pipeline)
    assert spec is not None
    parameters = {"prompt": None, "negative_prompt": None, "num_images_per_prompt": 1, "output_type": "pil"}
    names = [c.name for c in request_table(spec, parameters)]
    assert len(names) == len(set(names))
    wanted = ("plain", "everything-given", "defaults-omitted", "prompt-embeds", "two-prompts", "two-per-prompt",
              "odd-size", "latent-output", "raises-no-prompt")  # fmt: skip
    if only := tuple(spec.get("only", ())):
        wanted = tuple(n for n in wanted if n.startswith(only) and not n.startswith("raises-"))
    assert set(wanted) <= set(names)
    if only:
        return
    for name, values in spec.get("guidance").items():
        assert 0.0 in values
        assert f"{name}=0.0,negative=empty" in names and f"{name}=0.0,negative=none" in names


def test_an_unknown_key_of_a_pipeline_file_is_refused(tmp_path: Path) -> None:
    data = {"pipeline": "Foo", "denoisers": {}, "call": {}, "gidance": {}}
    (tmp_path / "Foo.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(VerifyError, match="unknown key gidance"):
        load_spec("Foo", tmp_path)
