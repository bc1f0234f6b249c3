"""Whole requests: files of real size, phases of a request, a dry run through both sides, and what is judged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from porter.bench.drive import Options
from porter.bench.judge import passed
from porter.bench.record import merge, read
from porter.bench.report.performance import requests
from porter.bench.run import run
from porter.bench.whole.judge import distances, times
from porter.bench.whole.phases import split
from porter.bench.whole.request import known_requests, load_request, tiny_request
from porter.exits import OK, USAGE
from porter.resources import BENCHMARKS
from porter.verify.environment import check_environment
from porter.verify.outcome import VerifyError

ROOT = Path(__file__).resolve().parents[2]
needs_engine = pytest.mark.skipif(bool(check_environment()), reason="the engine and Diffusers are not installed")
PUBLISHED = {
    "FluxPipeline": {"transformer": 11.90, "text_encoder": 0.123, "text_encoder_2": 4.76, "vae": 0.084},
    "QwenImagePipeline": {"transformer": 20.43, "text_encoder": 8.29, "vae": 0.127},
    "StableDiffusion3Pipeline": {
        "transformer": 2.03, "text_encoder": 0.124, "text_encoder_2": 0.695, "text_encoder_3": 4.76, "vae": 0.084,
    },
    "WanPipeline": {"transformer": 1.42, "text_encoder": 5.68, "vae": 0.127},
}  # fmt: skip
"""Billions of parameters, from the sizes of the published files in bfloat16 and float16."""


# ------------------------------------------------------------------------------------------------ files
def test_every_request_has_a_known_size_and_a_case() -> None:
    assert set(known_requests()) == set(PUBLISHED)
    for name in known_requests():
        request = load_request(name, ("transformer", "transformer_2"))  # the second one is optional
        assert request.full and request.cases and "transformer" in request.components


def test_a_cut_request_gives_the_denoiser_fewer_layers_and_leaves_the_rest() -> None:
    whole, cut = (
        load_request("FluxPipeline", ("transformer",)),
        load_request("FluxPipeline", ("transformer",), depth=12),
    )
    assert cut.size == "12 of 57 layers" and not cut.full
    assert cut.components["transformer"] == {"guidance_embeds": True, "num_layers": 4, "num_single_layers": 8}
    assert {n: c for n, c in cut.components.items() if n != "transformer"} == {
        n: c for n, c in whole.components.items() if n != "transformer"
    }


def test_several_prompts_of_a_call_have_a_seed_each() -> None:
    (case,) = load_request("FluxPipeline", ("transformer",), only=("1024x1024-two",)).cases
    call = case.call
    assert len(set(call["seed"])) == 2 and call["kwargs"]["prompt"][0] == call["kwargs"]["prompt"][1]
    assert call["kwargs"]["height"] == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [({"wrong": 1}, "the keys are"), ({"cases": []}, "cases is empty"), ({"pipeline": "Other"}, "the file's name"),
     ({"cases": [{"call": {}}]}, "a case has a name"), ({"depth": None}, "depth is empty")],
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = yaml.safe_load((BENCHMARKS / "requests" / "WanPipeline.yaml").read_text())
    (tmp_path / "WanPipeline.yaml").write_text(yaml.safe_dump({**data, **change}))
    with pytest.raises(VerifyError, match=message):
        load_request("WanPipeline", ("transformer",), folder=tmp_path)


def test_a_pipeline_without_requests_and_an_unknown_case_are_refused() -> None:
    with pytest.raises(VerifyError, match="no requests of NoPipeline"):
        load_request("NoPipeline", ("transformer",))
    with pytest.raises(VerifyError, match="no case called huge"):
        tiny_request("FluxPipeline", only=("huge",))


@needs_engine
@pytest.mark.parametrize("pipeline", sorted(PUBLISHED))
def test_the_numbers_give_models_as_large_as_the_published_ones(pipeline: str, tmp_path: Path) -> None:
    import torch

    from porter.bench.whole.components import bare_model
    from porter.bench.whole.skeleton import class_of, write_skeleton
    from porter.verify.platform.shim import declare_torchvision_operators

    declare_torchvision_operators()
    checkpoint = write_skeleton(pipeline, load_request(pipeline, ("transformer",)).components, tmp_path / "checkpoint")
    assert not list(checkpoint.rglob("*.safetensors"))
    for component, billions in PUBLISHED[pipeline].items():
        folder = checkpoint / component
        model: Any = bare_model(class_of(checkpoint, component), folder, torch.bfloat16, torch.device("cpu"))
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        count = sum(p.numel() for n, p in model.named_parameters() if n not in tied) / 1e9
        assert count == pytest.approx(billions, rel=0.01), component


@needs_engine
def test_a_model_that_would_stay_tiny_is_noticed(tmp_path: Path) -> None:
    from porter.bench.whole.skeleton import write_skeleton
    from porter.verify.platform.shim import declare_torchvision_operators

    declare_torchvision_operators()
    with pytest.raises(ValueError, match="no real numbers of text_encoder, vae"):
        write_skeleton("WanPipeline", {"transformer": {}}, tmp_path / "checkpoint")


# ------------------------------------------------------------------------------------------------ phases
def test_a_request_encodes_until_the_first_call_and_decodes_after_the_last_step() -> None:
    found = split([("start", 0), ("encode", 1), ("encode", 3), ("call", 10), ("call", 14), ("step", 20), ("call", 21),
                   ("step", 32), ("decode", 33), ("end", 50)])  # fmt: skip
    assert (found.encode, found.denoise, found.decode) == (10, 22, 18)
    assert found.steps == [10, 12]


def test_requests_that_follow_each_other_add_up() -> None:
    first = [("start", 0), ("encode", 1), ("call", 5), ("step", 8), ("decode", 9)]
    found = split([*first, ("encode", 12), ("call", 14), ("step", 18), ("decode", 19), ("end", 25)])
    assert (found.encode, found.denoise, found.decode) == (5 + 2, 3 + 4, 4 + 7)
    assert found.steps == [3, 4]


def test_an_encoder_inside_a_step_belongs_to_it_and_a_decoder_ends_it() -> None:
    found = split([("start", 0), ("call", 2), ("encode", 3), ("step", 6), ("end", 7)])
    assert (found.encode, found.denoise, found.decode) == (2, 4, 1)
    unstepped = split([("start", 0), ("call", 2), ("decode", 8), ("end", 9)])
    assert (unstepped.denoise, unstepped.decode, unstepped.steps) == (6, 1, [])


# ------------------------------------------------------------------------------------------------ figures
def record() -> dict[str, Any]:
    def side(total: float) -> dict[str, Any]:
        figures = {"encode": 10.0, "denoise": total - 30.0, "decode": 20.0, "total": total, "steps": [5.0, 7.0],
                   "step": 6.0, "peak_gib": 3.25}  # fmt: skip
        return {"facts": {"parameters": 5}, "runs": {"one": {"first_seconds": 1.0}}, "failures": [], "compiled": {},
                "rounds": {"one": [figures, {**figures, "total": total + 2}]}}  # fmt: skip

    apart = {"diffusers-tuned": {"diffusers-eager": {"latents": 4e-3, "decoded": 5e-3}},
             "port-eager": {"diffusers-eager": {"latents": 2e-3, "decoded": 3e-3}},
             "port-compiled": {"diffusers-tuned": {"latents": 7e-3, "decoded": 9e-3}}}  # fmt: skip
    sides = {"diffusers-eager": side(200.0), "diffusers-tuned": side(100.0), "port-eager": side(150.0),
             "port-compiled": side(90.0)}  # fmt: skip
    row = {"size": "3 layers", "full": True, "config": {}, "cases": {"one": {"height": 8}}, "sides": sides,
           "agreement": {"one": apart}}  # fmt: skip
    return {"schema": 1, "command": "porter bench Some --whole", "versions": {}, "device": {"name": "Card"}, "ceilings": {},
            "when": "2026-01-01", "denoisers": {}, "requests": {"SomePipeline": row}, "problems": []}  # fmt: skip


def test_a_port_may_differ_by_twice_the_noise_of_diffusers() -> None:
    data = record()
    assert {d.side: d.good for d in distances(data)} == {"port-eager": True, "port-compiled": True}
    assert passed(data)
    wrong = copy.deepcopy(data)
    wrong["requests"]["SomePipeline"]["agreement"]["one"]["port-compiled"]["diffusers-tuned"]["latents"] = 9e-3
    assert not passed(wrong)


def test_without_noise_nothing_is_judged_but_what_is_not_finite() -> None:
    data = record()
    apart = data["requests"]["SomePipeline"]["agreement"]["one"]
    apart["diffusers-tuned"]["diffusers-eager"]["latents"] = 0.0
    assert {d.good for d in distances(data)} == {None} and passed(data)
    apart["port-eager"]["diffusers-eager"]["latents"] = float("inf")
    assert not passed(data)


def test_a_port_that_gave_nothing_for_a_case_does_not_pass() -> None:
    data = record()
    data["requests"]["SomePipeline"]["cases"]["two"] = {}
    assert not passed(data)


def test_times_are_medians_of_rounds_and_of_steps() -> None:
    found = times(record()["requests"]["SomePipeline"], "one")["port-compiled"]
    assert (found.total, found.step, found.steps, found.rounds) == (91.0, 6.0, 2, 2)
    assert found.spread == pytest.approx(2 / 91)


def test_the_table_compares_with_the_fastest_diffusers() -> None:
    text = requests(record())
    (row,) = (line for line in text.splitlines() if "generated port compiled" in line)
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells == ["`SomePipeline`", "one", "3", "Card", "generated port compiled", "10.0", "60.0 (2)", "6.00", "20.0",
                     "91.0", "0.901", "3.2", "7.0e-03", "4.0e-03"]  # fmt: skip
    assert requests({"denoisers": {}}) == ""


def test_records_with_and_without_requests_are_joined() -> None:
    older = {k: v for k, v in record().items() if k != "requests"}
    other = record()
    other["requests"]["SomePipeline"]["size"] = "1 of 3 layers"
    assert set(merge([older, record(), other])["requests"]) == {"SomePipeline", "SomePipeline, 1 of 3 layers"}


def test_the_page_shows_stacked_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from porter.bench.report.pages import html

    page = html(merge([record()]), tmp_path)
    assert "Whole requests" in page and page.count("<svg") == 1
    assert all(f">{phase}<" in page for phase in ("encode", "denoise", "decode"))


# ------------------------------------------------------------------------------------------------ runs
def test_whole_requests_go_to_pipelines_on_one_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(device="cpu", tiny=True, out=tmp_path / "r.json", generated=ROOT / "generated")
    assert run(["FluxPipeline"], options, cards=2, whole=True) == USAGE
    assert run(["FluxTransformer2DModel"], options, whole=True) == USAGE
    said = capsys.readouterr().err
    assert "whole requests run on one card" in said and "no pipeline with a port" in said


@needs_engine
def test_a_dry_run_serves_both_sides_from_one_checkpoint(tmp_path: Path) -> None:
    sides = ("diffusers-eager", "port-eager", "port-compiled", "port-static", "port-graphs", "diffusers-tuned")
    options = Options(
        device="cpu", tiny=True, out=tmp_path / "r.json", generated=ROOT / "generated", rounds=1, sides=sides
    )
    assert run(["FluxPipeline"], options, whole=True) == OK
    data = read(tmp_path / "r.json")
    row = data["requests"]["FluxPipeline"]
    assert set(row["sides"]) == set(sides) and set(row["cases"]) == {"tiny", "tiny-two"}
    for side in row["sides"].values():
        assert side["failures"] == [] and all(r["finite"] for r in side["runs"].values())
        for (figures,) in side["rounds"].values():
            assert len(figures["steps"]) == row["cases"]["tiny"]["num_inference_steps"]
            assert min(figures[p] for p in ("encode", "denoise", "decode")) > 0
    same = {d.case: d.latents for d in distances(data) if d.side == "port-eager"}
    assert set(same) == {"tiny", "tiny-two"} and max(same.values()) < 1e-2
    counts = {s["facts"]["parameters"] for s in row["sides"].values()}
    assert len(counts) == 1, "both sides hold the whole model"
