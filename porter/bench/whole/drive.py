"""One run over whole requests: a process for Diffusers and one for each subject of the engine, timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from porter.bench.drive import GIB, MEMORY_SHARE, Budget, Crew, Options, Say, head_of, need_card
from porter.bench.failures import device_problem, explained, flash_problem, poisoned
from porter.bench.record import Record
from porter.bench.sides import BACKENDS, SIDES, Side, hand_ports
from porter.bench.whole.request import Request, load_request, tiny_request
from porter.verify.bench import JobError, free_port
from porter.verify.manifest import Port, find, read_manifest
from porter.verify.outcome import VerifyError

DIFFUSERS = "diffusers"
WITHOUT = ("adapter", "diffusers-dynamic")
"""Sides of denoisers that whole requests do not have: the adapter serves Diffusers' own pipeline."""
MODES = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
"""Eager, compiled for all shapes, compiled for each, replayed as graphs: (compiled, static, graphs), in the order in which one
load serves them."""
WORK_GIB = 12.0
"""What a request is taken to need beside the weights when it is asked whether two pipelines fit on a card."""


def bench_whole(names: Sequence[str], options: Options, say: Say | None = None) -> dict[str, Any]:
    """Time whole requests to pipelines; returns (and writes to `options.out`) the record.

    Raises VerifyError when nothing can run: no device, no engine, an unknown name or case, a broken manifest.
    """
    say = say or (lambda _text: None)
    need_card(options)
    manifest = read_manifest(options.generated)
    ports = [_pipeline(find(manifest, name.removeprefix("diffusers."))[0], name) for name in names]
    requests = [(port, request_of(port, options)) for port in ports]
    sides = [SIDES[s] for s in options.sides if s not in WITHOUT]
    record = Record(options.out, head_of(options))
    budget = Budget(options.budget, options.step_seconds)
    subjects = dict.fromkeys([DIFFUSERS, *(s.subject for s in sides)])  # Diffusers' process writes the checkpoint, too
    programs = {s: DIFFUSERS if s == DIFFUSERS else "engine" for s in subjects}
    with Crew(options, [(subject, program, 0) for subject, program in programs.items()]) as crew:
        say(f"starting {len(crew.workers)} processes")
        greetings = crew.greet(min(300.0, budget.left()))
        if problem := device_problem(greetings[DIFFUSERS], options.device):
            raise VerifyError(problem)
        record.data["device"] = greetings[DIFFUSERS]
        for subject in [s for s in subjects if greetings[s].get("dead")]:
            record.problem(subject, f"did not start: {greetings[subject]['problem']}")
        alive = [s for s in sides if not greetings[s.subject].get("dead")]
        for port, request in requests:
            if budget.spent():
                record.problem(request.pipeline, "skipped: the time budget is spent")
                continue
            say(f"{request.pipeline}, {request.size}")
            Whole(crew, record, port, request, options, budget, say).measure(alive)
            record.write()
    record.write()
    return record.data


def _pipeline(port: Port | None, name: str) -> Port:
    if port is None or port.cls is None:
        raise VerifyError(f"{name} is no pipeline with a port", "whole requests go to pipelines")
    return port


def request_of(port: Port, options: Options) -> Request:
    if options.tiny:
        return tiny_request(port.source_class, only=options.cases, most=options.most_cases)
    denoisers = tuple(d.component for d in port.denoisers)
    return load_request(port.source_class, denoisers, depth=options.depth, only=options.cases, most=options.most_cases)


