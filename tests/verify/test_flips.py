"""Every switch of a denoiser's constructor is tried in more than one position, and every mask of its forward is given.

A switch is a parameter that is a boolean, may be None, or is a string. What no configuration can flip stands in
`tests/corpus/unflipped.yaml` with the reason.
"""

from __future__ import annotations

from pathlib import Path

import libcst as cst
import pytest
import yaml

from porter.model import Definition
from porter.source import tree
from porter.source.library import open_library
from porter.verify.cases import ModuleCase, load_cases

CORPUS = Path(__file__).parents[1] / "corpus"
DENOISERS = sorted(path.stem for path in CORPUS.glob("configs/*.yaml"))
REASONS: dict[str, dict[str, str]] = yaml.safe_load((CORPUS / "unflipped.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def library():
    return open_library(None)


def parameters(library, name: str, method: str) -> list[cst.Param]:
    found = library.definition(library.canonical(f"diffusers.{name}"))
    assert isinstance(found, Definition)
    function = tree.method(found.node, method)
    assert function is not None
    return tree.parameters(function)[1:]


def positions(param: cst.Param, cases: tuple[ModuleCase, ...]) -> set[object] | None:
    """The positions of a switch over all cases (for one that may be None: whether it is); None if it is no switch."""
    annotation = tree.code(param.annotation.annotation) if param.annotation is not None else ""
    default = tree.code(param.default) if param.default is not None else ""
    values = [c.config[param.name.value] if param.name.value in c.config else literal(default) for c in cases]
    if default in ("True", "False") or annotation == "bool":
        return {bool(v) for v in values}
    if default == "None" or "None" in annotation or "Optional" in annotation:
        return {v is None for v in values}
    if annotation == "str" or default[:1] in ("'", '"'):
        return set(values)
    return None


def literal(text: str) -> object:
    names = {"None": None, "True": True, "False": False}
    return names[text] if text in names else tree.literal_value(text) if text[:1] in ("'", '"') else text


@pytest.mark.parametrize("name", DENOISERS)
def test_every_switch_is_flipped(library, name: str) -> None:
    cases = load_cases(name)
    excused = REASONS.get(name, {})
    stuck = {}
    for param in parameters(library, name, "__init__"):
        found = positions(param, cases)
        if found is not None and len(found) < 2 and param.name.value not in excused:
            stuck[param.name.value] = found
    assert not stuck


@pytest.mark.parametrize("name", DENOISERS)
def test_every_mask_is_given(library, name: str) -> None:
    given = {key for case in load_cases(name) for key in case.inputs}
    masks = {p.name.value for p in parameters(library, name, "forward") if "mask" in p.name.value}
    assert masks - given - set(REASONS.get(name, {})) == set()


@pytest.mark.parametrize("name", DENOISERS)
def test_there_are_at_least_three_configurations(name: str) -> None:
    assert len(load_cases(name)) >= 3


@pytest.mark.parametrize("name", sorted(REASONS))
def test_no_excuse_is_out_of_date(library, name: str) -> None:
    """An excused parameter exists, is a switch or a mask, and is indeed never flipped."""
    cases = load_cases(name)
    given = {key for case in cases for key in case.inputs}
    known = {p.name.value: positions(p, cases) for p in parameters(library, name, "__init__")}
    masks = {p.name.value for p in parameters(library, name, "forward") if "mask" in p.name.value}
    for parameter, reason in REASONS[name].items():
        assert reason
        assert (len(known.get(parameter) or ()) == 1) or (parameter in masks - given), parameter
