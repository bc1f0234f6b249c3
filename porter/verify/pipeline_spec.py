"""Tiny checkpoints and requests of a pipeline, as data: tests/corpus/pipelines/<Pipeline>.yaml.

pipeline: FooPipeline
denoisers: {transformer: {class: FooTransformer2DModel, config: {...}}}
components: {vae: {...}, scheduler: {class: ..., ...}, image_encoder: null}
call: {prompt: ..., height: 32, width: 48, num_inference_steps: 2}   # what every request has
negative: blurry                                  # the text of a negative prompt
guidance: {guidance_scale: [0.0, 1.0, 4.0]}       # values to try, with each kind of negative prompt
odd: {height: 40, width: 52}                      # a size that is not a multiple of the patch
everything: {sigmas: [1.0, 0.5], ...}             # every other parameter, at another value than its default
embeds: [{encode: {prompt: ...}, names: [prompt_embeds, null], without: [prompt], with: {}}]
raises: [{name: ..., call: {...}}]                # requests that Diffusers refuses
extra: [{name: ..., call: {...}, images: {...}}]  # further requests, perhaps with other pictures (`{}`: none)
omitted_stop: 1                                   # steps to run when everything is left at its default
omitted: {height: 32, width: 48}                  # what is given even then, where the default would take minutes
images: {image: [40, 56]}                         # random pictures: [height, width], or
                                                  #   {size: [40, 56], mode: L}   RGB, RGBA, L
                                                  #   {size: [40, 56], mask: true}   white box on black
                                                  #   {size: [40, 56], frames: 5}   a video: a list of pictures
                                                  #   a list of such entries: several pictures
tensors: {audio: [1, 2, 4000]}                    # random tensors of a shape, or a list of shapes: sound, latents
only: [plain, prompt-embeds]                      # beginnings of names: leave the other requests out
apart: Diffusers pads prompts of a call to the longest, without a mask   # why a joint call of Diffusers is no reference
stand_ins: {guard: [Checker]}                     # classes of packages that are not installed; they pass all through
cfg: {true_cfg_scale: 3.0}                        # what a request needs for two guidance branches
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from porter.verify.cases import corpus_root
from porter.verify.outcome import VerifyError

KEYS = frozenset({
    "pipeline", "denoisers", "components", "call", "negative", "guidance", "odd", "everything", "embeds", "raises",
    "extra", "omitted_stop", "omitted", "images", "tensors", "cfg", "only", "apart", "stand_ins",
})  # fmt: skip
NEEDED = frozenset({"pipeline", "denoisers", "call"})
SEED = 42
PER_PROMPT = re.compile(r"(negative_)?prompt(_\d+)?")
"""Texts of which a call with several prompts takes one each."""


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """Content of a pipeline's file, checked."""

    pipeline: str
    data: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)


@dataclass(frozen=True, slots=True)
class RequestCase:
    """One call, given to Diffusers and to the port alike. A list of seeds means a list of prompts.

    `apart`: Diffusers is called once per prompt. Requests are independent of each other, so that is what each must
    equal; a joint call of Diffusers may mix them up (masks repeated in another order than the embeddings they mask).
    """

    name: str
    kwargs: Mapping[str, Any]
    seed: int | list[int] = SEED
    stop_after: int | None = None
    encode: tuple[Mapping[str, Any], ...] = field(default=())
    per_prompt: int = 1
    apart: bool = False
    images: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        return len(self.seed) if isinstance(self.seed, list) else 1


def load_spec(pipeline: str, folder: Path | str | None = None) -> PipelineSpec | None:
    """The file of a pipeline, or None where there is none. Raises VerifyError for a file that is wrong."""
    path = Path(folder or corpus_root() / "pipelines") / f"{pipeline}.yaml"
    if not path.is_file():
        return None
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise VerifyError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise VerifyError(f"{path}: a mapping is expected")
    if missing := NEEDED - set(data):
        raise VerifyError(f"{path}: {', '.join(sorted(missing))} missing")
    if unknown := set(data) - KEYS:
        raise VerifyError(f"{path}: unknown key {', '.join(sorted(unknown))}", f"known: {', '.join(sorted(KEYS))}")
    if data["pipeline"] != pipeline:
        raise VerifyError(f"{path}: pipeline is {data['pipeline']}, the file's name says {pipeline}")
    for row in (*data.get("raises", ()), *data.get("extra", ())):
        if not {"name", "call"} <= set(row) <= {"name", "call", "images", "tensors"}:
            raise VerifyError(
                f"{path}: an entry of raises or extra has the keys name and call, perhaps images and tensors, not {sorted(row)}"
            )
    return PipelineSpec(pipeline, data)


