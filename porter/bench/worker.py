"""A process of one side: `python -m porter.bench.worker SIDE RANK`, started by `drive`. SIDE is diffusers, engine or adapter.

Reads one JSON job per line on stdin, answers one JSON line each on the original stdout; tensors travel in files.
Jobs: load, compile, run, replays, sequence, time, count, layers, walk, release, ceilings, links for a denoiser; skeleton, load,
compile, request, release for a whole pipeline. One denoiser or pipeline is loaded at a time.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

_started = time.perf_counter()

SAMPLED = 2**18
"""Elements kept of each block's output: every n-th."""


class Bench:
    """The jobs, and the one subject between `load` and `release`."""

    def __init__(self, side: str, rank: int) -> None:
        import torch

        self.side = side
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.subject: Any = None
        self._world = 1

    def load(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Build a denoiser, or a pipeline, with its random weights. `memory_gib` is what it holds then."""
        from porter.bench import clock, compiled

        self.release({})
        compiled.forget()
        start = time.perf_counter()
        self._world = job.get("world", 1)
        self.subject = self._subject(job)(job, self.device)
        clock.synchronize(self.device)
        return {**self.subject.facts, "memory_gib": clock.allocated_gib(self.device),
                "build_seconds": time.perf_counter() - start}  # fmt: skip

    def _subject(self, job: Mapping[str, Any]) -> Callable[..., Any]:
        if "pipeline" in job:
            if self.side == "engine":
                from porter.bench.whole.side_engine import EnginePipeline

                return EnginePipeline
            from porter.bench.whole.side_diffusers import DiffusersPipeline

            return DiffusersPipeline
        if self.side == "engine":
            from porter.bench.side_engine import EngineSubject

            return EngineSubject
        from porter.bench.side_diffusers import DiffusersSubject

        return DiffusersSubject

    def skeleton(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Write a checkpoint of real size without its weights to `checkpoint`."""
        from pathlib import Path

        from porter.bench.whole.skeleton import write_skeleton

        write_skeleton(job["pipeline"], job["components"], Path(job["checkpoint"]))
        return {}

    def request(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One whole request to a pipeline; with `out`, what came of it goes there."""
        from porter.bench.whole.served import request

        return request(self.subject, job, self.device)

    def compile(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Compile the blocks of what was loaded for eager use."""
        self.subject.compile(dict(job.get("compile_options") or {}))
        return {}

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One call; its output goes to `out`. `first_seconds` holds compilation."""
        import torch

        from porter.bench import clock, compiled

        calls: list[int] = []
        inputs = self._inputs(job)
        start = time.perf_counter()
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            given = self.subject.fit(inputs)
            hook = self.subject.model.register_forward_pre_hook(lambda *_: calls.append(1))
            output = self.subject.call(given)
            hook.remove()
        clock.synchronize(self.device)
        seconds = time.perf_counter() - start
        kept = output.float() if getattr(self.subject, "reference", False) else output.to(torch.bfloat16)
        torch.save(kept.cpu(), job["out"])
        return {
            "first_seconds": seconds, "calls": len(calls), "finite": bool(torch.isfinite(output).all()),
            "shape": list(output.shape), "compiled": compiled.statistics(), **self.subject.facts,
        }  # fmt: skip

    def replays(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Three calls, the second with other values. Relative L2: `held`, how far the kept results of the first are from what
        they were; `again`, how far the third is from them (the worst of all outputs); `other`, how far the second is (of the
        first output)."""
        from porter.bench.inputs import other_values
        from porter.verify.compare import difference

        def apart(one: Any, other: Any) -> float:
            return float(difference(one, other)["rel_l2"])

        inputs = self._inputs(job)
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            given, others = self.subject.fit(inputs), self.subject.fit(other_values(inputs))
            kept = self.subject.outputs(given)
            first = [t.clone() for t in kept]
            other = apart(self.subject.outputs(others)[0], first[0])
            held = max(
                apart(a, b) for a, b in zip(kept, first, strict=True)
            )  # before a third call makes it right again
            again = max(apart(a, b) for a, b in zip(self.subject.outputs(given), first, strict=True))
            return {"held": held, "again": again, "other": other}

    def sequence(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens that a repeated block of this rank sees."""
        from porter.bench.counts import sequence_of

        inputs = self._inputs(job)
        with self.subject.context():
            given = self.subject.fit(inputs)
            return {"tokens": sequence_of(self.subject.model, lambda: self.subject.call(given))}

    def time(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """One round of timed calls, and a profile after it: how long kernels ran, whatever the launches cost."""
        from porter.bench import clock, compiled
        from porter.bench.kernels import profiled

        inputs = self._inputs(job)
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            given = self.subject.fit(inputs)
            self._meet()
            done = clock.timed_round(lambda: self.subject.call(given), self.device, job.get("warm", 4), self._agreed())
            self._meet()
            seen = profiled(lambda: self.subject.call(given), self.device)
        kernel_ms = round(seen["total_us"] / 1000, 4) if self.device.type == "cuda" else None
        figures = done.to_json() | {"kernel_ms": kernel_ms}
        return {"round": figures, "profile": seen, "compiled": compiled.statistics()}

    def count(self, job: Mapping[str, Any]) -> dict[str, Any]:
        from porter.bench.counts import count

        inputs = self._inputs(job)
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            given = self.subject.fit(inputs)
            return count(self.subject.model, lambda: self.subject.call(given), inputs)

    def layers(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """A sample of every block's output: {name: tensor} in `out`."""
        import torch

        from porter.bench.counts import repeated_blocks
        from porter.verify.probes import tensors_of

        kept: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_module: Any, _args: Any, output: Any) -> None:
                found = tensors_of(output)
                if found:
                    flat = max(found, key=lambda t: t.numel()).reshape(-1)
                    kept.setdefault(name, flat[:: max(1, flat.numel() // SAMPLED)].float().cpu())

            return keep

        names = {id(m): n for n, m in self.subject.model.named_modules()}
        hooks = [b.register_forward_hook(hook(names[id(b)])) for b in repeated_blocks(self.subject.model)]
        inputs = self._inputs(job)
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            given = self.subject.fit(inputs)
            self.subject.call(given)
        for each in hooks:
            each.remove()
        torch.save(kept, job["out"])
        return {"blocks": len(kept)}

    def walk(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Feed the output back `steps` times, as an Euler sampler does (in float32); every state goes to `out`."""
        import torch

        inputs = self._inputs(job)
        if not torch.is_tensor(inputs.get("hidden_states")):
            return {"states": 0, "reason": "there is no one tensor of latents, called hidden_states"}
        state = inputs["hidden_states"].float()
        states: list[torch.Tensor] = []
        with self.subject.context():
            self.subject.settle(job["case"], inputs)
            for _ in range(job["steps"]):
                given = self.subject.fit({**inputs, "hidden_states": state.to(self.subject.dtype)})
                output = self.subject.call(given)
                if output.shape != state.shape:
                    return {"states": 0, "reason": f"the output {list(output.shape)} is no latent {list(state.shape)}"}
                state = state + output.float() / job["steps"]
                states.append(state.cpu())
        torch.save(torch.stack(states), job["out"])
        return {"states": len(states)}

    def release(self, _job: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        from porter.bench import compiled

        if self.subject is not None:
            subject, self.subject = self.subject, None
            subject.close()
            del subject
            compiled.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def ceilings(self, _job: Mapping[str, Any]) -> dict[str, Any]:
        from porter.bench import clock

        return dict(clock.ceilings(self.device))

    def links(self, _job: Mapping[str, Any]) -> dict[str, Any]:
        from porter.bench import clock

        return {"links": clock.links(self.device)}

    def _inputs(self, job: Mapping[str, Any]) -> dict[str, Any]:
        from porter.bench.inputs import read_inputs

        return read_inputs(job["inputs"], self.device, self.subject.dtype)

    def _meet(self) -> None:
        import torch.distributed as dist

        if self._world > 1:
            dist.barrier()

    def _agreed(self) -> Callable[[float], float] | None:
        import torch
        import torch.distributed as dist

        if self._world == 1:
            return None

        def mean(estimate: float) -> float:
            value = torch.tensor([estimate], device=self.device)
            dist.all_reduce(value)
            return value.item() / self._world

        return mean


def describe(rank: int) -> dict[str, Any]:
    """The device that this process works on, or why there is none."""
    import torch

    found: dict[str, Any] = {"cuda": False, "torch": torch.__version__, "cuda_of_torch": torch.version.cuda}
    try:
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(rank)
        free, total = torch.cuda.mem_get_info(rank)
        found |= {"cuda": True, "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
                  "memory_gib": total / 2**30, "free_gib": free / 2**30, "devices": torch.cuda.device_count()}  # fmt: skip
    except (RuntimeError, AssertionError) as problem:
        found["problem"] = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    return found


def failure(problem: BaseException) -> dict[str, Any]:
    """An answer that says what went wrong; memory that ran out is always of kind OutOfMemory."""
    text = str(problem)
    memory = any(_is_memory(p) for p in _chain(problem))
    kind = "OutOfMemory" if memory else type(problem).__name__
    return {"ok": False, "type": kind, "error": text[:2000], "traceback": traceback.format_exc()[-3000:]}


def _chain(problem: BaseException) -> list[BaseException]:
    """An exception and what led to it."""
    found: list[BaseException] = []
    following: BaseException | None = problem
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _is_memory(problem: BaseException) -> bool:
    import torch

    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(problem)


def main() -> None:
    side, rank = sys.argv[1], int(sys.argv[2])
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if side in ("engine", "adapter"):
        from porter.verify.platform import bootstrap

        bootstrap.activate()
    else:
        from porter.verify.platform.shim import declare_torchvision_operators

        declare_torchvision_operators()
    import torch

    torch.set_num_threads(int(os.environ.get("PORTER_THREADS", "1")))
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if side in ("engine", "adapter"):
        import vllm_omni.diffusion.registry
        import vllm_omni.diffusion.worker.diffusion_worker  # noqa: F401
    device = describe(rank)
    if device["cuda"]:
        torch.cuda.set_device(rank)
    bench = Bench(side, rank)
    print(json.dumps({"ok": True, "import_seconds": time.perf_counter() - _started, "device": device}), file=reply)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        try:
            answer = {"ok": True, **getattr(bench, job["job"])(job)}
        except Exception as problem:  # noqa: BLE001 - goes to the driver
            answer = failure(problem)
            del problem
        if not answer["ok"] and answer["type"] == "OutOfMemory":
            bench.release({})
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}, default=str), file=reply)
    os._exit(0)  # process groups of a card need no orderly end


if __name__ == "__main__":
    main()
