"""What is run: a denoiser at its real size, as data: benchmarks/workloads/<DenoiserClass>.yaml.

The format is that of tests/corpus/configs (`porter.verify.cases`), with three keys more. `depth`: the constructor parameters
that count layers and how many the whole model has. `multiple`, if layers come in groups of so many. `follows`: lists of
`base` or of the inputs that go with the depth: `entries` have one entry for each layer, `numbers` are numbers of layers.
`base` is what differs from the constructor's defaults, mostly nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from porter.resources import BENCHMARKS
from porter.verify.cases import ModuleCase, load_cases, parse_cases
from porter.verify.outcome import VerifyError

TINY_CASES = 2
FOLLOWS = ("entries", "numbers")


@dataclass(frozen=True, slots=True)
class Workload:
    """Cases of one denoiser. `depth` is {layer count parameter: (layers run, layers of the whole)}; empty: tiny."""

    denoiser: str
    cases: tuple[ModuleCase, ...]
    config: Mapping[str, Any]
    depth: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return is_full(self.depth)

    @property
    def size(self) -> str:
        return size_of(self.depth)


def is_full(depth: Mapping[str, tuple[int, int]]) -> bool:
    """Whether all layers run."""
    return bool(depth) and all(run == whole for run, whole in depth.values())


def size_of(depth: Mapping[str, tuple[int, int]]) -> str:
    """`60 layers`, `10 of 60 layers` or `tiny`."""
    if not depth:
        return "tiny"
    run, whole = (sum(column) for column in zip(*depth.values(), strict=True))
    return f"{whole} layers" if run == whole else f"{run} of {whole} layers"


def load_workload(
    denoiser: str,
    *,
    depth: int | None = None,
    only: tuple[str, ...] = (),
    most: int | None = None,
    folder: Path | None = None,
) -> Workload:
    """The workload of a denoiser class, cut to `depth` layers and to the cases named `only`, or to the first `most`.

    Raises VerifyError: no such file, a broken file, a case that does not exist.
    """
    path = (folder or BENCHMARKS / "workloads") / f"{denoiser}.yaml"
    if not path.is_file():
        raise VerifyError(f"there is no workload of {denoiser}", f"write {path.name} beside {path.parent}/*.yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise VerifyError(f"{path}: not valid YAML: {error}") from None
    layers = data.pop("depth", None) if isinstance(data, dict) else None
    if not isinstance(layers, dict) or not layers or not all(isinstance(n, int) and n > 0 for n in layers.values()):
        raise VerifyError(f"{path}: depth maps the parameters that count layers to their numbers")
    multiple = data.pop("multiple", 1)
    if not isinstance(multiple, int) or multiple < 1:
        raise VerifyError(f"{path}: multiple is a number of layers")
    cut = cut_depth(layers, depth, multiple)
    config = {**data.get("base", {}), **{k: run for k, (run, whole) in cut.items() if run != whole}}
    content = _cut_lists(data | {"base": config}, sum(run for run, _ in cut.values()), str(path))
    cases = _chosen(parse_cases(content, str(path), denoiser), only, str(path))
    return Workload(denoiser, cases[:most], content["base"], cut)


def tiny_workload(denoiser: str, *, only: tuple[str, ...] = (), most: int | None = None) -> Workload:
    """The first cases of the corpus that share one configuration: a dry run for a machine without an accelerator."""
    cases = load_cases(denoiser)
    if not cases:
        raise VerifyError(f"there is no tests/corpus/configs/{denoiser}.yaml")
    same = tuple(c for c in cases if c.config == cases[0].config)[:TINY_CASES]
    return Workload(denoiser, _chosen(same, only, "the tiny workload")[:most], cases[0].config)


def cut_depth(layers: Mapping[str, int], depth: int | None, multiple: int = 1) -> dict[str, tuple[int, int]]:
    """`depth` layers in all, shared out as in the whole model, whole groups of `multiple`, at least one of each kind."""
    whole = sum(layers.values())
    if depth is None or depth >= whole:
        return {k: (n, n) for k, n in layers.items()}
    groups = {k: max(1, math.ceil(round(n * depth / whole) / multiple)) for k, n in layers.items()}
    return {k: (min(n, groups[k] * multiple), n) for k, n in layers.items()}


def _cut_lists(data: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """The content of a file without `follows`: the lists that it names are those of the first `layers` layers."""
    follows = data.pop("follows", {})
    if not isinstance(follows, dict) or not set(follows.values()) <= set(FOLLOWS):
        raise VerifyError(f"{where}: follows maps lists to {' or '.join(FOLLOWS)}")
    for place in (data[key] for key in ("base", "inputs") if key in data):
        for name in set(place) & set(follows):
            place[name] = _cut_list(place[name], follows[name], layers)
    return data


def _cut_list(value: Any, kind: str, layers: int) -> Any:
    if isinstance(value, dict):
        return {"list": _cut_list(value["list"], kind, layers)}
    return value[:layers] if kind == "entries" else [n for n in value if n < layers]


def known_workloads() -> tuple[str, ...]:
    """Denoiser classes that have a workload."""
    return tuple(sorted(p.stem for p in (BENCHMARKS / "workloads").glob("*.yaml")))


def _chosen(cases: tuple[ModuleCase, ...], only: tuple[str, ...], where: str) -> tuple[ModuleCase, ...]:
    if missing := set(only) - {c.name for c in cases}:
        raise VerifyError(f"{where}: no case called {', '.join(sorted(missing))}", ", ".join(c.name for c in cases))
    return tuple(c for c in cases if not only or c.name in only)
