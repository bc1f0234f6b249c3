"""How a port's blocks can be compiled, timed one after the other on one card.

`python3 benchmarks/experiments/compile_modes.py OUT DENOISER[:LAYERS[:CASE]] ...`, in the root of a checkout, on a machine
with a card and the engine. Each mode gets the same loaded denoiser, is compiled, called until it is warm, timed twice and
profiled.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from porter.verify.platform import bootstrap

bootstrap.activate()

import torch  # noqa: E402
import vllm_omni.diffusion.registry  # noqa: E402
import vllm_omni.diffusion.worker.diffusion_worker  # noqa: E402, F401
from vllm_omni.diffusion.compile import regionally_compile  # noqa: E402

from porter.bench import clock, compiled  # noqa: E402
from porter.bench.inputs import read_inputs, write_inputs  # noqa: E402
from porter.bench.kernels import profiled  # noqa: E402
from porter.bench.side_engine import EngineSubject  # noqa: E402
from porter.bench.sides import subject_of  # noqa: E402
from porter.bench.workload import load_workload  # noqa: E402
from porter.verify.bench import free_port  # noqa: E402
from porter.verify.environment import versions  # noqa: E402
from porter.verify.manifest import read_manifest  # noqa: E402

TUNED = {"max_autotune": True, "coordinate_descent_tuning": True, "triton.enable_persistent_tma_matmul": True}
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {"dynamic": True},
    "static": {"dynamic": False},
    "graphs": {"dynamic": False, "mode": "reduce-overhead"},
    "graphs-dynamic": {"dynamic": True, "mode": "reduce-overhead"},
    "coord": {"dynamic": False, "options": {"coordinate_descent_tuning": True}},
    "autotune": {"dynamic": False, "mode": "max-autotune-no-cudagraphs"},
    "autotune-tma": {"dynamic": False, "options": {**TUNED, "epilogue_fusion": True}},
    "autotune-tma-graphs": {"dynamic": False, "options": {**TUNED, "triton.cudagraphs": True}},
}
DEVICE = torch.device("cuda", 0)


def loaded(spec: str) -> tuple[EngineSubject, dict[str, Any], dict[str, str]]:
    """A denoiser with random weights, the inputs of a case, and what they are called."""
    name, depth, case = [*spec.split(":"), "", ""][:3]
    workload = load_workload(name, depth=int(depth) if depth else None)
    chosen = next((c for c in workload.cases if c.name == case), workload.cases[0])
    stored = Path(tempfile.mkdtemp()) / "inputs.pt"
    write_inputs(chosen, stored)
    row = subject_of("port", name, read_manifest(Path("generated")), Path("generated"))
    job = {"denoiser": name, "config": dict(workload.config), "rank": 0, "world": 1, "port": free_port(), **(row or {})}
    called = {"class": name, "size": workload.size, "case": chosen.name}
    return EngineSubject(job, DEVICE), read_inputs(str(stored), DEVICE, torch.bfloat16), called


def timed(subject: EngineSubject, given: Any, options: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    compiled.undo(subject.model)
    hook = subject.model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    regionally_compile(subject.model, **options)
    with subject.context():
        start = time.perf_counter()
        output = subject.call(given).float().clone()
        clock.synchronize(DEVICE)
        first = time.perf_counter() - start
        rounds = [clock.timed_round(lambda: subject.call(given), DEVICE) for _ in range(2)]
        seen = profiled(lambda: subject.call(given), DEVICE)
    hook.remove()
    return {
        "first_s": first, "ms": rounds[0].median, "ms2": rounds[1].median, "clock": rounds[1].clock, "peak": rounds[0].peak_gib,
        "kernel_ms": seen["total_us"] / 1000, "launches": seen["launches"], "kernels": seen["kernels"],
    }, output  # fmt: skip


def main(out: Path, specs: list[str]) -> None:
    found: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "device": torch.cuda.get_device_name(),
                             "ceilings": clock.ceilings(DEVICE), "runs": []}  # fmt: skip
    for spec in specs:
        subject, inputs, called = loaded(spec)
        given, want = subject.fit(inputs), None
        for mode, options in MODES.items():
            try:
                row, output = timed(subject, given, options)
            except Exception as problem:  # noqa: BLE001 - one mode costs its own figures only
                row = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
            else:
                want = output if want is None else want
                row["rel"] = ((output - want).norm() / want.norm()).item()
            found["runs"].append({**called, "mode": mode, **row})
            out.write_text(json.dumps(found, indent=1))
            print(mode, {k: v for k, v in row.items() if k != "kernels"}, flush=True)
        subject.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
