"""A large conversion is divided among processes; what it writes does not depend on how many there are."""

from __future__ import annotations

import pickle

import pytest

from porter.convert import convert
from porter.model import Diagnostic, PorterError
from porter.shares import FEW, processes, share_out
from porter.targets import Target

DENOISERS = ["diffusers.CogView4Transformer2DModel", "diffusers.DiTTransformer2DModel"]


def target(name: str, *denoisers: str) -> Target:
    return Target(name, f"diffusers.{name}", True, {f"c{n}": f"diffusers.{d}" for n, d in enumerate(denoisers)})


def test_every_target_is_in_exactly_one_share() -> None:
    shares = share_out([target(f"P{n}", f"Net{n}Model") for n in range(7)], 3)
    assert sorted(n for share in shares for n in share) == list(range(7))
    assert sorted(map(len, shares)) == [2, 2, 3]


def test_targets_that_print_into_one_folder_stay_together() -> None:
    targets = [
        target("A", "OneModel"),
        target("B", "TwoModel"),
        target("C", "OneModel", "TwoModel"),
        target("D", "XModel"),
    ]
    assert sorted(share_out(targets, 4)) == [[0, 1, 2], [3]]


def test_no_share_is_empty_but_that_of_nothing() -> None:
    assert share_out([target("A", "OneModel")], 4) == [[0]]
    assert share_out([], 4) == [[]]


def test_few_classes_are_converted_in_one_process() -> None:
    assert processes(FEW) == 1


def test_the_number_of_processes_changes_no_byte_and_no_finding() -> None:
    assert convert(DENOISERS, processes=2) == convert(DENOISERS)


def test_an_error_comes_out_of_another_process_with_its_findings() -> None:
    error = pickle.loads(pickle.dumps(PorterError(Diagnostic("PORT013", "no"))))
    assert isinstance(error, PorterError) and error.diagnostics == (Diagnostic("PORT013", "no"),)


def test_an_unknown_class_is_refused_before_any_process_starts() -> None:
    with pytest.raises(PorterError, match="PORT003"):
        convert([*DENOISERS, "diffusers.NoSuchPipeline"], processes=2)
