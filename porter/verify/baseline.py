"""The Diffusers side of every comparison. A program, run by path: it imports nothing that porter wrote or generated.

It reads one JSON job per line on stdin and answers one JSON line each on the original stdout:
{"ok": true, ...} or {"ok": false, "error", "type", "traceback"}. Tensors travel in files written by torch.save.
Jobs: module, signature, pipeline, stop.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
import time
import traceback

_started = time.perf_counter()


# ------------------------------------------------------------------------------------------------ weights
def randomize(module, seed):
    """All weights random, in sorted order of names: no zero or identity initialisation survives."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.copy_(1 + 0.1 * draw if "norm" in name and name.endswith("weight") else 0.2 * draw)
            else:
                parameter.copy_(draw * parameter[0].numel() ** -0.5)
    return module.eval()


def tensors_of(value):
    """All tensors in nested tuples, lists, mappings and model outputs, in order."""
    import torch

    if torch.is_tensor(value):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_of(v)]
    return []


def probe(module, records):
    """Record inputs and outputs of every submodule, in order of completion."""

    def hook(name, _module, args, kwargs, output):
        records.append({"name": name, "inputs": tensors_of(args) + tensors_of(kwargs), "outputs": tensors_of(output)})

    return [
        m.register_forward_hook(functools.partial(hook, n), with_kwargs=True) for n, m in module.named_modules() if n
    ]


def diffusers_class(name):
    """A public class of Diffusers. One that Diffusers hides, as a package is missing, comes from its own file.

    Only for packages with stand-ins: without one, importing the file, or using it, says what is missing.
    """
    import glob
    import importlib

    import diffusers

    cls = getattr(diffusers, name)
    if ".dummy_" not in cls.__module__:
        return cls
    root = os.path.dirname(diffusers.__file__)
    for path in sorted(glob.glob(os.path.join(root, "pipelines", "*", "pipeline_*.py"))):
        with open(path) as stream:
            if f"\nclass {name}(" in stream.read():
                module = os.path.relpath(path, os.path.dirname(root))[:-3].replace(os.sep, ".")
                return getattr(importlib.import_module(module), name)
    return cls


def class_of(job):
    """The class that a job names: of Diffusers, or of `file`, another version of the module `module_of_file`."""
    import importlib.util

    if not job.get("file"):
        return diffusers_class(job["class"])
    spec = importlib.util.spec_from_file_location(f"{job['module_of_file']}_changed", job["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, job["class"])


def job_module(job):
    """Build a denoiser of `class` from `config`, randomise it, write weights and all tensors it returns for `inputs`."""
    import torch

    cls = class_of(job)
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        model = randomize(cls(**job["config"]), job["seed"])
    inputs = torch.load(job["inputs"], weights_only=True) if job.get("inputs") else None
    records: list = []
    output = None
    if inputs is not None:
        handles = probe(model, records) if job.get("probe") else []
        with torch.no_grad():
            output = tensors_of(model(**inputs, return_dict=False))
        for handle in handles:
            handle.remove()
    torch.save(
        {"weights": dict(model.state_dict()), "output": output, "records": records,
         "persistent": sorted(model.state_dict()), "parameters": sorted(n for n, _ in model.named_parameters())},
        job["out"],
    )  # fmt: skip
    return {"parameters": sum(p.numel() for p in model.parameters()), "config": json_config(model.config)}


def job_bf16(job):
    """A denoiser in float32 and in bfloat16, the latter as `from_pretrained` loads it, with the same weights and inputs.

    `inputs` holds one set for each of `seeds`; writes [{weights, buffers, output, half, records, half_records}] to `out`.
    """
    import tempfile

    import diffusers
    import torch

    cls = getattr(diffusers, job["class"])
    with contextlib.redirect_stderr(open(os.devnull, "w")), tempfile.TemporaryDirectory() as folder:
        full = cls(**job["config"]).eval()
        full.save_pretrained(folder)
        half = cls.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True).eval()
    runs = []
    for seed, inputs in zip(job["seeds"], torch.load(job["inputs"], weights_only=True), strict=True):
        randomize(full, seed)
        with torch.no_grad():
            for parameter in full.parameters():
                parameter.copy_(parameter.bfloat16())
        half.load_state_dict(full.state_dict())
        run = {"weights": {n: v.clone() for n, v in full.state_dict().items()}, "records": [], "half_records": []}
        stored = half.state_dict()
        run["buffers"] = {n: str(b.dtype) for n, b in half.named_buffers() if n in stored}
        for name, model, values in (("output", full, widened(inputs)), ("half", half, inputs)):
            records = run["records" if model is full else "half_records"]
            handles = probe(model, records) if job.get("probe") else []
            with torch.no_grad():
                run[name] = tensors_of(model(**values, return_dict=False))
            for handle in handles:
                handle.remove()
        runs.append(run)
    torch.save(runs, job["out"])
    return {}


def widened(value):
    """bfloat16 tensors in nested containers as float32."""
    import torch

    if torch.is_tensor(value):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, dict):
        return {n: widened(v) for n, v in value.items()}
    return type(value)(widened(v) for v in value) if isinstance(value, (list, tuple)) else value


