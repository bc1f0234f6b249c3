"""Rung `serve`: the public `Omni(model=DIR)` finds and uses the port through the plug-in, and gives Diffusers' image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from porter.interrupts import end_session, uninterrupted
from porter.verify.bench import Bench, Clock, JobError
from porter.verify.manifest import Port
from porter.verify.outcome import PRE_PROCESS, CaseResult, RungResult, rung_of, skipped
from porter.verify.pipeline_spec import SEED, PipelineSpec
from porter.verify.platform import bootstrap
from porter.verify.rungs.pipeline import checkpoint_of, pictures_of

TIMEOUT = 300.0
EIGHT_BITS = 1.01 / 255
"""Largest difference of two images in [0, 1] that were rounded to 8 bits from equal floats."""


def serve(
    bench: Bench, generated: Path | str, port: Port, spec: PipelineSpec | None, options: dict[str, Any] | None = None
) -> RungResult:
    """One request in a fresh process; `options` go to Omni (step_execution, parallel_config, ...)."""
    if port.module is None:
        return skipped("serve", port.source_class, "the pipeline is not converted yet")
    if spec is None:
        return skipped("serve", port.source_class, f"no tests/corpus/pipelines/{port.source_class}.yaml")
    clock = Clock()
    checkpoint = checkpoint_of(bench, spec)
    kwargs = dict(spec.get("call"))
    if spec.get("negative"):
        kwargs["negative_prompt"] = spec.get("negative")
    prompt = {k: v for k, v in kwargs.items() if "prompt" in k.split("_")}
    known = _sampling_fields()
    rest = {k: v for k, v in kwargs.items() if k not in prompt}
    sampling = {k: v for k, v in rest.items() if k in known}
    if extra := {k: v for k, v in rest.items() if k not in known}:
        sampling["extra_args"] = extra
    images = {name: pictures_of(bench, name, entry) for name, entry in spec.get("images", {}).items()}
    out, witness = bench.path("served"), bench.path("witness", ".txt")
    job = {
        "generated": str(Path(generated).resolve()), "arch": port.arch, "checkpoint": checkpoint, "prompt": prompt,
        "sampling": sampling, "seed": SEED, "out": out, "options": options or {}, "images": images,
    }  # fmt: skip
    program = Path(bench.path("serve", ".json"))
    program.write_text(json.dumps(job))
    env = bootstrap.environment(generated, (port.arch,)) | {"PORTER_WITNESS": witness}
    code, log = _run([sys.executable, "-P", "-m", "porter.verify.serve_program", str(program)], env)
    if code != 0:
        reason = "no answer in time" if code is None else f"exit status {code}"
        where = {"traceback": log[-3000:]}
        case = CaseResult("Omni.generate", "failed", f"{reason}: {_last_error(log)}", seconds=clock(), where=where)
        return rung_of("serve", port.source_class, [case], clock())
    cases = [_compare(bench, spec, checkpoint, kwargs, images, out, witness)]
    if port.pre_process is not None and images:
        cases.append(_prepared(Path(witness)))
    return rung_of("serve", port.source_class, cases, clock())


def _prepared(witness: Path) -> CaseResult:
    """Whether the engine called the pre-process function, and it made something of the request's media."""
    lines = [line.split()[1:] for line in witness.read_text().splitlines()] if witness.is_file() else []
    made = sorted({name for first, *names in lines if first == "prepared" for name in names})
    if not made:
        return CaseResult(PRE_PROCESS, "failed", "the engine process prepared nothing of the media")
    return CaseResult(PRE_PROCESS, "passed", "", {"prepared": made})


def _sampling_fields() -> frozenset[str]:
    """Names of the engine's sampling fields, read from its source (this process does not import the engine)."""
    import ast
    import importlib.util

    spec = importlib.util.find_spec("vllm_omni")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "inputs" / "data.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "OmniDiffusionSamplingParams":
            return frozenset(
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            )
    return frozenset()


def _run(command: list[str], env: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: it took too long and was ended with its children) and output."""
    with uninterrupted():
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        end_session(process)
        text, _ = process.communicate()
        return None, text
    finally:
        end_session(process)


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if "Error" in line]
    return lines[-1][:300] if lines else log.strip()[-300:]


def _compare(
    bench: Bench,
    spec: PipelineSpec,
    checkpoint: str,
    kwargs: dict[str, Any],
    images: dict[str, Any],
    out: str,
    witness: str,
) -> CaseResult:
    import torch

    if not os.path.exists(witness):
        return CaseResult("Omni.generate", "failed", "the engine did not use the port")
    served = torch.load(out, weights_only=True)
    figures = {k: round(served[k], 2) for k in ("seconds_init", "seconds_generate")}
    if not served["images"]:
        return CaseResult("Omni.generate", "failed", "Omni returned no image", figures)
    wanted = bench.path("wanted")
    job: dict[str, Any] = {
        "job": "generate",
        "class": spec.pipeline,
        "checkpoint": checkpoint,
        "kwargs": kwargs,
        "seed": SEED,
    }
    job["images"] = images
    try:
        bench.baseline.call(job | {"out": wanted})
    except JobError as error:
        return CaseResult("Omni.generate", "failed", f"Diffusers raises {error}", figures)
    want = torch.load(wanted, weights_only=True)
    got = torch.stack(served["images"])
    got = got.double() / 255 if got.dtype == torch.uint8 else got.double()
    if want.dim() > 3:  # pictures: channels last
        want = want.movedim(-3, -1)
    want = want.double().reshape(got.shape) if want.numel() == got.numel() else want
    if want.shape != got.shape:
        return CaseResult("Omni.generate", "failed", f"shape {list(got.shape)}, expected {list(want.shape)}", figures)
    figures["max_abs"] = (got - want).abs().max().item()
    good = figures["max_abs"] <= EIGHT_BITS
    message = "" if good else f"differs by {figures['max_abs']:.4f}, more than 8-bit rounding"
    return CaseResult("Omni.generate", "passed" if good else "failed", message, figures)
