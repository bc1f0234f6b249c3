"""Jobs on a denoiser alone, run inside an engine worker."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from porter.verify import engine_session, probes
from porter.verify.ports import load_class, module_file


@contextlib.contextmanager
def _session(job: Mapping[str, Any]) -> Iterator[engine_session.Session]:
    with engine_session.session(
        job["arch"],
        rank=job["rank"],
        world=job["world"],
        port=job["port"],
        config=job["config"],
        parallel=job.get("parallel"),
        dtype=getattr(torch, job.get("dtype", "float32")),
    ) as s:
        yield s


def _class(job: Mapping[str, Any]) -> type:
    return load_class(job["generated"], job["folder"], job["module"], job["class"])


def job_module(job: Mapping[str, Any]) -> dict[str, Any]:
    """Build, load the reference's weights, call; writes {output, records} to `out` and accounts for the weights."""
    reference = torch.load(job["reference"], weights_only=True)
    inputs = torch.load(job["inputs"], weights_only=True)
    records: list[dict[str, Any]] = []
    with _session(job) as s:
        model = s.build(_class(job), job["config"])
        sharded: list[int] = []
        sp = bool(job.get("sp"))
        if sp:
            if not getattr(model, "_sp_plan", None):
                return {"missing": [], "elements": 0, "sequence_lengths": [], "no_plan": True}
            _apply_sequence_parallel(s, model)
            _watch_sequence(model, sharded)
        account = s.load(model, reference["weights"])
        answer: dict[str, Any] = {
            "offered": account.offered,
            "missing": account.missing[:20],
            "not_parameters": account.not_parameters[:20],
            "parameters": account.parameters,
            "elements": account.elements,
            "block_elements": block_elements(model),
        }
        if account.missing:
            torch.save({"output": None, "records": []}, job["out"])
            return answer
        if job.get("probe"):
            root = module_file(job["generated"], job["folder"], job["module"]).parent
            probes.attach(model, root, records)
        output = s.call(model, inputs)
        answer["sequence_lengths"] = list(sharded)
        if sp:
            answer["open"] = _left_open(s, model, inputs)
    torch.save({"output": output, "records": records}, job["out"])
    return answer


def _left_open(s: engine_session.Session, model: torch.nn.Module, inputs: Mapping[str, Any]) -> int:
    """Regions of divided tokens that are still open after a call, by the count that the engine keeps for plans: attention
    outside of the region would be divided, too, and every further call would compile the blocks again."""
    from vllm_omni.diffusion.forward_context import get_forward_context

    with torch.no_grad(), s.forward_context():
        get_forward_context().sp_plan_hooks_applied = True
        model(**inputs)
        return get_forward_context()._sp_shard_depth


def block_elements(model: torch.nn.Module) -> dict[str, int]:
    """Elements of every parameter inside the repeated blocks (the model's `_repeated_blocks`), summed over the blocks:
    numbers in names are written `*`. Empty for a model that names no blocks."""
    repeated = set(getattr(model, "_repeated_blocks", ()))
    prefixes = tuple(f"{n}." for n, child in model.named_modules() if type(child).__name__ in repeated)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if prefixes and name.startswith(prefixes):
            key = ".".join("*" if part.isdigit() else part for part in name.split("."))
            found[key] = found.get(key, 0) + parameter.numel()
    return found


