"""The rungs on a right port: they pass, and parallel ones show that something was divided."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

from porter.verify.cases import load_cases
from porter.verify.manifest import find, read_manifest
from porter.verify.pipeline_spec import load_spec
from porter.verify.platform import bootstrap
from tests.verify.hand_port import SUBJECT


def test_the_baseline_imports_nothing_of_porter() -> None:
    text = (Path(bootstrap.__file__).parents[1] / "baseline.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= set(sys.stdlib_module_names) | {"torch", "diffusers", "transformers", "numpy", "PIL"}


def test_guidance_branches_run_on_two_ranks(bench: Any, port_folder: Path) -> None:
    from porter.verify.rungs.modes import cfg

    port, _ = find(read_manifest(port_folder), SUBJECT)
    result = cfg(bench, port_folder, port, load_spec(SUBJECT))
    print(result)
    assert result.status == "passed"
    assert result.cases[0].figures["calls_per_rank"] == [result.cases[0].figures["calls"] // 2] * 2


def test_three_requests_in_a_batch_equal_three_singles(bench: Any, port_folder: Path) -> None:
    from porter.verify.rungs.batch import batch

    port, _ = find(read_manifest(port_folder), SUBJECT)
    result = batch(bench, port_folder, port, load_spec(SUBJECT))
    print(result)
    assert result.status == "passed"
    assert result.cases[0].figures["requests"] == 3


def test_tensor_parallel_divides_the_parameters(bench: Any, port_folder: Path) -> None:
    from porter.verify.rungs.tp import tp

    _, denoisers = find(read_manifest(port_folder), SUBJECT)
    cases = [c for c in load_cases(denoisers[0].source_class) if c.name == "masked-text"]
    result = tp(bench, port_folder, denoisers[0], cases)
    print(result)
    assert result.status == "passed"
    figures = result.cases[0].figures
    assert max(figures["elements_per_rank"]) < figures["elements"]


def test_step_execution_through_the_engines_own_scheduler(bench: Any, port_folder: Path) -> None:
    from porter.verify.rungs.modes import step

    port, _ = find(read_manifest(port_folder), SUBJECT)
    result = step(bench, port_folder, port, load_spec(SUBJECT))
    print(result)
    if result.status == "skipped":
        pytest.skip(result.reason)
    guided = {c.name: c for c in result.cases}["negative-prompt"]
    assert guided.status == "passed", guided.message
