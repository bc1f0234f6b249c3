"""Jobs on a whole pipeline, run inside an engine worker through the engine's own runner and schedulers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pickle
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from porter.verify import engine_session
from porter.verify.baseline import GLOBAL_SEED
from porter.verify.engine_requests import requests_of
from porter.verify.manifest import Port, read_manifest
from porter.verify.ports import register
from porter.verify.reuse_by_hand import counted, reusing
from porter.verify.stand_ins import provide_noted


class Stop(Exception):
    """Ends a run early, after the wanted number of scheduler steps."""


def _register(generated: str, arch: str) -> Port:
    """Make the port of `arch` in `generated` the engine's class for it, in this process."""
    port = next(p for p in read_manifest(generated).ports if p.arch == arch)
    register(generated, port)
    return port


@contextlib.contextmanager
def loaded(job: Mapping[str, Any]) -> Iterator[tuple[engine_session.Session, Any]]:
    """A session and a runner that loaded the checkpoint with the port of `generated`, as the engine's worker does; without
    `generated`, with the engine's own pipeline."""
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

    if job.get("generated"):
        _register(job["generated"], job["arch"])
    provide_noted(job["checkpoint"])
    with engine_session.session(
        job["arch"], rank=job["rank"], world=job["world"], port=job["port"], model=job["checkpoint"],
        parallel=job.get("parallel"), step_execution=bool(job.get("step")), max_num_seqs=job.get("max_num_seqs", 1),
        dtype=getattr(torch, job.get("dtype", "float32")), **job.get("engine", {}),
    ) as s:  # fmt: skip
        from vllm.config import set_current_vllm_config

        if s.od_config.cache_backend == "cache_dit":
            _forget_cached()
        with s.forward_context(), set_current_vllm_config(s.vllm_config):
            runner = DiffusionModelRunner(s.vllm_config, s.od_config, s.device)
            runner.load_model()
        yield s, runner


def _forget_cached() -> None:
    """Cache-DiT marks a class that all denoisers share which come without a pipeline. An engine's worker has one denoiser; here
    the next one would count as cached already."""
    from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline  # type: ignore[import-untyped]

    if "_is_cached" in vars(FakeDiffusionPipeline):
        delattr(FakeDiffusionPipeline, "_is_cached")


def named_tensors(module: Any, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    """Tensors of a call by parameter name; those in a list as `name[0]`, `name[1]`, ..."""
    found: dict[str, torch.Tensor] = {}
    for name, value in (dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs).items():
        several = isinstance(value, (list, tuple))
        for index, one in enumerate(value if several else [value]):
            if torch.is_tensor(one):
                found[f"{name}[{index}]" if several else name] = one
    return found


@contextlib.contextmanager
def recorded(pipe: Any, denoisers: tuple[str, ...], record: dict[str, Any], stop_after: int | None) -> Iterator[None]:
    """Record scheduler steps and denoiser calls of `pipe` while a call runs (copies of the scheduler included)."""
    steps_of = type(pipe.scheduler)
    original = steps_of.step

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", result)
        record["steps"].append(sample.detach().clone())
        if record["timesteps"] is None:
            record["timesteps"] = self.timesteps.detach().clone()
        if stop_after is not None and len(record["steps"]) >= stop_after:
            raise Stop
        return result

    def before(module: Any, args: Any, kwargs: Any) -> None:
        record["calls"] += 1
        if record["first_call"] is None:
            given = named_tensors(module, args, kwargs)
            record["first_call"] = {k: v.detach().clone() for k, v in given.items() if v.numel() < 10**7}
            timesteps: Any = getattr(pipe.scheduler, "timesteps", None)
            if torch.is_tensor(timesteps):
                record["timesteps"] = timesteps.detach().clone()
        if stop_after == 0:
            raise Stop

    modules = [getattr(pipe, name, None) for name in denoisers]
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules if m is not None]
    steps_of.step = step
    try:
        yield
    finally:
        steps_of.step = original
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def seeded_encoding(pipe: Any) -> Iterator[None]:
    """Several requests are encoded before they run; each starts from the global seed, as alone."""
    prepare = pipe.prepare_generation

    @functools.wraps(prepare)
    def prepare_generation(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(GLOBAL_SEED)
        return prepare(*args, **kwargs)

    pipe.prepare_generation = prepare_generation
    try:
        yield
    finally:
        del pipe.prepare_generation


def tensor_of(output: Any) -> torch.Tensor | None:
    """The generated tensor of a DiffusionOutput; raises what the engine reports as an error."""
    if getattr(output, "error", None):
        raise RuntimeError(output.error)
    value = getattr(output, "output", None)
    if value is None and getattr(output, "media", None) is not None:
        value = output.media.video.tensor
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, tuple):  # several values: sound beside a video is looked at by `others_of`
        value = value[0]
    while isinstance(value, list) and value:
        value = torch.cat(value) if all(torch.is_tensor(v) for v in value) else value[0]
    return value if torch.is_tensor(value) else None


