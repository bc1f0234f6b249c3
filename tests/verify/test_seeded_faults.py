"""The verifier is verified: a port with a known mistake fails at the rung that should notice it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from porter.verify.cases import load_cases
from porter.verify.manifest import find, read_manifest
from porter.verify.outcome import RungResult
from porter.verify.pipeline_spec import load_spec
from tests.verify.faults import FAULTS, Fault, changed, seed
from tests.verify.hand_port import SUBJECT
from tests.verify.hand_port_faults import HAND_PORT_FAULTS

SMALLEST_NUMBER = 15
ALL = (*FAULTS, *HAND_PORT_FAULTS)


def run_rung(bench: Any, generated: Path, rung: str, names: tuple[str, ...], subject: str = SUBJECT) -> RungResult:
    """One rung on some cases of the subject; the modes of a pipeline have no choice of cases."""
    from porter.verify.rungs.batch import batch
    from porter.verify.rungs.bf16 import bf16
    from porter.verify.rungs.cache import cache
    from porter.verify.rungs.modes import cfg, step
    from porter.verify.rungs.module import module
    from porter.verify.rungs.pipeline import pipeline
    from porter.verify.rungs.tp import sp, tp
    from porter.verify.rungs.weights import weights

    port, denoisers = find(read_manifest(generated), subject)
    assert port is not None
    if rung == "pipeline":
        return pipeline(bench, generated, port, load_spec(subject), names)
    if rung in ("cfg", "step", "batch", "cache"):
        modes = {"cfg": cfg, "step": step, "batch": batch, "cache": cache}
        return modes[rung](bench, generated, port, load_spec(subject))
    denoiser = denoisers[0]
    cases = [c for c in load_cases(denoiser.source_class) if c.name in names]
    return {"module": module, "bf16": bf16, "weights": weights, "tp": tp, "sp": sp}[rung](
        bench, generated, denoiser, cases
    )


def folder_of(generated: Path, subject: str = SUBJECT) -> str:
    port, _ = find(read_manifest(generated), subject)
    assert port is not None
    return port.folder


@pytest.fixture(scope="session")
def right(bench: Any, port_folder: Path) -> dict[tuple[str, str, tuple[str, ...]], RungResult]:
    """What the unchanged port gives, per rung and cases; filled on demand."""
    return {}


@pytest.mark.parametrize("fault", ALL, ids=lambda f: f.name.replace(" ", "-"))
def test_a_wrong_port_is_caught_and_the_right_one_passes(
    fault: Fault, bench: Any, port_folder: Path, right: dict[Any, RungResult], tmp_path: Path
) -> None:
    wrong, subject = tmp_path / "wrong", fault.subject or SUBJECT
    if subject not in {p.source_class for p in read_manifest(port_folder).ports}:
        pytest.skip(f"there is no port of {subject}")
    places = seed(port_folder, folder_of(port_folder, subject), wrong, fault)
    if places == 0:
        pytest.skip("the port has no such place")
    key = (subject, fault.rung, fault.cases)
    if key not in right:
        right[key] = run_rung(bench, port_folder, fault.rung, fault.cases, subject)
    clean = {c.name: c for c in right[key].cases}
    joint, single = clean.get("two-prompts-two-each"), clean.get("two-prompts")
    if fault.joint and joint and single and joint.figures.get("calls", 0) > single.figures.get("calls", 0):
        pytest.skip("the port serves such requests one by one")
    result = run_rung(bench, wrong, fault.rung, fault.cases, subject)
    shutil.rmtree(wrong)
    caught = [c for c in result.failures() if c.name in clean and clean[c.name].status == "passed"] if clean else []
    print(f"{fault.name}: {places} places, {[c.message[:160] for c in caught]}")
    right_ones = [c.status == "passed" for c in clean.values()]
    generated = port_folder.name == "generated"  # the stand-in has mistakes of its own
    assert (all if generated else any)(right_ones), [c.message for c in clean.values()]
    assert caught, f"not caught by {fault.rung}: {[(c.name, c.figures) for c in result.cases]}"


def test_every_fault_has_a_place(port_folder: Path) -> None:
    ports = {p.source_class for p in read_manifest(port_folder).ports}
    known = [f for f in ALL if (f.subject or SUBJECT) in ports]
    folders = {f.name: port_folder / folder_of(port_folder, f.subject or SUBJECT) for f in known}
    without = [f.name for f in known if not any(changed(folders[f.name], f))]
    if port_folder.name == "generated":
        assert not without and len(known) == len(ALL)
    assert len(known) - len(without) >= SMALLEST_NUMBER, f"no place for {without}"


def test_a_miss_names_the_diverging_module(bench: Any, port_folder: Path, tmp_path: Path) -> None:
    fault = next(f for f in FAULTS if f.name == "key and value swapped")
    wrong = tmp_path / "wrong"
    assert seed(port_folder, folder_of(port_folder), wrong, fault)
    case = run_rung(bench, wrong, "module", fault.cases).cases[0]
    assert case.where is not None
    print(case.message)
    assert "attn" in case.where["module"]
    assert case.where["line"] > 0
