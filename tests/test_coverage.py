"""The coverage table has a row for everything in scope and claims only what holds for the code of today."""

import csv
import io
import json
from pathlib import Path

import pytest

from porter.catalogue import LivePipeline, live_pipelines
from porter.coverage import COLUMNS, handled, rows, table
from porter.evidence import Finding, remember
from porter.resources import CORPUS
from porter.source.library import open_library
from porter.status import blockers, is_equal, lines
from porter.targets import all_targets
from porter.verify.outcome import CaseResult
from porter.verify.parts import parts_of

GOOD = {"status": "validated", "evidence": {"worst_rel_l2": 2e-7, "cases": 4}}
CATALOGUE = """pipeline,tier,family,denoisers
OnePipeline,1a,image: t2i,Net
TwoPipeline,1b,image: edit,Lost
OldPipeline,3,x,UNet
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "generated/net").mkdir(parents=True)
    (tmp_path / "corpus/configs").mkdir(parents=True)
    (tmp_path / "corpus/catalogue.csv").write_text(CATALOGUE)
    (tmp_path / "corpus/configs/Spare.yaml").write_text("")
    net = {"transformer": {"source": "diffusers.Net", "module": "net_transformer", "class": "Net"}}
    port = {"source": "diffusers.OnePipeline", "arch": "OnePipeline", "folder": "net", "module": "pipeline_one"}
    port |= {"denoisers": net, "features": {"cfg_parallel": {"status": "unsupported", "reason": "no branches"}}}
    for module in ("net_transformer", "pipeline_one"):
        (tmp_path / f"generated/net/{module}.py").write_text("x = 1\n")
    sites = {"engine-attention": {"applied": 1, "waived": 5}, "replace-logger": {"inferred": 3}}
    about = {"sites": sites, "diagnostics": ["PORT133 a", "PORT133 b"]}
    record = {"transformers": {"Net": about}, "pipelines": {}, "lines": {}}
    (tmp_path / "generated/net/port.json").write_text(json.dumps(record))
    (tmp_path / "generated/manifest.json").write_text(json.dumps({"ports": [port]}))
    return tmp_path


def found(place: Path) -> dict[str, dict[str, str]]:
    made = rows(place / "generated", place / "corpus", place / "hints")
    return {row["class"]: row for row in made}


def prove(place: Path, name: str, **features: object) -> None:
    seconds = dict.fromkeys(features, 2.0)
    remember(place / "corpus/evidence.json", place / "generated", {name: Finding(features, seconds)})  # type: ignore[arg-type]


def test_what_has_no_port_is_a_row_that_says_why(place):
    made = found(place)
    assert set(made) == {"Net", "Lost", "Spare", "OnePipeline", "TwoPipeline"}
    assert made["TwoPipeline"]["blocked_by"] == "no port of Lost"
    assert made["Lost"]["port"] == made["Spare"]["port"] == "no"


def test_a_pipeline_that_does_not_convert_is_blocked_by_its_diagnostic(place):
    path = place / "generated/manifest.json"
    data = json.loads(path.read_text())
    reason = "PORT401 at pipelines/one.py:7: no loop"
    data["ports"][0] |= {"module": None, "features": {"pipeline": {"status": "unsupported", "reason": reason}}}
    path.write_text(json.dumps(data))
    assert found(place)["OnePipeline"]["blocked_by"] == reason


def test_proof_of_a_denoiser_is_in_its_row_and_lapses_with_its_code(place):
    prove(place, "Net", transformer=GOOD, bfloat16={"status": "limited", "evidence": {"error_ratio": 1.204}})
    row = found(place)["Net"]
    assert (row["module"], row["module_error"], row["bf16"], row["bf16_ratio"]) == (
        "validated",
        "2.0e-07",
        "limited",
        "1.20",
    )
    assert row["seconds"] == "4"
    (place / "generated/net/net_transformer.py").write_text("x = 2\n")
    assert "module" not in found(place)["Net"]


def test_parts_and_modes_of_a_pipeline_are_in_its_row(place):
    parts = {"encode": "validated", "latents": "limited"}
    prove(place, "OnePipeline", pipeline={"status": "limited", "evidence": {"parts": parts}}, step_execution=GOOD)
    row = found(place)["OnePipeline"]
    assert (row["encode"], row["latents"], row["step"]) == ("validated", "limited", "validated")
    assert row["cfg"] == "unsupported"


def test_sites_handled_by_ops_are_a_share_of_those_that_were_rewritten(place):
    row = found(place)["Net"]
    assert (row["op_share"], row["diagnostics"]) == ("0.25", "PORT133:2")
    assert handled({"a": {"applied": 2, "waived": 9}, "b": {"inferred": 1}}, {"b"}) == (3, 1)


def test_the_table_is_csv_with_every_column(place):
    text = table(place / "generated", place / "corpus", place / "hints")
    assert next(csv.reader(io.StringIO(text))) == list(COLUMNS)


def test_status_counts_what_is_equal_and_names_what_blocks_the_rest(place):
    parts = dict.fromkeys(("encode", "latents", "decoded"), "validated")
    prove(place, "OnePipeline", pipeline={"status": "validated", "evidence": {"parts": parts}})
    live, made = live_pipelines(place / "corpus"), found(place)
    one, *_, scope, everything = lines(live, made)
    assert (one.live, one.ported, one.equal) == (1, 1, 1)
    assert (scope.live, scope.equal, everything.live) == (2, 1, 3)
    assert blockers(live, made) == [(["TwoPipeline"], "no port of Lost"), (["OldPipeline"], "a UNet")]


def test_a_pipeline_that_was_not_run_is_not_equal():
    assert not is_equal({"port": "net"})
    assert not is_equal({"latents": "validated", "media": "limited"})


# ---- parts of a pipeline


def case(name, status="passed", **figures):
    return CaseResult(name, status, "", figures)


def test_parts_are_judged_by_the_requests_that_ask_about_them():
    cases = [
        case("plain", inputs_rel_l2=0.0, latents_rel_l2=1e-7, output_rel_l2=1e-7),
        case("negative-prompt", "failed", inputs_rel_l2=0.0, latents_rel_l2=1e-7, output_rel_l2=0.3, media=["image"]),
        case("defaults-omitted", latents_rel_l2=0.0),
        case("raises-both", "failed"),
    ]
    assert parts_of(cases) == {
        "encode": "validated", "latents": "validated", "decoded": "limited", "defaults": "validated",
        "guidance": "unsupported", "media": "unsupported",
    }  # fmt: skip


def test_a_request_that_got_nowhere_has_no_latents():
    assert parts_of([case("plain", "failed")])["latents"] == "unsupported"


def test_a_part_that_nothing_asks_about_is_left_out():
    assert "media" not in parts_of([case("plain", latents_rel_l2=0.0)])


# ---- the catalogue


def test_the_catalogue_names_every_live_pipeline_with_a_transformer():
    live = {p.name: p for p in live_pipelines(CORPUS)}
    for target in all_targets(open_library()):
        if target.name in live:
            classes = {q.rpartition(".")[2] for q in target.denoisers.values()}
            assert classes <= set(live[target.name].denoisers) or not live[target.name].in_scope, target.name
    missing = {p.name for p in live.values() if p.in_scope} - {t.name for t in all_targets(open_library())}
    assert missing == set()


def test_the_catalogue_is_sorted_and_has_no_name_twice():
    names = [p.name for p in live_pipelines(CORPUS)]
    assert names == sorted(set(names))
    assert LivePipeline("A", "2c", "x", ()).in_scope and not LivePipeline("A", "3", "x", ()).in_scope
