"""One run: the processes of all sides, started at once, working in turn, within a time budget."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from porter.bench.failures import NO_CARD, device_problem, explained, flash_problem, poisoned
from porter.bench.inputs import write_inputs
from porter.bench.judge import replayed_wrong
from porter.bench.record import Record
from porter.bench.sides import REFERENCE, SIDES, Side, load_job
from porter.bench.workload import Workload, load_workload, tiny_workload
from porter.verify.bench import JobError, Worker, free_port
from porter.verify.environment import gpu_present, versions
from porter.verify.manifest import Manifest, read_manifest
from porter.verify.outcome import VerifyError
from porter.verify.platform import bootstrap

STEP_SECONDS = 180.0
LEAST_SECONDS = 20.0
MEMORY_SHARE = 0.8
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Options:
    """What a run does. `steps` is the length of the walk that shows how errors grow; 0 leaves it out. Without rounds
    nothing is timed: the errors are all that is found."""

    device: str = "cuda"
    generated: Path = Path("generated")
    out: Path = Path("bench.json")
    sides: tuple[str, ...] = tuple(SIDES)
    cases: tuple[str, ...] = ()
    most_cases: int | None = None
    depth: int | None = None
    tiny: bool = False
    alone: bool = False
    rounds: int = 2
    steps: int = 0
    budget: float = 3600.0
    step_seconds: float = STEP_SECONDS
    threads: int = 1


Say = Callable[[str], None]


class Budget:
    """Seconds that are left of a run, for the next step."""

    def __init__(self, seconds: float, step: float) -> None:
        self._end, self._step = time.perf_counter() + seconds, step

    def left(self) -> float:
        return self._end - time.perf_counter()

    def timeout(self) -> float:
        return max(1.0, min(self._step, self.left()))

    def spent(self) -> bool:
        return self.left() < min(LEAST_SECONDS, self._step)


class Crew:
    """The workers of a run and its scratch folder. Use as a context manager."""

    def __init__(self, options: Options, names: Iterable[tuple[str, str, int]]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="porter_bench_"))
        env = bootstrap.environment() | {
            "PORTER_THREADS": str(options.threads),
            "OMP_NUM_THREADS": str(options.threads),
        }
        if options.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        # Multicast needs a fabric manager that a rented card may lack; plain NCCL is what the engine's groups use.
        for key in ("NCCL_NVLS_ENABLE", "VLLM_ALLREDUCE_USE_SYMM_MEM"):
            env.setdefault(key, "0")
        for key in ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"):
            env.setdefault(key, "1")
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")  # several sides compile at once
        program = [sys.executable, "-P", "-m", "porter.bench.worker"]
        self.workers = {name: Worker(name, [*program, side, str(rank)], env, self.folder) for name, side, rank in names}

    def __enter__(self) -> Self:
        for worker in self.workers.values():
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def greet(self, timeout: float) -> dict[str, dict[str, Any]]:
        """Wait for all imports; {name: what the worker says of its device}, or a `problem` where it did not start."""
        found: dict[str, dict[str, Any]] = {}
        for name, worker in self.workers.items():
            try:
                found[name] = worker.greet(timeout).get("device", {})
            except VerifyError as error:
                found[name] = {"problem": explained(error), "dead": True}
        return found

    def alive(self, name: str) -> bool:
        return self.workers[name].process is not None


def bench(names: Sequence[str], options: Options, say: Say | None = None) -> dict[str, Any]:
    """Measure denoisers; returns (and writes to `options.out`) the record.

    Raises VerifyError when nothing can run: no device, no engine, an unknown name or case, a broken manifest.
    """
    say = say or (lambda _text: None)
    need_card(options)
    manifest = read_manifest(options.generated)
    workloads = [workload_of(name, options) for name in denoisers_of(names, manifest)]
    sides = [SIDES[s] for s in options.sides]
    record = Record(options.out, head_of(options))
    budget = Budget(options.budget, options.step_seconds)
    with Crew(options, [(s.name, s.program, 0) for s in (REFERENCE, *sides)]) as crew:
        say(f"starting {len(crew.workers)} processes")
        greetings = crew.greet(min(300.0, budget.left()))
        device = greetings[REFERENCE.name]
        if problem := device_problem(device, options.device):
            raise VerifyError(problem)
        record.data["device"] = device
        for side in [s for s in sides if greetings[s.name].get("dead")]:
            record.problem(side.name, f"did not start: {greetings[side.name]['problem']}")
            sides.remove(side)
        _ceilings(crew, record, sides, budget)
        for workload in workloads:
            if budget.spent():
                record.problem(workload.denoiser, "skipped: the time budget is spent")
                continue
            say(f"{workload.denoiser}, {workload.size}")
            Subject(crew, record, workload, manifest, options, budget, say).measure(sides)
            record.write()
    record.write()
    return record.data


def need_card(options: Options) -> None:
    """Raise VerifyError at once where there is nothing to wait for."""
    if options.device == "cuda" and not gpu_present():
        raise VerifyError("there is no accelerator on this machine", NO_CARD)


def denoisers_of(names: Sequence[str], manifest: Manifest) -> tuple[str, ...]:
    """Denoiser classes that pipelines or denoisers named by the user mean, each once."""
    from porter.verify.manifest import find

    found: dict[str, None] = {}
    for name in names:
        for denoiser in find(manifest, name.removeprefix("diffusers."))[1]:
            found[denoiser.source_class] = None
    return tuple(found)


def workload_of(denoiser: str, options: Options) -> Workload:
    if options.tiny:
        return tiny_workload(denoiser, only=options.cases, most=options.most_cases)
    return load_workload(denoiser, depth=options.depth, only=options.cases, most=options.most_cases)


def head_of(options: Options) -> dict[str, Any]:
    return {
        "command": command(), "versions": versions() | extra_versions(), "device": {},
        "options": {"rounds": options.rounds, "depth": options.depth, "tiny": options.tiny, "alone": options.alone,
                    "steps": options.steps, "device": options.device},
        "when": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def command() -> str:
    """The command as it was given, without the folders of files."""
    return " ".join(["porter bench", *(Path(a).name if a.startswith("/") else a for a in _arguments())])


def _arguments() -> list[str]:
    return sys.argv[2:] if sys.argv[1:2] == ["bench"] else sys.argv[1:]


def extra_versions() -> dict[str, str]:
    """Versions that matter on an accelerator only."""
    from porter.verify.environment import version_of

    names = ("triton", "fa3-fwd", "flash-attn", "flash_attn_3", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
    return {n: v for n in names if (v := version_of(n))}


def _ceilings(crew: Crew, record: Record, sides: list[Side], budget: Budget) -> None:
    try:
        answer = crew.workers[REFERENCE.name].call({"job": "ceilings"}, budget.timeout())
        record.data["ceilings"] = {k: answer[k] for k in ("matmul_tflops", "copy_gbs")}
    except (JobError, VerifyError) as error:
        record.problem("ceilings", explained(error))


class Subject:
    """One denoiser on all sides: prepared together, timed in turn."""

    def __init__(
        self, crew: Crew, record: Record, workload: Workload, manifest: Manifest, options: Options, budget: Budget, say: Say
    ) -> None:  # fmt: skip
        self.crew, self.record, self.workload, self.manifest = crew, record, workload, manifest
        self.options, self.budget, self.say = options, budget, say
        self.name = workload.denoiser
        self.folder = crew.folder / self.name
        self.folder.mkdir(exist_ok=True)
        self.row = record.denoiser(
            self.name,
            {"size": workload.size, "full": workload.full, "depth": {k: list(v) for k, v in workload.depth.items()},
             "config": dict(workload.config), "cases": {c.name: shapes_of(c.inputs) for c in workload.cases}},
        )  # fmt: skip
        for case in workload.cases:
            write_inputs(case, self._inputs(case.name))

    def measure(self, sides: list[Side]) -> None:
        """Reference first, then every side; figures reach the record as soon as they exist."""
        prepared = self._prepare(REFERENCE)
        present = [s for s in sides if self._job(s) is not None]
        for side in sides:
            if side not in present:
                self.record.side(self.name, side.name)["failures"].append("there is no such port of this denoiser")
        together = not self.options.alone and self._fits(len(present))
        self.row["together"] = together
        if together:
            self._call(REFERENCE, {"job": "release"})
            with ThreadPoolExecutor(max(1, len(present))) as pool:
                ready = [s for s, ok in zip(present, pool.map(self._prepare, present), strict=True) if ok]
            self._agree(prepared)
            for side in ready:
                self._look(side)
            for index in range(self.options.rounds):
                for side in ready if index % 2 == 0 else reversed(ready):
                    self._time(side)
            for side in ready:
                self._call(side, {"job": "release"})
        else:
            self._call(REFERENCE, {"job": "release"})
            self._one_by_one(present, prepared)
        self._agree(prepared)

    def _one_by_one(self, present: list[Side], prepared: bool) -> None:
        for index in range(max(1, self.options.rounds)):
            for side in present if index % 2 == 0 else list(reversed(present)):
                if self.budget.spent() or not self._prepare(side):
                    continue
                if self.options.rounds:
                    self._time(side)
                if index == 0:
                    self._look(side)
                    self._agree(prepared)
                self._call(side, {"job": "release"})

    def _prepare(self, side: Side) -> bool:
        """Load, and run every case once. False when the side can't go on."""
        job = self._job(side)
        if job is None:
            return False
        found = self.record.side(self.name, side.name)
        answer = self._call(side, job)
        if answer is None:
            return False
        found["facts"] |= _facts(answer)
        if side.subject in ("hand", "port") and (why := flash_problem(answer, self.record.data["device"])):
            self.record.problem(f"{self.name} {side.name}", why)
        for case in self.workload.cases:
            run = {"job": "run", "case": case.name, "inputs": str(self._inputs(case.name)),
                   "out": str(self._output(side, case.name))}  # fmt: skip
            answer = self._call(side, run)
            if answer is None:
                continue
            found["runs"][case.name] = {k: answer[k] for k in ("first_seconds", "calls", "finite", "shape")}
            found["compiled"][case.name] = answer["compiled"]
            found["facts"] |= _facts(answer)
            if side.graphs:
                self._replay(side, case.name)
        self._grow(side)
        return bool(found["runs"])

    def _replay(self, side: Side, case: str) -> None:
        """Whether results of graphs are kept and come again, once they were recorded."""
        found = self.record.side(self.name, side.name)
        answer = self._call(side, {"job": "replays", "case": case, "inputs": str(self._inputs(case))})
        if answer is not None:
            found.setdefault("replays", {})[case] = {k: answer[k] for k in ("held", "again", "other")}
            if why := replayed_wrong(found, case):
                self.record.problem(f"{self.name} {side.name}", f"{case}: {why}")

    def _grow(self, side: Side) -> None:
        """Samples of every block and of every step of a walk, where they are asked for."""
        if not self.options.steps or (side.compiled and side.subject != "port"):
            return
        case = self.workload.cases[0].name
        job = {"case": case, "inputs": str(self._inputs(case))}
        if not side.compiled:
            self._call(side, {**job, "job": "layers", "out": str(self.folder / f"{side.name}.layers.pt")})
        walk = {**job, "job": "walk", "steps": self.options.steps, "out": str(self.folder / f"{side.name}.walk.pt")}
        self._call(side, walk)

    def _time(self, side: Side) -> None:
        found = self.record.side(self.name, side.name)
        for case in found["runs"]:
            answer = self._call(side, {"job": "time", "case": case, "inputs": str(self._inputs(case))})
            if answer is not None:
                found["rounds"].setdefault(case, []).append(answer["round"])
                found["profiles"][case] = answer["profile"]
                found["compiled"][case] = answer["compiled"]
        self.record.write()

    def _look(self, side: Side) -> None:
        """Operations and bytes, from the eager Diffusers side."""
        if side.name != "diffusers-eager":
            return
        for case in list(self.record.side(self.name, side.name)["runs"]):
            counts = self._call(side, {"job": "count", "case": case, "inputs": str(self._inputs(case))})
            if counts:
                self.row["counts"][case] = {k: counts[k] for k in ("tflop", "operator_gb", "least_gb", "tokens")}
        self.record.write()

    def _agree(self, prepared: bool) -> None:
        """Relative L2 errors of all outputs: against the float32 reference and between sides."""
        from porter.bench.agreement import agreement, growth, pictures

        if prepared:
            self.row["agreement"] = agreement(self.folder, [c.name for c in self.workload.cases])
            self.row["growth"] = growth(self.folder)
            self.row["pictures"] = pictures(self.folder, self.workload.cases[0].name)
        self.record.write()

    def _fits(self, sides: int) -> bool:
        """Whether all sides fit on the card together, judged by the parameters of the reference."""
        device, facts = self.record.data["device"], self.record.side(self.name, REFERENCE.name)["facts"]
        if not device.get("cuda"):
            return True
        parameters = facts.get("parameters")
        if parameters is None:
            return False
        needed = sides * (2 * parameters / GIB + 3.0) + 4.0
        return needed < MEMORY_SHARE * device["memory_gib"]

    def _call(self, side: Side, job: dict[str, Any]) -> dict[str, Any] | None:
        """One job of one side; a failure becomes one message in the record and the others go on."""
        found = self.record.side(self.name, side.name)
        if job["job"] != "load" and not self.crew.alive(side.name):
            return None  # it died, which was said then; the next load starts it again
        if self.budget.spent() and job["job"] != "release":
            found["failures"].append(f"{job['job']} skipped: the time budget is spent")
            return None
        try:
            return self.crew.workers[side.name].call(job, self.budget.timeout())
        except (JobError, VerifyError) as error:
            message = f"{job['job']}{' of ' + job['case'] if 'case' in job else ''}: {explained(error)}"
            found["failures"].append(message)
            self.record.problem(f"{self.name} {side.name}", message)
            self.say(f"  {side.name}: {message}")
            if isinstance(error, JobError) and poisoned(error):
                self.crew.workers[side.name].kill()  # the next load starts a fresh one
            return None

    def _job(self, side: Side) -> dict[str, Any] | None:
        job = load_job(
            side, self.name, self.workload.config, manifest=self.manifest, generated=self.options.generated,
            buffers=str(self.folder / "buffers.pt"), cuda=bool(self.record.data["device"].get("cuda")),
        )  # fmt: skip
        return job if job is None or side.program != "engine" else job | {"port": free_port()}

    def _inputs(self, case: str) -> Path:
        return self.folder / f"{case}.inputs.pt"

    def _output(self, side: Side, case: str) -> Path:
        return self.folder / f"{side.name}@{case}.pt"


def _facts(answer: dict[str, Any]) -> dict[str, Any]:
    technical = {"ok", "seconds", "first_seconds", "calls", "finite", "shape", "compiled"}
    return {k: v for k, v in answer.items() if k not in technical}


def shapes_of(inputs: Any) -> dict[str, Any]:
    """The description of inputs, for the report."""
    return {k: v for k, v in inputs.items() if not (isinstance(v, dict) and "map" in v)}