def others_of(results: list[Any]) -> list[torch.Tensor]:
    """What one request returns beside its first value: sound that belongs to a video."""
    value = getattr(results[0], "output", None) if len(results) == 1 else None
    return [v for v in value[1:] if torch.is_tensor(v)] if isinstance(value, tuple) else []


def request_mode(runner: Any, requests: list[Any], batched: bool) -> list[Any]:
    """Outputs, one per request: one batch where wanted and supported, otherwise one after the other."""
    from vllm_omni.diffusion.sched.interface import CachedRequestData, DiffusionSchedulerOutput, NewRequestData

    if batched and getattr(runner.pipeline, "supports_request_batch", False):
        wave = DiffusionSchedulerOutput(
            step_id=0,
            scheduled_new_reqs=[NewRequestData(request_id=r.request_id, req=r) for r in requests],
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            finished_req_ids=set(), num_running_reqs=len(requests), num_waiting_reqs=0,
        )  # fmt: skip
        result = runner.execute_model_batch(wave, runner.od_config)
        return [result.get_request_output(r.request_id).result for r in requests]
    outputs = []
    for request in requests:
        torch.manual_seed(GLOBAL_SEED)
        result = runner.execute_model(request)
        outputs.append(result[0] if isinstance(result, list) else result)
    return outputs


def step_mode(runner: Any, requests: list[Any]) -> list[Any]:
    """Outputs, one per request, through the engine's own step scheduler and `execute_stepwise`."""
    from vllm_omni.diffusion.sched.step_scheduler import StepScheduler

    scheduler = StepScheduler()
    scheduler.initialize(runner.od_config)
    for request in requests:
        if request.sampling_params.num_inference_steps is None and request.sampling_params.sigmas is None:
            raise ValueError("the engine's step scheduler needs num_inference_steps")
        scheduler.add_request(request)
    outputs: dict[str, Any] = {}
    for _ in range(10_000):
        if not scheduler.has_requests():
            break
        wave = scheduler.schedule()
        result = runner.execute_stepwise(wave)
        for one in result.runner_outputs:
            if one.result is not None:
                outputs[one.request_id] = one.result
        for finished in scheduler.update_from_output(wave, result):
            scheduler.pop_request_state(finished)
    return [outputs[r.request_id] for r in requests]


def prepare(od_config: Any, requests: list[Any]) -> list[str]:
    """Pre-process requests as the engine process does, before they go to a worker; names of what was prepared.

    Prompts take the way through pickle, as between the engine's processes.
    """
    from vllm_omni.diffusion.registry import get_diffusion_pre_process_func

    function = get_diffusion_pre_process_func(od_config)
    names: set[str] = set()
    for index, request in enumerate(requests):
        if function is not None:
            requests[index] = request = function(request)
            request.prompt = pickle.loads(pickle.dumps(request.prompt))
            names |= (request.prompt.get("additional_information") or {}).get("prepared_media", {}).keys()
    return sorted(names)


