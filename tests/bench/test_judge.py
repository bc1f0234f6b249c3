"""Verdicts: what bounds and the spread of rounds allow to say."""

from __future__ import annotations

from typing import Any

import pytest

from porter.bench.failures import DRIVER, FLASH, MEMORY, device_problem, explained, flash_problem
from porter.bench.judge import (
    by_kernels,
    compared,
    floor_ms,
    parallel_verdicts,
    passed,
    replayed_wrong,
    speed,
    verdicts,
)
from porter.bench.kernels import attention_of
from porter.bench.record import merge
from porter.bench.rung import rung_of_denoiser
from porter.verify.bench import JobError
from porter.verify.outcome import VerifyError


def timed(*medians: float, kernel: float | None = None) -> dict[str, Any]:
    rounds = [{"median": m, "samples": [m] * 10, "peak_gib": 1.0, "kernel_ms": kernel} for m in medians]
    return {"facts": {"backend": ["FLASH_ATTN"]}, "runs": {"a": {}}, "rounds": {"a": rounds}, "profiles": {},
            "compiled": {}, "failures": []}  # fmt: skip


def record(error: float = 5.0e-3, **sides: dict[str, Any]) -> dict[str, Any]:
    agreement = {
        "diffusers-eager": {"reference": 5.0e-3},
        "port-eager": {"reference": error, "diffusers-eager": 1.0e-3},
    }
    row = {"size": "2 layers", "cases": {"a": {}}, "sides": sides, "agreement": {"a": agreement}, "parallel": {},
           "counts": {"a": {"tflop": 2.0, "least_gb": 4.0, "tokens": 8, "operator_gb": 9.0}}, "config": {}}  # fmt: skip
    return {"denoisers": {"M": row}, "problems": [], "device": {"name": "card", "cuda": True}, "command": "porter bench",
            "ceilings": {"matmul_tflops": 500.0, "copy_gbs": 2000.0}}  # fmt: skip


@pytest.mark.parametrize(("error", "good"), [(5.0e-3, True), (5.4e-3, True), (5.6e-3, False), (float("inf"), False)])
def test_a_port_may_lose_a_tenth_more_than_diffusers(error: float, good: bool) -> None:
    data = record(error, **{"port-eager": timed(2.0)})
    (verdict,) = verdicts(data)
    assert verdict.good is good
    assert passed(data) is good


def test_compiled_code_is_judged_by_diffusers_compiled_the_same_way() -> None:
    errors = {"diffusers-eager": 8.2e-3, "diffusers-dynamic": 8.1e-3, "diffusers-tuned": 6.8e-3,
              "port-eager": 8.2e-3, "port-compiled": 8.2e-3, "port-static": 8.2e-3}  # fmt: skip
    data = record()
    data["denoisers"]["M"]["agreement"]["a"] = {side: {"reference": error} for side, error in errors.items()}
    assert {v.side: v.good for v in verdicts(data)} == {"port-eager": True, "port-compiled": True, "port-static": False}
    del data["denoisers"]["M"]["agreement"]["a"]["diffusers-dynamic"]
    assert {v.side: v.good for v in verdicts(data)} == {
        "port-eager": True,
        "port-compiled": False,
        "port-static": False,
    }


@pytest.mark.parametrize(
    ("replays", "said"),
    [
        (None, "not looked at"),
        ({"held": 0.0, "again": 0.0, "other": 0.0}, "other inputs"),
        ({"held": 0.0, "again": 0.0, "other": 1.4}, None),
        ({"held": 0.0, "again": 9e-3, "other": 1.4}, None),
        ({"held": 1e-7, "again": 0.0, "other": 1.4}, "a result changes"),
        ({"held": 0.0, "again": 2e-2, "other": 1.4}, "differs from itself"),
        ({"held": 0.0, "again": float("nan"), "other": 1.4}, "differs from itself"),
    ],
)
def test_a_call_that_is_replayed_gives_what_it_gave(replays: dict[str, float] | None, said: str | None) -> None:
    side = {} if replays is None else {"replays": {"a": replays}}
    found = replayed_wrong(side, "a")
    assert (found is None) if said is None else (said in (found or ""))


def test_a_port_that_gives_nothing_does_not_pass() -> None:
    data = record()
    data["denoisers"]["M"]["agreement"] = {}
    assert not passed(data)


def test_a_problem_of_any_side_is_no_pass() -> None:
    data = record()
    data["problems"] = [{"where": "M", "message": "out of memory"}]
    assert not passed(data)


