"""What is asked: requests of real size to a pipeline, as data: benchmarks/requests/<Pipeline>.yaml.

pipeline: FooPipeline
about: where the numbers below come from          # for people
components:                                       # every model and scheduler: what the published configuration has
  transformer: {num_layers: 24}                   #   beyond the constructor's defaults, of classes of Diffusers
  text_encoder: {hidden_size: 768}                #   beside the tokens of the local tokenizer, of classes of transformers
depth: {num_layers: 24}                           # as in a workload: what counts the layers of the denoisers
call: {prompt: ..., height: 1024, num_inference_steps: 8}      # what every case has
cases: [{name: 1024x1024, call: {...}, prompts: 2}]            # `prompts`: so many prompts of one call
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from porter.bench.workload import cut_depth, is_full, size_of
from porter.resources import BENCHMARKS
from porter.verify.outcome import VerifyError
from porter.verify.pipeline_spec import PER_PROMPT, SEED, load_spec

KEYS = frozenset({"pipeline", "about", "components", "depth", "call", "cases"})
TINY = (("tiny", 1), ("tiny-two", 2))


@dataclass(frozen=True, slots=True)
class RequestCase:
    """One call: keyword arguments of Diffusers, and one seed for each prompt."""

    name: str
    kwargs: Mapping[str, Any]
    seeds: tuple[int, ...]

    @property
    def call(self) -> dict[str, Any]:
        """As `porter.verify.engine_requests.requests_of` takes it: with several seeds, texts are lists."""
        if len(self.seeds) == 1:
            return {"kwargs": dict(self.kwargs), "seed": self.seeds[0]}
        texts = {k: [v] * len(self.seeds) for k, v in self.kwargs.items() if PER_PROMPT.fullmatch(k)}
        return {"kwargs": {**self.kwargs, **texts}, "seed": list(self.seeds)}


@dataclass(frozen=True, slots=True)
class Request:
    """Cases of one pipeline. `depth` is {layer count parameter: (layers run, layers of the whole)}; empty: tiny."""

    pipeline: str
    cases: tuple[RequestCase, ...]
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    depth: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return is_full(self.depth)

    @property
    def size(self) -> str:
        """Layers of the denoiser; all other components are whole."""
        return size_of(self.depth)


def load_request(
    pipeline: str,
    denoisers: tuple[str, ...],
    *,
    depth: int | None = None,
    only: tuple[str, ...] = (),
    most: int | None = None,
    folder: Path | None = None,
) -> Request:
    """The requests of a pipeline whose denoisers are the components `denoisers`, these cut to `depth` layers.

    Raises VerifyError: no such file, a broken file, a case that does not exist.
    """
    path = (folder or BENCHMARKS / "requests") / f"{pipeline}.yaml"
    if not path.is_file():
        raise VerifyError(f"there are no requests of {pipeline}", f"write {path.name} beside {path.parent}/*.yaml")
    data = _read(path)
    cut = cut_depth(data["depth"], depth)
    components = {n: dict(numbers or {}) for n, numbers in data["components"].items()}
    for name in set(denoisers) & set(components):  # a second denoiser may be left out
        components[name] |= {k: run for k, (run, whole) in cut.items() if run != whole}
    cases = [
        _case(row["name"], {**data.get("call", {}), **row.get("call", {})}, row.get("prompts", 1))
        for row in data["cases"]
    ]
    return Request(pipeline, _chosen(cases, only, most, str(path)), components, cut)


def tiny_request(pipeline: str, *, only: tuple[str, ...] = (), most: int | None = None) -> Request:
    """One and two prompts for the tiny checkpoint of the corpus, guided: a dry run for a machine without an accelerator."""
    spec = load_spec(pipeline)
    if spec is None:
        raise VerifyError(f"there is no tests/corpus/pipelines/{pipeline}.yaml")
    call = {**spec.get("call"), **spec.get("cfg", {})}
    if spec.get("negative") is not None and spec.get("cfg"):
        call["negative_prompt"] = spec.get("negative")
    return Request(pipeline, _chosen([_case(n, call, count) for n, count in TINY], only, most, "the tiny request"))


def known_requests() -> tuple[str, ...]:
    """Pipelines that have requests of real size."""
    return tuple(sorted(p.stem for p in (BENCHMARKS / "requests").glob("*.yaml")))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise VerifyError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict) or set(data) - KEYS or KEYS - {"call", "about"} - set(data):
        raise VerifyError(f"{path}: the keys are {', '.join(sorted(KEYS))}")
    if data["pipeline"] != path.stem:
        raise VerifyError(f"{path}: pipeline is {data['pipeline']}, the file's name says {path.stem}")
    for key, kind in (("components", dict), ("depth", dict), ("cases", list)):
        if not isinstance(data[key], kind) or not data[key]:
            raise VerifyError(f"{path}: {key} is empty or no {'list' if kind is list else 'mapping'}")
    for row in data["cases"]:
        if not isinstance(row, dict) or not {"name"} <= set(row) <= {"name", "call", "prompts"}:
            raise VerifyError(f"{path}: a case has a name, perhaps call and prompts")
    return data


def _case(name: str, call: Mapping[str, Any], prompts: int) -> RequestCase:
    return RequestCase(name, dict(call), tuple(range(SEED, SEED + prompts)))


def _chosen(cases: list[RequestCase], only: tuple[str, ...], most: int | None, where: str) -> tuple[RequestCase, ...]:
    if missing := set(only) - {c.name for c in cases}:
        raise VerifyError(f"{where}: no case called {', '.join(sorted(missing))}", ", ".join(c.name for c in cases))
    return tuple(c for c in cases if not only or c.name in only)[:most]
