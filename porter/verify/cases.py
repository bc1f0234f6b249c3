"""Tiny configurations and inputs of a denoiser, as data: tests/corpus/configs/<DenoiserClass>.yaml.

    denoiser: FooTransformer2DModel
    base: {num_layers: 2, ...}                        # constructor arguments
    inputs: {hidden_states: {randn: [2, 24, 16]}, ...}
    cases:
      - {name: plain}
      - {name: no-norm, config: {qk_norm: null}, inputs: {guidance: {values: [3.5, 1.0]}, txt_ids: absent}}

An input is one of: randn / zeros / ones {shape}, randint {shape, high}, values (nested numbers), mask (valid lengths,
with width), grid ([rows, columns] -> ids of 3 axes), range ([first, end] -> whole numbers), tuples (nested lists whose
innermost lists become tuples), literal (as it is), map (names to inputs), list (inputs), or `absent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from porter.resources import CORPUS
from porter.verify.outcome import VerifyError

if TYPE_CHECKING:
    import torch

KINDS: dict[str, frozenset[str]] = {
    "randn": frozenset({"scale", "dtype"}),
    "zeros": frozenset({"dtype"}),
    "ones": frozenset({"dtype"}),
    "randint": frozenset({"low", "high", "dtype"}),
    "values": frozenset({"dtype"}),
    "mask": frozenset({"width", "dtype"}),
    "grid": frozenset({"axes"}),
    "range": frozenset(),
    "tuples": frozenset(),
    "literal": frozenset(),
    "map": frozenset(),
    "list": frozenset(),
}
DTYPES = ("float32", "int64", "int32", "bool")


@dataclass(frozen=True, slots=True)
class ModuleCase:
    """One tiny configuration of a denoiser and the description of its inputs."""

    name: str
    denoiser: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    seed: int = 1
    tp: bool = True
    sp: bool = True
    rungs: tuple[str, ...] = field(default=())


def corpus_root() -> Path:
    return CORPUS


def load_cases(denoiser: str, folder: Path | str | None = None) -> tuple[ModuleCase, ...]:
    """All cases of a denoiser class; empty where no file exists. The whole file is checked first."""
    path = Path(folder or corpus_root() / "configs") / f"{denoiser}.yaml"
    if not path.is_file():
        return ()
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise VerifyError(f"{path}: not valid YAML: {error}") from None
    return parse_cases(data, str(path), denoiser)


def parse_cases(data: Any, where: str, denoiser: str) -> tuple[ModuleCase, ...]:
    """Check the content of a case file and return its cases. Raises VerifyError naming the key."""
    _keys(data, {"denoiser", "base", "inputs", "cases"}, {"denoiser", "base", "inputs", "cases"}, where)
    if data["denoiser"] != denoiser:
        raise VerifyError(f"{where}: denoiser is {data['denoiser']}, the file's name says {denoiser}")
    for name, spec in data["inputs"].items():
        check_input(spec, f"{where}: inputs.{name}")
    cases, names = [], set()
    for row in data["cases"]:
        _keys(row, {"name"}, {"name", "config", "inputs", "seed", "tp", "sp"}, where)
        place = f"{where}: case {row['name']}"
        if row["name"] in names:
            raise VerifyError(f"{place}: the name is used twice")
        names.add(row["name"])
        inputs = dict(data["inputs"])
        for name, spec in row.get("inputs", {}).items():
            check_input(spec, f"{place}: inputs.{name}")
            inputs[name] = spec
        inputs = {k: v for k, v in inputs.items() if v != "absent"}
        config = {**data["base"], **row.get("config", {})}
        cases.append(
            ModuleCase(
                row["name"], denoiser, config, inputs, row.get("seed", 1), row.get("tp", True), row.get("sp", True)
            )
        )
    return tuple(cases)


def _keys(row: Any, needed: set[str], allowed: set[str], where: str) -> None:
    if not isinstance(row, dict):
        raise VerifyError(f"{where}: a mapping is expected, not {type(row).__name__}")
    if missing := needed - set(row):
        raise VerifyError(f"{where}: {', '.join(sorted(missing))} missing")
    if unknown := set(row) - allowed:
        raise VerifyError(f"{where}: unknown key {', '.join(sorted(unknown))}", f"known: {', '.join(sorted(allowed))}")


def check_input(spec: Any, where: str) -> None:
    """Raise VerifyError unless `spec` describes an input."""
    if spec == "absent":
        return
    kinds = set(spec) & set(KINDS) if isinstance(spec, dict) else set()
    if len(kinds) != 1:
        raise VerifyError(f"{where}: one of {', '.join(KINDS)} or absent is expected, not {spec!r}")
    kind = kinds.pop()
    if unknown := set(spec) - {kind} - KINDS[kind]:
        raise VerifyError(f"{where}: {kind} takes no {', '.join(sorted(unknown))}")
    if spec.get("dtype", "float32") not in DTYPES:
        raise VerifyError(f"{where}: dtype is one of {', '.join(DTYPES)}")
    if kind in ("randn", "zeros", "ones", "randint") and not _is_shape(spec[kind]):
        raise VerifyError(f"{where}: {kind} takes a shape, a list of whole numbers")
    if kind == "range" and not (_is_shape(spec["range"]) and len(spec["range"]) == 2):
        raise VerifyError(f"{where}: range takes the first number and the end")
    if kind == "mask" and max(spec["mask"]) > spec.get("width", max(spec["mask"])):
        raise VerifyError(f"{where}: a length is greater than the width")
    if kind == "map":
        for name, inner in spec["map"].items():
            check_input(inner, f"{where}.{name}")
    if kind == "list":
        for index, inner in enumerate(spec["list"]):
            check_input(inner, f"{where}[{index}]")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value)


def build_inputs(specs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Tensors and values for a forward call, drawn in the order of names from one generator of `seed`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: build_input(specs[name], generator) for name in sorted(specs)}


def build_input(spec: Mapping[str, Any], generator: torch.Generator) -> Any:
    """One input from its (already checked) description."""
    import torch

    kind = next(k for k in spec if k in KINDS)
    value = spec[kind]
    dtype = getattr(torch, spec["dtype"]) if "dtype" in spec else None
    match kind:
        case "randn":
            return torch.randn(value, generator=generator) * spec.get("scale", 1.0)
        case "zeros" | "ones":
            return getattr(torch, kind)(value, dtype=dtype or torch.float32)
        case "randint":
            return torch.randint(spec.get("low", 0), spec["high"], value, generator=generator, dtype=dtype)
        case "values":
            return torch.tensor(value, dtype=dtype)
        case "mask":
            width = spec.get("width", max(value))
            mask = torch.arange(width)[None] < torch.tensor(value)[:, None]
            return mask.to(dtype or torch.bool)
        case "grid":
            rows, columns = value
            ids = torch.zeros(rows, columns, spec.get("axes", 3))
            ids[..., -2] = torch.arange(rows)[:, None]
            ids[..., -1] = torch.arange(columns)[None]
            return ids.reshape(rows * columns, -1)
        case "range":
            return torch.arange(*value)
        case "tuples":
            return _tuples(value)
        case "map":
            return {name: build_input(inner, generator) for name, inner in value.items()}
        case "list":
            return [build_input(inner, generator) for inner in value]
        case _:
            return value


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return [_tuples(v) for v in value] if any(isinstance(v, list) for v in value) else tuple(value)
    return value
