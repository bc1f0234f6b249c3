"""Every denoiser with two of its layers, replayed as CUDA graphs beside the same code without.

`python3 benchmarks/experiments/replayed.py OUT [DENOISER ...]`, in the root of a checkout, on a machine with a card and the
engine. Inputs A and B alternate: A, B, A, B, A. For each mode `err` is how far the five results are from eager code, `held` how
far kept results are from what they were before the next call; `vs_static` is how far the replayed results are from those
without graphs. All relative L2.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from porter.verify.platform import bootstrap

bootstrap.activate()

import torch  # noqa: E402
import vllm_omni.diffusion.registry  # noqa: E402
import vllm_omni.diffusion.worker.diffusion_worker  # noqa: E402, F401

from porter.bench.inputs import other_values, read_inputs, write_inputs  # noqa: E402
from porter.bench.side_engine import EngineSubject  # noqa: E402
from porter.bench.sides import subject_of  # noqa: E402
from porter.bench.workload import known_workloads, load_workload  # noqa: E402
from porter.verify.bench import free_port  # noqa: E402
from porter.verify.environment import versions  # noqa: E402
from porter.verify.manifest import read_manifest  # noqa: E402

DEVICE, LAYERS = torch.device("cuda", 0), 2


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def in_turn(subject: EngineSubject, pair: list[Any]) -> tuple[list[torch.Tensor], list[float]]:
    """Results of A, B, A, B, A, and how far each was from itself after the next call."""
    kept: list[torch.Tensor] = []
    held: list[float] = []
    before: torch.Tensor | None = None
    for given in (pair[0], pair[1], pair[0], pair[1], pair[0]):
        now = subject.call(given)
        if before is not None:
            held.append(apart(before, kept[-1]))
        before = now
        kept.append(now.clone())
    return kept, held


def of_denoiser(name: str) -> dict[str, Any]:
    workload = load_workload(name, depth=LAYERS)
    stored = Path(tempfile.mkdtemp()) / "inputs.pt"
    write_inputs(workload.cases[0], stored)
    row = subject_of("port", name, read_manifest(Path("generated")), Path("generated"))
    subject = EngineSubject(
        {
            "denoiser": name,
            "config": dict(workload.config),
            "rank": 0,
            "world": 1,
            "port": free_port(),
            "dynamic": False,
            **(row or {}),
        },
        DEVICE,
    )
    inputs = read_inputs(str(stored), DEVICE, torch.bfloat16)
    pair = [subject.fit(inputs), subject.fit(other_values(inputs))]
    found: dict[str, Any] = {"case": workload.cases[0].name}
    with subject.context():
        eager = [subject.call(given).clone() for given in pair]
        found["ab"] = apart(eager[1], eager[0])
        results = {}
        for mode in ("static", "graphs"):
            subject.compile({"graphs": True} if mode == "graphs" else {})
            results[mode], held = in_turn(subject, pair)
            errors = [apart(r, eager[i % 2]) for i, r in enumerate(results[mode])]
            found[mode] = {"err": errors, "held": held}
        found["vs_static"] = [apart(a, b) for a, b in zip(results["graphs"], results["static"], strict=True)]
    subject.close()
    return found


def main(out: Path, names: list[str]) -> None:
    found: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions(), "device": torch.cuda.get_device_name(),
                             "layers": LAYERS, "denoisers": {}}  # fmt: skip
    for name in names or known_workloads():
        found["denoisers"][name] = of_denoiser(name)
        out.write_text(json.dumps(found, indent=1))
        print(name, found["denoisers"][name], flush=True)
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
