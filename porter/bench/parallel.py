"""Two cards: tensor, sequence and guidance parallel through the engine's own groups, against one card in the same mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.bench.drive import Budget, Crew, Options, Say, denoisers_of, head_of, need_card, shapes_of, workload_of
from porter.bench.failures import device_problem, explained
from porter.bench.inputs import write_inputs
from porter.bench.judge import PARALLEL_RATIO, by_kernels
from porter.bench.record import Record
from porter.bench.sides import REFERENCE, load_job, subject_of
from porter.bench.workload import Workload
from porter.verify.bench import JobError, free_port
from porter.verify.compare import difference
from porter.verify.manifest import Manifest, read_manifest
from porter.verify.outcome import VerifyError

USUAL_ERROR = 1.0e-2
"""Diffusers' bfloat16 error where no reference ran; measured 1.3e-2 to 1.6e-2 at full depth, 5e-3 at four layers."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How two ranks share one denoiser. `alone` names the mode of one card that it must agree with."""

    name: str
    parallel: Mapping[str, Any]
    alone: str | None = None
    guided: bool = False


MODES = {
    m.name: m
    for m in (
        Mode("one", {}),
        Mode("tp", {"tensor_parallel_size": 2}, "one"),
        Mode("ulysses", {"ulysses_degree": 2, "mask_sp_padding": True}, "one"),
        Mode("one-guided", {}, guided=True),
        Mode("cfg", {"cfg_parallel_size": 2}, "one-guided", guided=True),
    )
}


def chosen_modes(names: Sequence[str]) -> list[Mode]:
    """The named modes and what they are compared with. Raises VerifyError for an unknown name."""
    if unknown := [n for n in names if n not in MODES]:
        raise VerifyError(f"no mode called {', '.join(unknown)}", f"the modes are: {', '.join(MODES)}")
    wanted = set(names) | {str(MODES[n].alone) for n in names if MODES[n].alone}
    return [m for m in MODES.values() if m.name in wanted]


def bench_parallel(names: Sequence[str], options: Options, modes: Sequence[str], say: Say) -> dict[str, Any]:
    """Run the modes on two ranks; returns and writes the record. Raises VerifyError when nothing can run."""
    need_card(options)
    manifest = read_manifest(options.generated)
    workloads = [workload_of(name, options) for name in denoisers_of(names, manifest)]
    chosen = chosen_modes(modes)
    subjects = [s for s in ("port", "hand") if any(side.startswith(s) for side in options.sides)]
    record = Record(options.out, head_of(options) | {"modes": [m.name for m in chosen]})
    budget = Budget(options.budget, options.step_seconds)
    team = [(REFERENCE.name, "diffusers", 0), ("rank0", "engine", 0), ("rank1", "engine", 1)]
    with Crew(options, team) as crew:
        say("starting 3 processes")
        greetings = crew.greet(min(300.0, budget.left()))
        device = greetings["rank0"]
        dead = [f"{n}: {g['problem']}" for n, g in greetings.items() if g.get("dead")]
        if problem := device_problem(device, options.device, 2) or "; ".join(dead):
            raise VerifyError(problem)
        record.data["device"] = device
        for workload in workloads:
            say(f"{workload.denoiser}, {workload.size}, two ranks")
            Pair(crew, record, workload, manifest, options, budget, say).measure(subjects, chosen)
            record.write()
    record.write()
    return record.data


