"""Where Diffusers states a tensor-parallel plan, the inferred roles are the stated ones."""

from __future__ import annotations

import libcst as cst
import pytest

from porter import resources
from porter.engine import load_rules
from porter.facts.tensor_parallel import TensorParallel
from porter.model import Definition
from porter.source import tree
from porter.source.library import open_library
from porter.transformer.policy import load_policy
from porter.transformer.port import specialised

PLANNED = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel")
KINDS = {"colwise": "column", "PackedColwiseParallel": "column", "rowwise": "row", "PackedRowwiseParallel": "row"}


@pytest.fixture(scope="module")
def library():
    return open_library(None)


def stated(library, name: str) -> dict[str, str]:
    """Module path -> `column` or `row`, from the class's `_tp_plan`."""
    found = library.definition(library.canonical(f"diffusers.{name}"))
    assert isinstance(found, Definition)
    for item in found.node.body.body:
        small = item.body[0] if isinstance(item, cst.SimpleStatementLine) else None
        if isinstance(small, cst.Assign) and tree.code(small.targets[0].target) == "_tp_plan":
            assert isinstance(small.value, cst.Dict)
            plan = {}
            for element in small.value.elements:
                assert isinstance(element, cst.DictElement)
                value = element.value
                kind = tree.literal_value(value.value) if isinstance(value, cst.SimpleString) else tree.call_name(value)
                plan[tree.literal_value(tree.code(element.key))] = KINDS[str(kind).split("\u00b7")[-1]]
            return plan
    return {}


def linears(facts: TensorParallel, root: str, path: str) -> set[tuple[str, str]]:
    """The linears that a path such as `blocks.*.ff.net.0.proj` may mean, as (class, path in the class)."""
    found: set[tuple[str, str]] = set()
    parts = path.split(".")
    for length in range(1, len(parts) + 1):
        for site in facts.modules[root].at(".".join(parts[:length])):
            if site.is_linear and length == len(parts):
                found.add((root, path))
            elif site.cls in facts.modules and length < len(parts):
                found |= linears(facts, site.cls, ".".join(parts[length:]))
    return found


@pytest.mark.parametrize("name", PLANNED)
def test_inferred_roles_are_those_of_diffusers_plan(library, name: str) -> None:
    unit, facts = specialised(library, f"diffusers.{name}", load_rules(resources.RULES), load_policy(resources.RULES))
    plan = stated(library, name)
    assert plan
    roles: dict[str, set[str]] = {}
    for path in plan:
        for linear in linears(facts, unit.root, path):
            role = "column" if linear in facts.roles.column else "row" if linear in facts.roles.row else "whole"
            roles.setdefault(path, set()).add(role)
    assert roles == {path: {kind} for path, kind in plan.items()}


@pytest.mark.parametrize("name", PLANNED)
def test_nothing_in_the_blocks_is_divided_that_diffusers_plan_leaves_whole(library, name: str) -> None:
    unit, facts = specialised(library, f"diffusers.{name}", load_rules(resources.RULES), load_policy(resources.RULES))
    planned = set().union(*(linears(facts, unit.root, path) for path in stated(library, name)))
    assert facts.roles.column | facts.roles.row == planned
