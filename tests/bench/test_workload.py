"""Workloads: files of real sizes, cut to a depth or to some cases."""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from porter.bench.sides import hand_ports
from porter.bench.workload import cut_depth, known_workloads, load_workload, tiny_workload
from porter.resources import BENCHMARKS, CORPUS
from porter.source.library import open_library
from porter.verify.outcome import VerifyError


def defaults_of(cls: str) -> dict[str, Any]:
    """Constructor defaults of a class, from Diffusers' source."""
    for path in (open_library().root / "models" / "transformers").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == cls:
                init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
                names = [a.arg for a in init.args.args][-len(init.args.defaults) :]
                return {n: ast.literal_eval(d) for n, d in zip(names, init.args.defaults)}
    raise AssertionError(f"Diffusers has no {cls}")


@pytest.mark.parametrize("denoiser", known_workloads())
def test_depth_is_that_of_the_constructor_and_inputs_are_parameters(denoiser: str) -> None:
    workload = load_workload(denoiser)
    defaults = defaults_of(denoiser)
    layers = {**defaults, **workload.config}
    assert {k: whole for k, (_, whole) in workload.depth.items()} == {k: layers[k] for k in workload.depth}
    assert set(workload.config) <= set(defaults)
    assert workload.full and workload.cases


def test_every_denoiser_that_is_validated_has_a_workload() -> None:
    with (CORPUS / "coverage.csv").open(newline="") as table:
        validated = {
            r["class"] for r in csv.DictReader(table) if r["kind"] == "denoiser" and r["module"] == "validated"
        }
    assert len(validated) > 50
    assert validated - set(known_workloads()) == set()


@pytest.mark.parametrize("denoiser", known_workloads())
def test_lists_that_go_with_the_depth_have_as_many_entries(denoiser: str) -> None:
    """At full depth and cut: an entry for each layer, or numbers of layers that there are."""
    follows = yaml.safe_load((BENCHMARKS / f"workloads/{denoiser}.yaml").read_text()).get("follows", {})
    for depth in (None, 2, 8):
        workload = load_workload(denoiser, depth=depth)
        layers = sum(run for run, _ in workload.depth.values())
        given = {**workload.config, **workload.cases[0].inputs}
        for name, kind in follows.items():
            values = given[name]["list"] if isinstance(given[name], dict) else given[name]
            assert len(values) == layers if kind == "entries" else max(values) < layers


def test_a_depth_is_shared_out_as_the_whole_model_does() -> None:
    assert cut_depth({"double": 19, "single": 38}, 12) == {"double": (4, 19), "single": (8, 38)}
    assert cut_depth({"double": 4, "single": 32}, 3) == {"double": (1, 4), "single": (3, 32)}
    assert cut_depth({"layers": 10}, 40) == {"layers": (10, 10)}


def test_layers_that_come_in_groups_are_cut_to_whole_groups() -> None:
    assert cut_depth({"layers": 40}, 8, 5) == {"layers": (10, 40)}
    assert cut_depth({"layers": 40}, 10, 5) == {"layers": (10, 40)}
    assert cut_depth({"layers": 7}, 6, 5) == {"layers": (7, 7)}


def test_lists_that_follow_the_depth_are_cut_with_it(tmp_path: Path) -> None:
    write(tmp_path, "follows: {ids: numbers, names: entries, texts: entries}", "{ids: [0, 3, 9], names: [4, 4, 5, 6]}")
    text = {"list": [{"randn": [1]}, {"randn": [2]}, {"randn": [3]}]}
    whole, cut = load_workload("Model", folder=tmp_path), load_workload("Model", depth=2, folder=tmp_path)
    assert dict(whole.config) == {"ids": [0, 3, 9], "names": [4, 4, 5, 6]}
    assert whole.cases[0].inputs["texts"] == text
    assert dict(cut.config) == {"ids": [0], "names": [4, 4], "layers": 2}
    assert cut.cases[0].config == cut.config
    assert cut.cases[0].inputs["texts"] == {"list": text["list"][:2]}


def test_a_cut_workload_says_so_and_gives_the_constructor_fewer_layers(tmp_path: Path) -> None:
    write(tmp_path)
    whole, cut = load_workload("Model", folder=tmp_path), load_workload("Model", depth=3, folder=tmp_path)
    assert (whole.size, dict(whole.config)) == ("12 layers", {})
    assert (cut.size, dict(cut.config), cut.full) == ("3 of 12 layers", {"layers": 3}, False)
    assert cut.cases[0].config == {"layers": 3}


def test_cases_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    write(tmp_path)
    assert [c.name for c in load_workload("Model", only=("two",), folder=tmp_path).cases] == ["two"]
    assert [c.name for c in load_workload("Model", most=1, folder=tmp_path).cases] == ["one"]
    with pytest.raises(VerifyError, match="no case called three"):
        load_workload("Model", only=("three",), folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("denoiser: [", "not valid YAML"),
        ("{denoiser: Model}", "depth maps"),
        ("- a", "depth maps"),
        ("{depth: {n: 4}, multiple: 0}", "multiple is"),
        ("{depth: {n: 4}, follows: {a: some}}", "entries or numbers"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "Model.yaml").write_text(text)
    with pytest.raises(VerifyError, match=rf"Model\.yaml.*{message}"):
        load_workload("Model", folder=tmp_path)


def test_a_missing_workload_is_refused() -> None:
    with pytest.raises(VerifyError, match="no workload of Nothing"):
        load_workload("Nothing")


def test_a_tiny_workload_has_one_configuration() -> None:
    workload = tiny_workload("FluxTransformer2DModel")
    assert {tuple(c.config) for c in workload.cases} == {tuple(workload.config)}
    assert workload.size == "tiny"


def test_a_row_of_hand_ports_with_a_foreign_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hand.yaml"
    path.write_text("Model: {arch: A, module: m, class: C, constructor: [config], style: odd}\n")
    with pytest.raises(VerifyError, match="unknown keys style"):
        hand_ports(path)
    path.write_text("Model: {arch: A, module: m}\n")
    with pytest.raises(VerifyError, match="lacks class, constructor"):
        hand_ports(path)


def write(folder: Path, more: str = "", base: str = "{}") -> None:
    (folder / "Model.yaml").write_text(
        f"denoiser: Model\ndepth: {{layers: 12}}\n{more}\nbase: {base}\n"
        "inputs: {hidden_states: {randn: [1, 4]}, texts: {list: [{randn: [1]}, {randn: [2]}, {randn: [3]}]}}\n"
        "cases: [{name: one}, {name: two}]\n"
    )