@contextlib.contextmanager
def blocks_of(
    job: Mapping[str, Any], models: list[torch.nn.Module], record: Mapping[str, Any]
) -> Iterator[dict[str, int]]:
    """How often blocks compute meanwhile, if the job wants them `counted`. With `reuse_by_hand` they reuse, after so many
    steps, what they computed before. Other jobs run the blocks as they are."""
    with contextlib.ExitStack() as stack:
        counts = stack.enter_context(counted(models)) if job.get("counted") else {}
        if "reuse_by_hand" in job:
            stack.enter_context(reusing(models, job["reuse_by_hand"], lambda: len(record["steps"])))
        yield counts


def one_call(
    s: engine_session.Session,
    runner: Any,
    port: Port,
    call: Mapping[str, Any],
    mode: str,
    batched: bool,
    record: dict[str, Any],
) -> dict[str, Any]:
    """What one call did goes to `record`: steps, calls, first_call, timesteps, output, error, reach, prepared."""
    record |= {
        "steps": [],
        "calls": 0,
        "first_call": None,
        "timesteps": None,
        "reach": {},
        "others": [],
        "each": [],
        "prepared": [],
    }
    error, outputs, start = None, [], time.perf_counter()
    denoisers = tuple(d.component for d in port.denoisers)
    try:
        requests, reach = requests_of(call)
        record["reach"] = reach
        if not call.get("unprepared"):
            record["prepared"] = prepare(s.od_config, requests)
        torch.manual_seed(GLOBAL_SEED)
        with recorded(runner.pipeline, denoisers, record, call.get("stop_after")), seeded_encoding(runner.pipeline):
            results = step_mode(runner, requests) if mode == "step" else request_mode(runner, requests, batched)
        outputs = [tensor_of(r) for r in results]
        record["others"] = others_of(results)
        record["each"] = [[t for t in (tensor_of(r), *others_of([r])) if t is not None] for r in results]
    except Stop:
        pass
    except Exception as problem:  # noqa: BLE001 - what the port raises is a result
        if call.get("stop_after") is None or "Stop" not in repr(problem):
            error = _error(problem)
    runner.state_cache.clear()  # a call that raised leaves its requests there, and the next one has the same ids
    tensors = [o for o in outputs if o is not None]
    alike = len(tensors) == len(outputs) and len({t.shape[1:] for t in tensors}) == 1
    record["output"] = torch.cat(tensors) if alike else None
    record["requests"] = len(outputs)
    return record | {"error": error, "seconds": time.perf_counter() - start}


def _error(problem: BaseException) -> dict[str, str]:
    cause = _root(problem)
    return {"type": type(cause).__name__, "message": str(cause)[:300], "trace": traceback.format_exc()[-3000:]}


def _root(problem: BaseException) -> BaseException:
    """The exception that the port itself raised."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return problem


def job_pipeline(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run calls through the engine; write what happened in each to `out`."""
    with loaded(job) as (s, runner):
        port = next(p for p in read_manifest(job["generated"]).ports if p.arch == job["arch"])
        pipe = runner.pipeline
        facts = {
            "supports_request_batch": bool(getattr(pipe, "supports_request_batch", False)),
            "supports_step_execution": runner._supports_step_mode(),
        }
        mode = job.get("mode", "request")
        models = [m for d in port.denoisers if (m := getattr(pipe, d.component, None)) is not None]
        records = []
        for call in job["calls"]:
            done: dict[str, Any] = {"steps": []}
            with blocks_of(job, models, done) as counts:
                found = one_call(s, runner, port, call, mode, job.get("batched", True), done)
            records.append(found | {"blocks": counts} if job.get("counted") else found)
    torch.save(records, job["out"])
    return facts


def job_checkpoint(job: Mapping[str, Any]) -> dict[str, Any]:
    """Build a tiny checkpoint in `folder`."""
    from porter.verify.checkpoint import build_checkpoint

    path = build_checkpoint(job["class"], job["spec"], job["folder"])
    size = sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
    return {"path": os.fspath(path), "bytes": size}


JOBS = {"pipeline": job_pipeline, "checkpoint": job_checkpoint}