class Pair:
    """One denoiser on two ranks."""

    def __init__(
        self, crew: Crew, record: Record, workload: Workload, manifest: Manifest, options: Options, budget: Budget, say: Say
    ) -> None:  # fmt: skip
        self.crew, self.record, self.workload, self.manifest = crew, record, workload, manifest
        self.options, self.budget, self.say = options, budget, say
        self.name, self.case = workload.denoiser, workload.cases[0]
        self.folder = crew.folder / self.name
        self.folder.mkdir(exist_ok=True)
        self.inputs = self.folder / "inputs.pt"
        write_inputs(self.case, self.inputs)
        depth = {k: list(v) for k, v in workload.depth.items()}
        self.row = record.denoiser(
            self.name,
            {"size": workload.size, "full": workload.full, "depth": depth, "config": dict(workload.config),
             "cases": {self.case.name: shapes_of(self.case.inputs)}},
        )  # fmt: skip

    def measure(self, subjects: Sequence[str], modes: Sequence[Mode]) -> None:
        bound = PARALLEL_RATIO * (self._usual_error() or USUAL_ERROR)
        for subject in subjects:
            row = subject_of(subject, self.name, self.manifest, self.options.generated)
            if row is None:
                continue
            found = self.row["parallel"].setdefault(subject, {})
            for mode in modes:
                if self.budget.spent():
                    self.record.problem(f"{self.name} {subject} {mode.name}", "skipped: the time budget is spent")
                    continue
                self.say(f"  {subject} {mode.name}")
                try:
                    found[mode.name] = self._mode(row, subject, mode)
                except (JobError, VerifyError) as error:
                    self.record.problem(f"{self.name} {subject} {mode.name}", explained(error))
                    self.say(f"    {explained(error)}")
                    continue
                self._conclude(found, mode, subject, bound)
                self.record.write()

    def _usual_error(self) -> float | None:
        """Diffusers' bfloat16 error against float32 on this workload: what two cards are judged by."""
        job = load_job(
            REFERENCE, self.name, self.workload.config, manifest=self.manifest, generated=self.options.generated,
            buffers=str(self.folder / "buffers.pt"), cuda=True,
        )  # fmt: skip
        worker, outputs = self.crew.workers[REFERENCE.name], []
        try:
            for reference in (True, False):
                worker.call({**(job or {}), "reference": reference}, self.budget.timeout())
                out = self.folder / f"usual-{reference}.pt"
                outputs.append(out)
                worker.call(
                    {"job": "run", "case": self.case.name, "inputs": str(self.inputs), "out": str(out)},
                    self.budget.timeout(),
                )
            worker.call({"job": "release"}, self.budget.timeout())
        except (JobError, VerifyError) as error:
            self.record.problem(f"{self.name} reference", explained(error))
            return None
        return _apart(outputs[1], outputs[0])

    def _mode(self, row: Mapping[str, Any], subject: str, mode: Mode) -> dict[str, Any]:
        """Load on one or both ranks, then eager and compiled: output, tokens, calls; what is served is compiled, so that is
        what is timed."""
        world = 2 if mode.alone else 1
        cuda = bool(self.record.data["device"].get("cuda"))
        loaded = self._all(
            world,
            {"job": "load", "denoiser": self.name, "config": dict(self.workload.config), **row, "world": world,
             "port": free_port(), "parallel": dict(mode.parallel), "guided": mode.guided,
             "buffers": str(self.folder / "buffers.pt")},
        )  # fmt: skip
        found: dict[str, Any] = {
            "parameters": [a["parameters"] for a in loaded], "backend": loaded[0]["backend"],
            "memory_gib": [a["memory_gib"] for a in loaded],
        }  # fmt: skip
        seen = self._all(world, {"job": "sequence", "case": self.case.name, "inputs": str(self.inputs)})
        found["tokens"] = [a["tokens"] for a in seen]
        for stage in ("eager", "compiled"):
            if self.budget.spent():
                break
            if stage == "compiled":
                self._all(world, {"job": "compile", "compile_options": {} if cuda else {"backend": "eager"}})
            out = self._output(subject, mode.name, stage)
            job = {"case": self.case.name, "inputs": str(self.inputs)}
            ran = self._all(world, {**job, "job": "run", "out": str(out)})
            found["calls"] = [a["calls"] for a in ran]
            found[stage] = {"compiled": ran[0]["compiled"]}
            if self.options.rounds and stage == "compiled":
                rounds = [self._all(world, {**job, "job": "time"}) for _ in range(self.options.rounds)]
                found[stage]["rounds"] = [[a["round"] for a in answers] for answers in rounds]
                found[stage]["profiles"] = [a["profile"] for a in rounds[-1]]
                found[stage]["compiled"] = rounds[-1][0]["compiled"]  # calls after the first may compile again
        if world > 1 and "links" not in self.record.data:
            self.record.data["links"] = self._all(world, {"job": "links"})[0]["links"]
        self._all(world, {"job": "release"})
        return found

    def _all(self, world: int, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The same job on every rank at once. A rank that fails takes its peer down: it would wait for ever."""
        team = [self.crew.workers[f"rank{r}"] for r in range(world)]
        errors: list[
            JobError | VerifyError
        ] = []  # in the order in which they came: what follows is only the peer's end

        def ask(rank: int) -> dict[str, Any] | None:
            own = {**job, "rank": rank}
            if "out" in job:
                own["out"] = f"{job['out']}.rank{rank}"
            try:
                return team[rank].call(own, self.budget.timeout())
            except (JobError, VerifyError) as error:
                errors.append(error)
                for process in [w.process for w in team if w is not team[rank]]:
                    if process is not None:
                        process.kill()  # its own reader notices and reports
                return None

        with ThreadPoolExecutor(world) as pool:
            answers = list(pool.map(ask, range(world)))
        if errors:
            for worker in team:
                worker.kill()
            raise errors[0]
        return [a for a in answers if a is not None]

    def _conclude(self, found: dict[str, Any], mode: Mode, subject: str, bound: float) -> None:
        """Agreement with one card in the same mode, speed-up, and what proves that the work was divided."""
        here = found[mode.name]
        here["bound"] = bound
        alone = found.get(mode.alone or "")
        here["sharded"], here["proof"] = _proof(mode, here, alone) if alone else (True, "one card")
        if not alone:
            return
        for stage in ("eager", "compiled"):
            if stage not in here or stage not in alone:
                continue
            want = self._output(subject, str(mode.alone), stage).with_name(
                self._output(subject, str(mode.alone), stage).name + ".rank0"
            )
            own = self._output(subject, mode.name, stage)
            apart = [_apart(own.with_name(f"{own.name}.rank{r}"), want) for r in range(2)]
            here[stage]["apart"] = max(a if a is not None else float("inf") for a in apart)
            if "rounds" in here[stage] and "rounds" in alone[stage]:
                here[stage]["ms"], alone_ms = _median(here[stage]["rounds"]), _median(alone[stage]["rounds"])
                here[stage]["speedup"] = alone_ms / here[stage]["ms"]
                here[stage] |= by_kernels(here[stage]["rounds"], alone[stage]["rounds"])
        if not here["sharded"]:
            self.record.problem(f"{self.name} {subject} {mode.name}", f"nothing was divided: {here['proof']}")

    def _output(self, subject: str, mode: str, stage: str) -> Path:
        return self.folder / f"{subject}-{mode}-{stage}.pt"


def _proof(mode: Mode, here: Mapping[str, Any], alone: Mapping[str, Any]) -> tuple[bool, str]:
    if mode.name == "tp":
        whole, per = alone["parameters"][0], here["parameters"]
        return all(p < whole for p in per), f"{per[0]:,} and {per[1]:,} of {whole:,} parameters"
    if mode.name == "ulysses":
        whole, per = alone["tokens"][0], here["tokens"]
        return 0 < max(per) < whole, f"blocks see {per[0]:,} and {per[1]:,} of {whole:,} tokens"
    whole, per = alone["calls"][0], here["calls"]
    return all(0 < n < whole for n in per), f"{per[0]} and {per[1]} of {whole} calls of the denoiser"


def _median(rounds: list[list[dict[str, Any]]]) -> float:
    """The slower rank's median over all rounds: both wait for each other."""
    import statistics

    return max(statistics.median(s for r in rounds for s in r[rank]["samples"]) for rank in range(len(rounds[0])))


def _apart(got: Path, want: Path) -> float | None:
    import torch

    if not got.is_file() or not want.is_file():
        return None
    return difference(torch.load(got, weights_only=True), torch.load(want, weights_only=True))["rel_l2"]