def request_table(spec: PipelineSpec, parameters: Mapping[str, Any]) -> tuple[RequestCase, ...]:
    """All requests that a pipeline with these __call__ parameters must answer as Diffusers does."""
    base = dict(spec.get("call"))
    negative = spec.get("negative")
    cases = [RequestCase("plain", base)]
    guided = dict(base)
    if negative is not None and "negative_prompt" in parameters:
        guided["negative_prompt"] = negative
        cases.append(RequestCase("negative-prompt", guided))
    everything = {**guided, **spec.get("everything", {})}
    cases.append(RequestCase("everything-given", everything))
    cases.append(
        RequestCase(
            "defaults-omitted", _only_inputs(base) | spec.get("omitted", {}), stop_after=spec.get("omitted_stop", 1)
        )
    )
    cases += _guidance(spec, base, parameters)
    for index, embeds in enumerate(_embeds(spec)):
        cases.append(_embeds_case(guided, embeds, index))
    if isinstance(base.get("prompt"), str):
        cases.append(_two_prompts(guided))
    per_prompt = next((n for n in parameters if re.fullmatch(r"num_\w+_per_prompt", n)), None)
    if per_prompt:
        cases.append(RequestCase("two-per-prompt", guided | {per_prompt: 2}))
        if isinstance(base.get("prompt"), str):
            cases.append(_two_prompts(guided | {per_prompt: 2}, 2))
    if "odd" in spec.data:
        cases.append(RequestCase("odd-size", guided | spec.get("odd")))
    if "output_type" in parameters:
        cases.append(RequestCase("latent-output", guided | {"output_type": "latent"}))
    images, tensors = spec.get("images", {}), spec.get("tensors", {})
    alone = any(map(bool, (images, tensors, spec.get("apart"))))
    cases = [replace(c, images=images, tensors=tensors, apart=c.apart or (c.prompts > 1 and alone)) for c in cases]
    for kind, prefix in (("extra", ""), ("raises", "raises-")):
        for row in spec.get(kind, ()):
            drawn = {"images": row.get("images", images), "tensors": row.get("tensors", tensors)}
            cases.append(RequestCase(prefix + row["name"], base | row["call"], **drawn))
    only = tuple(spec.get("only", ()))
    return tuple(c for c in cases if not only or c.name.startswith(only))


def _only_inputs(base: Mapping[str, Any]) -> dict[str, Any]:
    """Only what has no default that works: the prompt."""
    return {k: v for k, v in base.items() if k == "prompt"}


def _guidance(spec: PipelineSpec, base: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[RequestCase]:
    cases = []
    for name, values in spec.get("guidance", {}).items():
        for value in values:
            cases.append(RequestCase(f"{name}={value}", {**base, name: value}))
            if "negative_prompt" not in parameters:
                continue
            texts = {"none": None, "empty": "", "text": spec.get("negative", "blurry")}
            for label, text in texts.items():
                cases.append(
                    RequestCase(f"{name}={value},negative={label}", {**base, name: value, "negative_prompt": text})
                )
    return cases


def _embeds(spec: PipelineSpec) -> list[list[Mapping[str, Any]]]:
    """Groups of encodings; a flat list is one group."""
    entries = spec.get("embeds", [])
    return [entries] if entries and isinstance(entries[0], dict) else list(entries)


def _embeds_case(guided: Mapping[str, Any], group: list[Mapping[str, Any]], index: int) -> RequestCase:
    dropped = {n for row in group for n in row.get("without", ())}
    kwargs = {k: v for k, v in guided.items() if k not in dropped}
    for row in group:
        kwargs |= row.get("with", {})
    return RequestCase("prompt-embeds" + (f"-{index}" if index else ""), kwargs, encode=tuple(group))


def _two_prompts(guided: Mapping[str, Any], per_prompt: int = 1) -> RequestCase:
    """Two prompts of different lengths, each with its own generator: two requests of one batch."""
    kwargs = {
        k: [v, f"{v} and a much longer ending"] if isinstance(v, str) and PER_PROMPT.fullmatch(k) else v
        for k, v in guided.items()
    }
    name = "two-prompts" if per_prompt == 1 else "two-prompts-two-each"
    return RequestCase(name, kwargs, seed=[SEED, SEED + 1], per_prompt=per_prompt, apart=per_prompt > 1)
