"""Manifest, feature states and reports."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from porter.verify.manifest import find, read_manifest, refresh_features
from porter.verify.outcome import CaseResult, RungResult, VerifyError, rung_of, skipped
from porter.verify.report import VerifyReport, feature_states
from porter.verify.run import record, verify
from porter.verify.rungs.tp import block_shares

GOOD = CaseResult("a", "passed", "", {"rel_l2": 2e-7, "elements": 8, "elements_per_rank": [5, 5]})
BAD = CaseResult("b", "failed", "relative L2 error 1e-2", {"rel_l2": 1e-2})


def manifest(root: Path) -> Path:
    row = {
        "source": "diffusers.FooPipeline", "arch": "FooPipeline", "folder": "foo", "module": None, "class": None,
        "pre_process": None, "post_process": None, "features": {"lora": {"status": "not tested", "reason": "-"}},
        "denoisers": {"transformer": {"source": "diffusers.FooModel", "module": "foo_transformer", "class": "FooModel"}},
    }  # fmt: skip
    data = {"schema": 1, "diffusers": "0.40.0", "engine": "vllm-omni 0.30.0", "ports": [row]}
    (root / "manifest.json").write_text(json.dumps(data))
    return root


def test_a_port_and_a_denoiser_are_found_by_their_diffusers_names(tmp_path: Path) -> None:
    known = read_manifest(manifest(tmp_path))
    port, denoisers = find(known, "FooPipeline")
    assert port is not None and [d.cls for d in denoisers] == ["FooModel"]
    assert find(known, "FooModel")[0] is None
    with pytest.raises(VerifyError, match="near it: FooModel"):
        find(known, "Fooo")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "ports": []}'])
def test_a_broken_manifest_gives_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(VerifyError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_features_are_validated_only_by_cases_that_passed() -> None:
    rungs = (
        rung_of("tp", "Foo", [GOOD], 1.0), rung_of("module", "Foo", [GOOD, BAD], 1.0),
        rung_of("cfg", "Foo", [BAD], 1.0), skipped("step", "Foo", "the port does not offer step execution"),
    )  # fmt: skip
    states = feature_states(rungs)
    assert states["tensor_parallel"]["status"] == "validated"
    assert states["tensor_parallel"]["evidence"]["elements_per_rank"] == [5, 5]
    assert states["transformer"] | {"evidence": 0} == {"status": "limited", "reason": "fails: b", "evidence": 0}
    assert states["cfg_parallel"]["status"] == "unsupported"
    assert states["step_execution"] == {"status": "not tested", "reason": "the port does not offer step execution"}


@pytest.mark.parametrize(
    ("status", "beside", "state"),
    [("passed", GOOD, "validated"), ("passed", BAD, "limited"), ("failed", GOOD, "unsupported"),
     ("skipped", GOOD, "not tested")],
)  # fmt: skip
def test_preparing_media_is_a_feature_of_its_own(status: Any, beside: CaseResult, state: str) -> None:
    case = CaseResult("pre-process", status, "why", {"prepared": ["image"], "requests": 3})
    found = feature_states((rung_of("pipeline", "Foo", [beside, case], 1.0),))["pre_process"]
    assert found["status"] == state
    if state == "validated":
        assert found["evidence"] == {"rung": "pipeline", "prepared": ["image"], "requests": 3}


def test_a_port_without_the_function_has_no_such_feature() -> None:
    assert "pre_process" not in feature_states((rung_of("pipeline", "Foo", [GOOD], 1.0),))


def test_a_port_is_as_good_as_its_worst_denoiser() -> None:
    states = feature_states((rung_of("tp", "A", [GOOD], 1.0), rung_of("tp", "B", [GOOD, BAD], 1.0)))
    assert states["tensor_parallel"]["status"] == "limited"


def test_the_manifest_cites_the_evidence_and_keeps_other_features(tmp_path: Path) -> None:
    manifest(tmp_path)
    (tmp_path / "foo").mkdir()
    (tmp_path / "foo/foo_transformer.py").write_text("x = 1\n")
    record(tmp_path / "evidence.json", tmp_path, [rung_of("tp", "FooModel", [GOOD], 1.0)])
    refresh_features(tmp_path, tmp_path / "evidence.json")
    features = read_manifest(tmp_path).ports[0].features
    assert set(features) == {"lora", "tensor_parallel"}
    assert features["tensor_parallel"]["status"] == "validated"


def test_a_report_is_written_and_shows_failures(tmp_path: Path) -> None:
    rungs = (rung_of("tp", "Foo", [GOOD, BAD], 1.0), RungResult("cfg", "Foo", "skipped", reason="[no] pipeline"))
    report = VerifyReport("Foo", "porter verify Foo", {"torch": "2"}, rungs, 3.0, 9.0)
    data = json.loads(report.write(tmp_path / "deep" / "r.json").read_text())
    assert data["passed"] is False and data["seconds"]["wall"] == 3.0
    assert data["rungs"][0]["worst_rel_l2"] == 1e-2
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "relative L2 error 1e-2" in text and "[no] pipeline" in text


def test_unknown_rungs_and_names_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="no rung called modul"):
        verify("FooModel", manifest(tmp_path), rungs=["modul"])
    with pytest.raises(VerifyError, match="no port of Bar"):
        verify("Bar", tmp_path)
    with pytest.raises(VerifyError, match="does not exist"):
        verify("FooModel", tmp_path / "nowhere")


def test_replicated_weights_are_named_only_where_a_rank_holds_too_much_of_the_blocks() -> None:
    kept = {"blocks.*.norm.weight": 40}
    saved = {"block_elements": 100, "block_elements_per_rank": [55, 55], "replicated_in_blocks": kept}
    wasteful = {"block_elements": 100, "block_elements_per_rank": [70, 70], "replicated_in_blocks": kept}
    for figures, named in ((saved, None), (wasteful, kept)):
        case = CaseResult("a", "passed", "", {"rel_l2": 2e-7, **figures})
        evidence = feature_states((rung_of("tp", "Foo", [case], 1.0),))["tensor_parallel"]["evidence"]
        assert evidence["block_elements_per_rank"] == figures["block_elements_per_rank"]
        assert evidence.get("replicated_in_blocks") == named


def test_a_parameter_counts_as_replicated_only_if_every_rank_holds_all_of_it() -> None:
    whole = {"blocks.*.norm": 8, "blocks.*.proj": 64}
    shares = block_shares(whole, [{"blocks.*.norm": 8, "blocks.*.proj": 32}] * 2)
    assert shares["replicated_in_blocks"] == {"blocks.*.norm": 8}
    assert shares["block_elements_per_rank"] == [40, 40]