def test_a_difference_within_the_spread_of_rounds_says_nothing() -> None:
    row = record(port=timed(10.0, 10.2), near=timed(10.1, 10.1), far=timed(20.0, 20.2))["denoisers"]["M"]
    port, near, far = (speed(row, side, "a") for side in ("port", "near", "far"))
    assert port is not None and port.spread == pytest.approx(0.02)
    assert compared(port, near)["say"] == "equal within the spread"  # type: ignore[index]
    assert compared(port, far)["say"] == "faster"  # type: ignore[index]
    assert compared(far, port)["say"] == "slower"  # type: ignore[index]


def test_one_round_allows_no_claim() -> None:
    row = record(port=timed(1.0), other=timed(9.0))["denoisers"]["M"]
    assert compared(speed(row, "port", "a"), speed(row, "other", "a"))["say"].startswith("one round")  # type: ignore[index]


def test_sides_that_wait_for_launches_are_compared_by_their_kernels() -> None:
    row = record(port=timed(9.0, 7.0, kernel=4.0), other=timed(5.2, 5.2, kernel=5.0))["denoisers"]["M"]
    found = compared(speed(row, "port", "a"), speed(row, "other", "a"))
    assert found is not None and (found["by"], found["ratio"]) == ("kernels", pytest.approx(0.8))


def test_the_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    data = record()
    assert floor_ms(data, data["denoisers"]["M"], "a") == pytest.approx(4.0)
    data["denoisers"]["M"]["counts"]["a"]["least_gb"] = 20.0
    assert floor_ms(data, data["denoisers"]["M"], "a") == pytest.approx(10.0)


def test_two_cards_must_agree_and_divide_the_work() -> None:
    def two(apart: float, sharded: bool) -> dict[str, Any]:
        data = record()
        data["denoisers"]["M"]["parallel"] = {
            "port": {"tp": {"eager": {"apart": apart}, "bound": 1e-2, "sharded": sharded, "proof": "p"}}
        }
        return data

    assert parallel_verdicts(two(5e-3, True))[0]["good"]
    assert not parallel_verdicts(two(2e-2, True))[0]["good"]
    assert not parallel_verdicts(two(5e-3, False))[0]["good"]


def test_attention_is_told_from_kernel_names() -> None:
    assert attention_of(["void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<"]) == [
        "FlashAttention 3"
    ]
    assert attention_of(["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"]) == ["cuDNN"]
    assert attention_of(["fmha_cutlassF_bf16_aligned_64x64_rf_sm80"]) == ["memory-efficient"]
    assert attention_of(["triton_poi_fused__flash_attn_forward_cat_5", "cudnn::conv_fprop_kernel", "nvjet_sm90"]) == []


def test_the_gpu_rung_fails_where_flash_attention_is_missing() -> None:
    sides = ("port-eager", "port-compiled", "port-graphs")
    data = record(**{side: timed(2.0) for side in sides})
    data["denoisers"]["M"]["agreement"]["a"] |= {
        side: {"reference": 5.0e-3} for side in ("diffusers-tuned", "port-compiled", "port-graphs")
    }
    assert [c.name for c in rung_of_denoiser(data, "M").failures()] == ["a graphs"]  # nobody looked at its replays
    data["denoisers"]["M"]["sides"]["port-graphs"]["replays"] = {"a": {"held": 0.0, "again": 0.0, "other": 1.0}}
    assert rung_of_denoiser(data, "M").status == "passed"
    data["denoisers"]["M"]["sides"]["port-eager"]["facts"] = {"backend": ["TORCH_SDPA"], "flash_attention": None}
    rung = rung_of_denoiser(data, "M")
    assert [c.name for c in rung.failures()] == ["a eager"]
    assert FLASH in rung.failures()[0].message
    data["denoisers"]["M"]["sides"]["port-graphs"]["replays"] = {"a": {"held": 1.0, "again": 0.0, "other": 1.0}}
    assert [c.name for c in rung_of_denoiser(data, "M").failures()] == ["a eager", "a graphs"]


def test_the_gpu_rung_names_a_side_that_did_not_run() -> None:
    data = record(**{"port-eager": timed(2.0)})
    rung = rung_of_denoiser(data, "M")
    assert [(c.name, c.message) for c in rung.failures()] == [
        ("a compiled", "did not start"),
        ("a graphs", "did not start"),
    ]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"cuda": False, "torch": "2.13.0+cpu", "cuda_of_torch": None, "problem": "Torch not compiled"}, "without CUDA"),
        ({"cuda": False, "cuda_of_torch": "13.0",
          "problem": "The NVIDIA driver on your system is too old (found version 11040)."}, DRIVER),
        ({"cuda": False, "cuda_of_torch": "13.0", "problem": "No CUDA GPUs are available"}, "CUDA_VISIBLE_DEVICES"),
        ({"cuda": True, "devices": 1}, "2 cards are needed, 1 are visible"),
        ({"dead": True, "problem": "reference ended with exit status 1"}, "exit status 1"),
    ],
)  # fmt: skip
def test_a_machine_without_the_device_is_told_why(device: dict[str, Any], message: str) -> None:
    assert message in (device_problem(device, "cuda", 2) or "")