class Whole:
    """One pipeline on all sides. Sides of one subject share what it loaded: eager first, then compiled, then compiled anew
    for each shape."""

    def __init__(
        self, crew: Crew, record: Record, port: Port, request: Request, options: Options, budget: Budget, say: Say
    ) -> None:
        self.crew, self.record, self.port, self.request = crew, record, port, request
        self.options, self.budget, self.say = options, budget, say
        self.name = request.pipeline
        self.folder = crew.folder / f"{self.name}-requests"
        self.folder.mkdir(exist_ok=True)
        self.row = record.request(
            self.name,
            {"size": request.size, "full": request.full, "depth": {k: list(v) for k, v in request.depth.items()},
             "config": {n: dict(c) for n, c in request.components.items()},
             "cases": {c.name: {**c.kwargs, "prompts": len(c.seeds)} for c in request.cases}},
        )  # fmt: skip

    def measure(self, sides: Sequence[Side]) -> None:
        """All subjects at once where they fit on the card, otherwise one after the other."""
        if not any(row["arch"] == self.port.arch for row in hand_ports().values()):
            for side in [s for s in sides if s.subject == "hand"]:
                self._fail((side,), "there is no such port of this pipeline")
            sides = [s for s in sides if s.subject != "hand"]
        subjects = list(dict.fromkeys(s.subject for s in sides))
        skeleton = {"job": "skeleton", "pipeline": self.name, "checkpoint": str(self._checkpoint),
                    "components": {n: dict(c) for n, c in self.request.components.items()}}  # fmt: skip
        if self._call(DIFFUSERS, skeleton, ()) is None:
            return
        loaded = {s for s in subjects[:1] if self._load(s, sides)}
        together = not self.options.alone and self._fits(sides, len(subjects))
        self.row["together"] = together
        for group in [subjects] if together else [[s] for s in subjects]:
            ready = [s for s in group if s in loaded or self._load(s, sides)]
            for mode in MODES:
                self._stage([s for s in sides if s.subject in ready and (s.compiled, s.static, s.graphs) == mode])
            for subject in ready:
                self._call(subject, {"job": "release"}, ())
            self._agree()

    def _stage(self, sides: list[Side]) -> None:
        """Sides of one mode: a first request each, then rounds, every second one in reverse order."""
        ready = [s for s in sides if self._prepare(s)]
        for index in range(self.options.rounds):
            for side in ready if index % 2 == 0 else reversed(ready):
                for case in self.request.cases:
                    answer = self._call(side.subject, self._request(case.name, case.call), (side,))
                    if answer is not None:
                        found = self.record.request_side(self.name, side.name)
                        found["rounds"].setdefault(case.name, []).append(answer["figures"])
            self.record.write()

    def _load(self, subject: str, sides: Sequence[Side]) -> bool:
        """Build a subject's pipeline; what it says of itself goes to all of its sides."""
        own = tuple(s for s in sides if s.subject == subject)
        denoisers = [d.component for d in self.port.denoisers]
        job: dict[str, Any] = {
            "job": "load",
            "pipeline": self.name,
            "checkpoint": str(self._checkpoint),
            "denoisers": denoisers,
        }
        if subject != DIFFUSERS:
            job |= {"arch": self.port.arch, "rank": 0, "world": 1, "port": free_port(), "dtype": "bfloat16",
                    "max_num_seqs": max(len(c.seeds) for c in self.request.cases)}  # fmt: skip
        if subject == "port":
            job["generated"] = str(self.options.generated.resolve())
        self.say(f"  {subject}: load")
        answer = self._call(subject, job, own)
        if answer is None:
            return False
        facts = {k: v for k, v in answer.items() if k not in ("ok", "seconds")}
        for side in own:
            self.record.request_side(self.name, side.name)["facts"] |= facts
        if subject != DIFFUSERS and (why := flash_problem(answer, self.record.data["device"])):
            self.record.problem(f"{self.name} {subject}", why)
        return True

    def _prepare(self, side: Side) -> bool:
        """Compile where the side is compiled, and serve every case once. False when the side can't go on."""
        self.say(f"  {side.name}")
        if (
            side.compiled
            and self._call(side.subject, {"job": "compile", "compile_options": self._options(side)}, (side,)) is None
        ):
            return False
        found = self.record.request_side(self.name, side.name)
        for case in self.request.cases:
            out = self.folder / f"{side.name}@{case.name}.pt"
            answer = self._call(side.subject, self._request(case.name, case.call) | {"out": str(out)}, (side,))
            if answer is not None:
                found["runs"][case.name] = {k: answer[k] for k in ("first_seconds", "finite", "shapes")}
                found["compiled"][case.name] = answer["compiled"]
                found["facts"] |= answer["facts"]
        self.record.write()
        return bool(found["runs"])

    def _options(self, side: Side) -> dict[str, Any]:
        options: dict[str, Any] = {"dynamic": not side.static} | (
            {"graphs": side.graphs} if side.subject == "port" else {}
        )
        if not self.record.data["device"].get("cuda"):
            return options | {"backend": "eager"}
        return options | ({"backends": list(BACKENDS)} if side.subject == DIFFUSERS else {})

    def _request(self, case: str, call: dict[str, Any]) -> dict[str, Any]:
        return {"job": "request", "case": case, "call": call}

    def _fits(self, sides: Sequence[Side], subjects: int) -> bool:
        """Whether all subjects fit on the card at once, judged by the parameters of the first."""
        device = self.record.data["device"]
        if not device.get("cuda"):
            return True
        facts = self.record.request_side(self.name, sides[0].name)["facts"] if sides else {}
        if "parameters" not in facts:
            return False
        return subjects * (2 * facts["parameters"] / GIB + WORK_GIB) < MEMORY_SHARE * device["memory_gib"]

    def _agree(self) -> None:
        """Relative L2 distances between all sides, of latents and of what was decoded."""
        from porter.bench.whole.agreement import agreement

        self.row["agreement"] = agreement(self.folder, [c.name for c in self.request.cases])
        self.record.write()

    def _call(self, subject: str, job: dict[str, Any], sides: Sequence[Side]) -> dict[str, Any] | None:
        """One job of one process; a failure becomes one message in the record and the others go on."""
        what = f"{job['job']}{' of ' + job['case'] if 'case' in job else ''}"
        if job["job"] not in ("load", "skeleton") and not self.crew.alive(subject):
            return None  # it died, which was said then; the next load starts it again
        if self.budget.spent() and job["job"] != "release":
            self._fail(sides, f"{what} skipped: the time budget is spent")
            return None
        try:
            return self.crew.workers[subject].call(job, self.budget.timeout())
        except (JobError, VerifyError) as error:
            message = f"{what}: {explained(error)}"
            self._fail(sides, message)
            self.record.problem(f"{self.name} {sides[0].name if len(sides) == 1 else subject}", message)
            self.say(f"  {subject}: {message}")
            if isinstance(error, JobError) and poisoned(error):
                self.crew.workers[subject].kill()
            return None

    def _fail(self, sides: Sequence[Side], message: str) -> None:
        for side in sides:
            self.record.request_side(self.name, side.name)["failures"].append(message)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"