def job_bf16(job: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser in bfloat16 for each run of the reference; writes [{output, records}] to `out`. The answer names the
    buffers of a checkpoint that have another dtype than Diffusers'."""
    runs = []
    buffers: dict[str, str] = {}
    references = torch.load(job["reference"], weights_only=True)
    for reference, inputs in zip(references, torch.load(job["inputs"], weights_only=True), strict=True):
        records: list[dict[str, Any]] = []
        with _session({**job, "dtype": "bfloat16"}) as s:
            model = s.build(_class(job), job["config"])
            s.load(model, reference["weights"])
            dtypes = {n: str(b.dtype) for n, b in model.named_buffers()}
            buffers |= {n: dtypes[n] for n, d in reference["buffers"].items() if dtypes.get(n, d) != d}
            if job.get("probe"):
                probes.attach(model, module_file(job["generated"], job["folder"], job["module"]).parent, records)
            runs.append({"output": s.call(model, inputs), "records": records})
    torch.save(runs, job["out"])
    return {"buffers": buffers}


def _apply_sequence_parallel(s: engine_session.Session, model: torch.nn.Module) -> None:
    """The engine's own set-up, which swallows failures: what it did is measured by `_watch_sequence`."""
    from vllm_omni.diffusion.registry import _apply_sequence_parallel_if_enabled

    holder = torch.nn.Module()
    holder.transformer = model
    with s.forward_context():
        _apply_sequence_parallel_if_enabled(holder, s.od_config)


def _watch_sequence(model: torch.nn.Module, seen: list[int]) -> None:
    """Note the number of tokens of the first 3-D tensor that reaches each repeated block, along the axis of the plan."""
    specs = [spec for entry in model._sp_plan.values() if isinstance(entry, dict) for spec in entry.values()]
    axis = next((s.split_dim for s in specs if not isinstance(s, list) and s.expected_dims == 3), 1)

    def hook(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        ordered = [kwargs[k] for k in ("hidden_states",) if k in kwargs] + list(args) + list(kwargs.values())
        for value in ordered:
            if torch.is_tensor(value) and value.dim() == 3:
                seen.append(value.shape[axis])
                return

    for child in model.modules():
        if type(child).__name__ in model._repeated_blocks:
            child.register_forward_pre_hook(hook, with_kwargs=True)


def job_weights(job: Mapping[str, Any]) -> dict[str, Any]:
    """Which Diffusers parameter ends up where, and whether faults in a checkpoint are noticed.

    Each tensor of the reference is filled with its own number; the numbers found in an engine parameter say which
    tensors feed it. Answers {packing: {parameter: [names]}, unplaced, twice, missing, unknown_raises, drops}.
    """
    names = job["names"]  # name -> shape
    order = sorted(names)
    weights = {n: torch.full(names[n], float(i + 1)) for i, n in enumerate(order)}
    with _session(job) as s:
        model = s.build(_class(job), job["config"])
        engine_session.fill(model, float("nan"))
        reported = s.load_only(model, weights)
        placed: dict[str, int] = dict.fromkeys(order, 0)
        packing: dict[str, list[str]] = {}
        foreign: dict[str, int] = {}
        missing: list[str] = []
        for name, parameter in model.named_parameters():
            values, counts = torch.unique(parameter.detach().reshape(-1), return_counts=True)
            sources = []
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if math.isnan(value):
                    missing.append(name)
                elif value == int(value) and 1 <= value <= len(order):
                    placed[order[int(value) - 1]] += count
                    sources.append(order[int(value) - 1])
                else:
                    foreign[name] = foreign.get(name, 0) + count
            packing[name] = sources
        sizes = {n: weights[n].numel() for n in order}
        parameters = {n for n, _ in model.named_parameters()}
        answer = {
            "packed": {n: v for n, v in packing.items() if len(v) > 1},
            "unplaced": [n for n in order if placed[n] < sizes[n]],
            "twice": [n for n in order if placed[n] > sizes[n]],
            "foreign": foreign,
            "missing": sorted(set(missing)),
            "unreported": sorted(parameters - reported),
            "not_parameters": sorted(reported - parameters),
            "elements": sum(p.numel() for p in model.parameters()),
        }
        answer["unknown_raises"] = _raises(s, model, {"porter.no_such_layer.weight": torch.zeros(2, 2)})
        answer["drops"] = _dropped_shards(s, model, weights, answer["packed"])
    return answer


def _raises(s: engine_session.Session, model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> str | None:
    """Class name of what `load_weights` raises for these weights, or None."""
    try:
        s.load_only(model, weights)
    except Exception as problem:  # noqa: BLE001 - whatever a port raises
        return type(problem).__name__
    return None


def _dropped_shards(
    s: engine_session.Session,
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    packed: Mapping[str, list[str]],
) -> dict[str, str]:
    """Leave out one shard of one packed parameter of each kind: how it is noticed (`raised` or `unreported`), or "".

    Kinds are told apart by the last two parts of the parameter's name.
    """
    kinds: dict[str, tuple[str, str]] = {}
    for name, sources in packed.items():
        kinds.setdefault(".".join(name.rsplit(".", 2)[-2:]), (name, sources[-1]))
    noticed: dict[str, str] = {}
    for name, source in kinds.values():
        try:
            reported = s.load_only(model, {n: w for n, w in weights.items() if n != source})
        except Exception:  # noqa: BLE001 - whatever a port raises
            noticed[source] = "raised"
            continue
        noticed[source] = "" if name in reported else "unreported"
    return noticed


JOBS = {"module": job_module, "bf16": job_bf16, "weights": job_weights}