def test_a_machine_with_the_device_is_told_nothing() -> None:
    assert device_problem({"cuda": True, "devices": 2}, "cuda", 2) is None
    assert device_problem({"cuda": False}, "cpu") is None


def test_flash_attention_that_is_installed_and_not_used_is_told_apart() -> None:
    card = {"cuda": True}
    assert flash_problem({"backend": ["FLASH_ATTN"]}, card) is None
    assert flash_problem({"backend": ["TORCH_SDPA"], "flash_attention": None}, {"cuda": False}) is None
    assert FLASH in str(flash_problem({"backend": ["TORCH_SDPA"], "flash_attention": None}, card))
    assert "although fa3" in str(flash_problem({"backend": ["TORCH_SDPA"], "flash_attention": "fa3"}, card))


def test_a_failure_is_one_line_with_what_to_do() -> None:
    memory = explained(JobError("OutOfMemory", "Tried to allocate 2 GiB.\nmore", ""))
    assert MEMORY in memory and "\n" not in memory
    assert "\n" not in explained(VerifyError("rank1 ended with exit status -9", "its last lines:\na\nb"))


def test_results_of_two_machines_and_of_two_depths_stand_apart() -> None:
    one, other, deep = record(), record(), record()
    other["device"] = {"name": "another card", "cuda": True}
    deep["denoisers"]["M"]["size"] = "60 layers"
    found = merge([one, other, deep])["denoisers"]
    assert [(k, v["device"], v["size"]) for k, v in found.items()] == [
        ("M", "card", "2 layers"),
        ("M, 2 layers", "another card", "2 layers"),
        ("M, 60 layers", "card", "60 layers"),
    ]


def test_one_card_and_two_of_the_same_workload_are_joined() -> None:
    one, two = record(port=timed(1.0)), record()
    two["denoisers"]["M"]["parallel"] = {"port": {"tp": {}}}
    for order in ([one, two], [two, one]):
        (row,) = merge(order)["denoisers"].values()
        assert row["sides"] and row["parallel"]


def test_a_later_run_of_other_modes_leaves_the_earlier_ones_and_their_cases() -> None:
    first, later = record(), record()
    first["denoisers"]["M"] |= {"cases": {"wide": {}}, "parallel": {"port": {"one": {"v": 1}, "tp": {"v": 1}}}}
    later["denoisers"]["M"] |= {"cases": {"tall": {}}, "parallel": {"port": {"one": {"v": 2}, "cfg": {"v": 2}}}}
    (row,) = merge([first, later])["denoisers"].values()
    modes = row["parallel"]["port"]
    assert {m: (f["case"], f["v"]) for m, f in modes.items()} == {
        "one": ("tall", 2),
        "tp": ("wide", 1),
        "cfg": ("tall", 2),
    }


def test_two_cards_are_compared_by_the_rank_that_waits_least() -> None:
    def ranks(*kernels: float | None) -> list[dict[str, Any]]:
        return [{"kernel_ms": k} for k in kernels]

    found = by_kernels([ranks(80.0, 140.0), ranks(75.0, 90.0)], [ranks(150.0)])
    assert found == {"kernel_ms": 75.0, "kernel_speedup": 2.0}
    assert by_kernels([ranks(None, None)], [ranks(None)]) == {}


def test_a_later_run_replaces_one_in_which_nothing_ran_and_its_problems() -> None:
    failed, later = record(), record(**{"port-eager": timed(2.0)})
    failed["denoisers"]["M"] |= {"config": {"layers": 9}, "sides": {"port-eager": timed() | {"runs": {}}}}
    failed["problems"] = [
        {"where": "M port-eager", "message": "device-side assert"},
        {"where": "ceilings", "message": "late"},
    ]
    whole = merge([failed, later])
    assert list(whole["denoisers"]) == ["M"] and whole["denoisers"]["M"]["config"] == {}
    assert [p["where"] for p in whole["problems"]] == ["ceilings"]
    assert list(merge([later, failed])["denoisers"]) != ["M"], "a failure after a good run is kept beside it"


def test_a_failure_stays_until_a_port_ran_be_it_on_another_card() -> None:
    failed, later = record(), record(**{"port-eager": timed(2.0)})
    failed["denoisers"]["M"] |= {"sides": {"diffusers-eager": timed(1.0), "port-eager": timed() | {"runs": {}}}}
    later["device"] = {"name": "another card", "cuda": True}
    assert [r["device"] for r in merge([failed, later])["denoisers"].values()] == ["another card"]
    later["denoisers"]["M"]["sides"]["port-eager"]["runs"] = {}
    assert [r["device"] for r in merge([failed, later])["denoisers"].values()] == ["card", "another card"]