def json_config(config):
    return json.loads(json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_")}, default=str))


# ------------------------------------------------------------------------------------------------ pipelines
GLOBAL_SEED = 20


class Stop(Exception):
    """Ends a run early, after the wanted number of scheduler steps."""


def job_signature(job):
    """Parameters of a pipeline's __call__ with their defaults, and its component classes."""
    provide_stand_ins(job.get("stand_ins") or {})
    cls = diffusers_class(job["class"])
    plain = (int, float, str, bool, type(None), list, tuple)
    parameters = {
        n: (p.default if isinstance(p.default, plain) else None)
        for n, p in inspect.signature(cls.__call__).parameters.items()
        if n != "self" and p.kind is not p.VAR_KEYWORD
    }
    return {"parameters": parameters}


def named_tensors(module, args, kwargs):
    """Tensors of a call by parameter name; those in a list as `name[0]`, `name[1]`, ..."""
    found = {}
    for name, value in (dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs).items():
        several = isinstance(value, (list, tuple))
        for index, one in enumerate(value if several else [value]):
            if hasattr(one, "detach"):
                found[f"{name}[{index}]" if several else name] = one
    return found


class PassThrough:
    """Stands in for a class of a package that is not installed: every method returns its first argument."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda value=None, *args, **kwargs: value


def provide_stand_ins(wanted):
    """Make packages with such classes importable, and known to Diffusers as installed."""
    import importlib.machinery
    import importlib.util
    import types

    from diffusers.utils import import_utils

    for package, classes in wanted.items():
        if package not in sys.modules and importlib.util.find_spec(package) is not None:
            continue  # the package itself is there
        module = types.ModuleType(package)
        module.__spec__ = importlib.machinery.ModuleSpec(package, None)
        for name in classes:
            setattr(module, name, type(name, (PassThrough,), {"__module__": package}))
        sys.modules.setdefault(package, module)
        setattr(import_utils, f"_{package}_available", True)


def noted_stand_ins(checkpoint):
    """What the checkpoint's folder says has to stand in."""
    file = os.path.join(checkpoint, "stand_ins.json")
    if not os.path.isfile(file):
        return {}
    with open(file) as stream:
        return json.load(stream)


def load_pipeline(job):
    import torch

    provide_stand_ins(noted_stand_ins(job["checkpoint"]))
    cls = class_of(job)
    pipe = cls.from_pretrained(job["checkpoint"], torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_pipelines: dict = {}


@contextlib.contextmanager
def recorded(pipe, record, stop_after):
    """Record the scheduler's steps, the denoisers' calls and the decoded tensor while a call runs."""
    steps_of, scheduler = type(pipe.scheduler), pipe.scheduler
    original_step = steps_of.step

    @functools.wraps(original_step)  # pipelines look at its signature
    def step(self, *args, **kwargs):
        result = original_step(self, *args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        record["steps"].append(sample.detach().clone())
        if stop_after is not None and len(record["steps"]) >= stop_after:
            raise Stop
        return result

    def before(module, args, kwargs):
        record["calls"] += 1
        if record["first_call"] is None:
            given = named_tensors(module, args, kwargs)
            record["first_call"] = {k: v.detach().clone() for k, v in given.items() if v.numel() < 10**7}
            record["timesteps"] = scheduler.timesteps.detach().clone()
        if stop_after == 0:
            raise Stop

    hooks = [
        component.register_forward_pre_hook(before, with_kwargs=True)
        for name, component in pipe.components.items()
        if name.startswith(("transformer", "unet")) and hasattr(component, "register_forward_pre_hook")
    ]
    processors = {}
    for name in ("image_processor", "video_processor"):
        processor = getattr(pipe, name, None)
        for method, spy in (("postprocess", _spy), ("postprocess_video", _spy), ("apply_overlay", _spy_overlay)):
            original = getattr(processor, method, None)
            if original is not None:
                processors[processor, method] = original
                setattr(processor, method, spy(original, record))
    steps_of.step = step
    try:
        yield
    finally:
        steps_of.step = original_step
        for hook in hooks:
            hook.remove()
        for processor, method in processors:
            delattr(processor, method)


def _spy(original, record):
    @functools.wraps(original)
    def postprocess(*args, **kwargs):
        if record.get("post_processing"):  # a video is post-processed picture by picture
            return original(*args, **kwargs)
        tensor = args[0] if args else kwargs.get("video", kwargs.get("image"))
        pixels_for_a_checker = record.pop("pixels", False)  # the call before this one was not the last word
        if tensor is not None and hasattr(tensor, "detach") and (record["decoded"] is None or pixels_for_a_checker):
            record["decoded"] = tensor.detach().clone()
        record["pixels"] = kwargs.get("output_type") == "np"
        record["post_processing"] = True
        try:
            return original(*args, **kwargs)
        finally:
            record["post_processing"] = False

    return postprocess


def _spy_overlay(original, record):
    """Pictures with the crop pasted in are what the call decoded, as values in [-1, 1]."""

    @functools.wraps(original)
    def apply_overlay(*args, **kwargs):
        import numpy as np
        import torch

        picture = original(*args, **kwargs)
        pixels = torch.from_numpy(np.array(picture)).float().movedim(-1, 0)[None] / 127.5 - 1
        record["pasted"] = pixels if "pasted" not in record else torch.cat([record["pasted"], pixels])
        return picture

    return apply_overlay


def first_output(result):
    """The generated thing, of a pipeline output or tuple."""
    return result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))


def generators(job_seed, per_prompt=1):
    """One generator, or for a list of seeds a list with each prompt's own generator `per_prompt` times."""
    import torch

    if not isinstance(job_seed, list):
        return torch.Generator("cpu").manual_seed(job_seed)
    own = [torch.Generator("cpu").manual_seed(seed) for seed in job_seed]
    return [generator for generator in own for _ in range(per_prompt)]


def pictures(files):
    """Arguments that are pictures, from their files: one each, or a list."""
    from PIL import Image

    return {
        name: [Image.open(p).copy() for p in paths] if isinstance(paths, list) else Image.open(paths).copy()
        for name, paths in files.items()
    }


def one_call(pipe, call):
    import torch

    record = {"steps": [], "calls": 0, "first_call": None, "timesteps": None, "decoded": None, "others": []}
    kwargs = dict(call["kwargs"])
    if call.get("tensors"):
        kwargs |= torch.load(call["tensors"], weights_only=True)
    kwargs |= pictures(call.get("images", {}))
    error, output, start = None, None, time.perf_counter()
    torch.manual_seed(GLOBAL_SEED)  # some pipelines also draw without a generator
    try:
        with torch.no_grad(), recorded(pipe, record, call.get("stop_after")):
            result = pipe(**kwargs, generator=generators(call["seed"], call.get("per_prompt", 1)))
        output = first_output(result)
        values = list(result if isinstance(result, (tuple, list)) else result.values())
        record["others"] = [v.detach().clone() for v in values[1:] if hasattr(v, "detach")]
    except Stop:
        pass
    except Exception as problem:  # noqa: BLE001 - what Diffusers raises is a result
        error = {"type": type(problem).__name__, "message": str(problem)[:300], "trace": traceback.format_exc()[-1500:]}
    if output is not None and not hasattr(output, "detach"):
        output = None
    record["decoded"] = record.pop("pasted", record["decoded"])
    return record | {"output": output, "error": error, "seconds": time.perf_counter() - start}


def job_pipeline(job):
    """Run calls of a pipeline loaded from a checkpoint; write what happened in each to `out`."""
    import torch

    key = (job["class"], job["checkpoint"], job.get("file"))
    if key not in _pipelines:
        _pipelines.clear()
        _pipelines[key] = load_pipeline(job)
    pipe = _pipelines[key]
    records = [together(pipe, call) if call.get("apart") else one_call(pipe, call) for call in job["calls"]]
    torch.save(records, job["out"])
    return {}


def together(pipe, call):
    """The record of a call with a list of prompts, made of one call per prompt."""
    import torch

    records = []
    for index, seed in enumerate(call["seed"]):
        kwargs = {
            k: v[index] if isinstance(v, list) and "prompt" in k.split("_") else v for k, v in call["kwargs"].items()
        }
        records.append(one_call(pipe, call | {"kwargs": kwargs, "seed": seed}))
    first = records[0]
    joined = {"calls": sum(r["calls"] for r in records), "seconds": sum(r["seconds"] for r in records)}
    joined["steps"] = [torch.cat(steps) for steps in zip(*(r["steps"] for r in records), strict=True)]
    for key in ("decoded", "output"):
        values = [r[key] for r in records]
        joined[key] = torch.cat(values) if all(v is not None for v in values) else None
    return first | joined | {"error": next((r["error"] for r in records if r["error"]), None)}


def job_encode(job):
    """What the pipeline's encode_prompt returns for `kwargs`, by position."""
    import torch

    key = (job["class"], job["checkpoint"], job.get("file"))
    if key not in _pipelines:
        _pipelines.clear()
        _pipelines[key] = load_pipeline(job)
    with torch.no_grad():
        result = _pipelines[key].encode_prompt(**job["kwargs"])
    torch.save(list(result) if isinstance(result, (tuple, list)) else [result], job["out"])
    return {}


def job_generate(job):
    """One call with output_type "pt", for comparison with a served image; writes the tensor."""
    import torch

    pipe = load_pipeline(job)
    with torch.no_grad():
        kwargs = job["kwargs"] | pictures(job.get("images", {}))
        result = pipe(**kwargs, generator=generators(job["seed"]), output_type="pt")
    torch.save(first_output(result), job["out"])
    return {}


# ------------------------------------------------------------------------------------------------ loop
def declare_torchvision_operators():
    """A CUDA build of torchvision beside a CPU build of torch fails to import unless these schemas exist."""
    import importlib.util

    import torch

    if torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main():
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    declarations = declare_torchvision_operators()  # noqa: F841  (kept alive)
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(int(os.environ.get("PORTER_THREADS", "1")))
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spent = time.perf_counter() - _started
    print(json.dumps({"ok": True, "import_seconds": spent, "diffusers": diffusers.__version__}), file=reply)
    jobs = {n.removeprefix("job_"): f for n, f in globals().items() if n.startswith("job_")}
    for line in sys.stdin:
        job = json.loads(line)
        if job["job"] == "stop":
            break
        start = time.perf_counter()
        try:
            answer = {"ok": True, **jobs[job["job"]](job)}
        except Exception as problem:  # noqa: BLE001 - goes to the caller
            answer = {"ok": False, "type": type(problem).__name__, "error": str(problem)[:2000],
                      "traceback": traceback.format_exc()[-4000:]}  # fmt: skip
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}), file=reply)


if __name__ == "__main__":
    main()
