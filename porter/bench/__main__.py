"""`python -m porter.bench`: the command `porter bench` for a machine that has the engine but not porter's own needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from porter.bench.drive import Options
from porter.bench.run import names, run
from porter.bench.sides import SIDES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m porter.bench", description=__doc__)
    p.add_argument("names", nargs="+", metavar="CLASS", help="pipelines or denoisers with a port")
    p.add_argument("--whole", action="store_true", help="whole requests to pipelines: encode, denoise, decode")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--generated", type=Path, default=Path("generated"))
    p.add_argument("--out", type=Path, default=Path("bench.json"), help="the record, written after every step")
    p.add_argument("--sides", default=",".join(SIDES), help="comma-separated")
    p.add_argument("--cases", default="", help="comma-separated (default: all of the workload)")
    p.add_argument("--most-cases", type=int, help="only so many cases of each, in the order of the file")
    p.add_argument("--depth", type=int, help="layers in all (default: the real number)")
    p.add_argument("--tiny", action="store_true", help="the corpus' tiny cases: a dry run")
    p.add_argument("--alone", action="store_true", help="hold one side at a time in memory")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=0, help="length of the walk that shows how errors grow")
    p.add_argument("--budget", type=float, default=3600.0, help="seconds in all")
    p.add_argument("--step-seconds", type=float, default=180.0, help="most seconds of one step of one side")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cards", type=int, choices=(1, 2), default=1, help="2: tensor, sequence and guidance parallel")
    p.add_argument("--modes", default="tp,ulysses,cfg", help="of --cards 2")
    return p


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    options = Options(
        given.device, given.generated, given.out, names(given.sides), names(given.cases), given.most_cases,
        given.depth, given.tiny, given.alone, given.rounds, given.steps, given.budget, given.step_seconds,
        given.threads,
    )  # fmt: skip
    return run(given.names, options, cards=given.cards, modes=names(given.modes), whole=given.whole)


if __name__ == "__main__":
    raise SystemExit(main())
