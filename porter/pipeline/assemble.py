"""Print a pipeline port from its analysis."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import libcst as cst

from porter.engine import RuleSet
from porter.facts.pipeline import Component, Loop, Regions, Stages
from porter.facts.pipeline.liveness import live_before, writes
from porter.facts.pipeline.undefined import undefined
from porter.model import Definition, Diagnostic, PorterError, Unit, Unknown
from porter.pipeline.analysis import Analysis, analyse, in_stages
from porter.pipeline.batching import Join, Merge, batching
from porter.pipeline.caching import branches_of, said_of_cache, told_of_cache
from porter.pipeline.cleanup import clean
from porter.pipeline.helpers import module_definitions
from porter.pipeline.model import Denoiser, Feature, Parameter, PipelinePort
from porter.pipeline.optional_imports import import_where_used, optional_packages
from porter.pipeline.own_guider import guiders
from porter.pipeline.own_scheduler import SCHEDULER
from porter.pipeline.parameters import declaration, is_tensor, is_text, media_keys
from porter.pipeline.pieces import Pieces, pieces
from porter.pipeline.preparing import (
    ARGUMENT,
    Preparing,
    pre_process_function,
    preparing,
    stays,
    takes_media,
    with_prepared,
)  # fmt: skip
from porter.pipeline.process import Finish, finish
from porter.pipeline.reads import (
    class_statements,
    code_nodes,
    denoiser_reads,
    kept_constructor,
    unresolved,
    used_components,
)  # fmt: skip
from porter.pipeline.render import render
from porter.pipeline.tables import Tables, load_tables
from porter.pipeline.whole import whole_pieces
from porter.source.library import Library
from porter.source.names import absolute
from porter.source.tree import body, code

NOT_CUT, NOT_REACHED, NOT_LOADED, NOT_SET = "PORT501", "PORT503", "PORT504", "PORT505"
SIBLING = "sibling"
"""Pseudo package of the other files in the port's folder: `sibling.<module>.<Class>` is imported relatively."""


def snake(name: str) -> str:
    """QwenImageEditPlus -> qwen_image_edit_plus."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def port_pipeline(
    library: Library,
    qualified_name: str,
    denoisers: Mapping[str, Denoiser] | Sequence[Denoiser],
    ruleset: RuleSet | None = None,
    tables: Tables | None = None,
) -> PipelinePort:
    """The vLLM-Omni port of a Diffusers pipeline, as an absolute unit. Raises PorterError when it can't be cut.

    `denoisers` are the ported classes by component name; a component that is missing there gets a name by convention.
    """
    tables = tables or load_tables()
    analysis, cut = _cut(analyse(library, qualified_name, tables, ruleset))
    cls = analysis.members.cls
    stem = snake(cls.name.removesuffix("Pipeline"))
    known = dict(denoisers) if isinstance(denoisers, Mapping) else {d.component: d for d in denoisers}
    used = used_components(analysis)
    ported = [known.get(c.name) or _conventional(c) for c in analysis.denoisers if c.name in used]
    lost = unresolved(analysis, cut)
    never = undefined(library, analysis.members, lost)
    if set(lost) - never:
        raise PorterError(
            Diagnostic(
                NOT_LOADED,
                f"{qualified_name}: nothing in a port sets {', '.join(f'self.{n}' for n in lost if n not in never)}",
                analysis.call_span,
            )
        )
    bound = {p.name for p in analysis.parameters if p.place != "refused"} | writes(cut.encode)
    unbound = live_before(cut.encode) - bound
    if unbound:
        raise PorterError(
            Diagnostic(
                NOT_REACHED, f"{qualified_name}: {', '.join(sorted(unbound))} is read but never set", analysis.call_span
            )
        )
    finished = finish(library, analysis, f"get_{stem}_post_process_func")
    batch = batching(analysis, cut)
    prepared = preparing(library, analysis, cut)
    factory = f"get_{stem}_pre_process_func"
    shown, printed = (
        with_prepared(analysis, cut, prepared.media) if isinstance(prepared, Preparing) else (analysis, cut)
    )
    nodes = _definitions(library, shown, printed, ported, finished, batch, prepared, factory, tables, ruleset)
    features = {
        "cfg_parallel": _cfg_feature(analysis),
        "step_execution": Feature("generated") if cut.stepwise is None else Feature("unsupported", cut.stepwise.reason),
        "request_batch": Feature("unsupported", batch.reason) if isinstance(batch, Unknown) else Feature("generated"),
    }
    if takes_media(analysis):
        features["pre_process"] = (
            Feature("unsupported", prepared.reason)
            if isinstance(prepared, Unknown)
            else Feature("generated", "; ".join(map(stays, prepared.media.refused)))
        )
    return PipelinePort(
        source=f"diffusers.{cls.name}", arch=cls.name, module=f"pipeline_{stem}", cls=cls.name,
        unit=Unit(tuple(nodes), cls.name), parameters=analysis.parameters, features=features,
        pre_process=factory if isinstance(prepared, Preparing) else None,
        post_process=f"get_{stem}_post_process_func" if finished.function is not None else None, denoisers=tuple(ported),
        denoiser_reads=denoiser_reads(analysis),
        diagnostics=(*analysis.diagnostics, *_never_set(analysis, sorted(never))), statuses=analysis.statuses,
        siblings={f"{SIBLING}.{d.module}.{d.cls}": d.cls for d in ported},
    )  # fmt: skip


def _never_set(analysis: Analysis, names: Sequence[str]) -> list[Diagnostic]:
    """Diffusers' own gaps: the port raises there as Diffusers does."""
    text = "Diffusers itself never sets self.{}; whatever needs it raises AttributeError there and in the port"
    return [Diagnostic(NOT_SET, text.format(name), analysis.call_span) for name in names]


def _cut(analysis: Analysis) -> tuple[Analysis, Pieces]:
    """The pieces: methods for each region where the loop has them, else one method for the whole denoising."""
    if isinstance(analysis.cut, Stages):
        return analysis, whole_pieces(analysis)
    cut = pieces(analysis)
    if isinstance(cut, Unknown):
        analysis = in_stages(analysis, cut.reason)
        return analysis, whole_pieces(analysis)
    return analysis, cut


def _cfg_feature(analysis: Analysis) -> Feature:
    guide = analysis.guidance
    if not isinstance(analysis.branches, Unknown):
        return Feature("generated")
    if isinstance(guide, Unknown):
        return Feature("unsupported", guide.reason)
    return Feature("generated") if guide.negative is not None else Feature("unsupported", "one call per step")


def _conventional(component: Component) -> Denoiser:
    source = component.classes[0] if component.classes else component.name
    cls = source.rpartition(".")[2]
    stem = re.sub(r"(Transformer(2D|3D|1D)?(Model|DModel)?|DiT|Model)$", "", cls)
    return Denoiser(component.name, source, f"{snake(stem)}_transformer", cls)


def _definitions(
    library: Library,
    analysis: Analysis,
    cut: Pieces,
    ported: Sequence[Denoiser],
    finished: Finish,
    batch: Merge | Join | Unknown,
    prepared: Preparing | Unknown,
    factory: str,
    tables: Tables,
    ruleset: RuleSet | None,
) -> list[Definition]:
    cls = analysis.members.cls
    home = lambda name, node: Definition(name, node, cls.module, cls.file)  # noqa: E731
    shell = _class(analysis, cut, ported, finished, batch, isinstance(prepared, Preparing), tables)
    carried = module_definitions(library, analysis.members, [*code_nodes(analysis), *kept_constructor(analysis)])
    packages = optional_packages(library, analysis.members)
    out = [import_where_used(d, packages) for d in clean(carried, ruleset).definitions]
    vae = _vae_table(analysis, tables)
    for each in render(
        "pipeline/load_component.py.jinja", {}, vae_classes=bool(vae), vae_table=_vae_text(vae),
        pipeline_packages=_pipeline_packages(analysis),
    ):  # fmt: skip
        out.append(home(each.name.value, each))  # type: ignore[attr-defined]
    out += [home(f.name.value, f) for f in render("pipeline/compile.py.jinja", {})]  # type: ignore[attr-defined]
    told = render(
        "pipeline/cache_dit.py.jinja", {}, guided=bool(branches_of(analysis)), said=said_of_cache(shell)
    )  # fmt: skip
    out += [home(f.name.value, f) for f in told]  # type: ignore[attr-defined]
    if isinstance(batch, Join):
        joining = render("pipeline/join_inputs.py.jinja", {}, branches=bool(batch.branches))
        out += [home(f.name.value, f) for f in joining]  # type: ignore[attr-defined]
    if isinstance(prepared, Preparing):
        dummy = "num_frames" in {p.name for p in analysis.parameters} and _is_read(analysis, cut, "num_frames")
        function = pre_process_function(analysis, prepared, factory, dummy)
        out += [home(f.name.value, f) for f in function]  # type: ignore[attr-defined]
    if finished.function is not None:
        out += [home(f.name.value, f) for f in finished.function]  # type: ignore[attr-defined]
    out.append(import_where_used(home(cls.name, shell), packages))
    return out


def _vae_table(analysis: Analysis, tables: Tables) -> dict[str, str]:
    used = used_components(analysis)
    return {
        c.rpartition(".")[2]: tables.vae[c]
        for part in analysis.components
        if part.name in used
        for c in part.classes
        if c in tables.vae
    }


def _pipeline_packages(analysis: Analysis) -> str:
    """Packages below `diffusers.pipelines` that a checkpoint may name as the home of a component."""
    used = used_components(analysis)
    classes = [c for part in analysis.components if part.name in used and part.role != "denoiser" for c in part.classes]
    found = {c.split(".")[2] for c in classes if c.startswith("diffusers.pipelines.")}
    return _tuple(sorted(found)) if found else ""


def _vae_text(table: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {absolute(cls)}' for name, cls in sorted(table.items())) + "}"


def _class(
    analysis: Analysis,
    cut: Pieces,
    ported: Sequence[Denoiser],
    finished: Finish,
    batch: Merge | Join | Unknown,
    prepares: bool,
    tables: Tables,
) -> cst.BaseStatement:
    cls = analysis.members.cls
    used = used_components(analysis)
    parts = [c for c in analysis.components if c.name in used]
    steps = next((p.default for p in analysis.parameters if p.name == "num_inference_steps"), None)
    read = {p.name for p in analysis.parameters if p.place != "refused"}
    taken = [p for p in analysis.parameters if p.name in read and _is_read(analysis, cut, p.name)]
    arguments = {a.name.value: a for a in analysis.arguments}
    slots = {
        "class_statements": class_statements(analysis),
        "constructor": kept_constructor(analysis), "helpers": [h.node for h in analysis.helpers],
        "encode": cut.encode, "predict": cut.predict, "overrides": cut.overrides, "step": cut.step, "decode": cut.decode,
        "step_scheduler": cut.step_scheduler, "denoise": cut.denoise,
    }  # fmt: skip
    names = [p.name for p in taken]
    keys = media_keys({p.name for p in taken if p.place == "media"}, tables)
    loop = analysis.cut.loop if isinstance(analysis.cut, Regions) else None
    (node,) = render(
        "pipeline/pipeline.py.jinja", slots, cls=cls.name, doc=_docstring(analysis),
        merges=isinstance(batch, Merge), joins=_joins(batch, prepares), prepares=prepares,
        steps=cut.stepwise is None, default_steps=steps,
        dit_modules=_texts(d.component for d in ported),
        encoder_modules=_texts(c.name for c in parts if c.role in ("text_encoder", "image_encoder")),
        vae_modules=_texts(c.name for c in parts if c.role == "vae"),
        profiler_targets=_texts(_targets(parts)),
        refused="{" + ", ".join(f'"{p.name}": {p.reason!r}' for p in analysis.parameters if p.place == "refused") + "}",
        text_arguments=_tuple(n for n in names if is_text(arguments[n]) and _place(analysis, n) == "prompt"),
        tensor_arguments=_tuple(n for n in names if is_tensor(arguments[n])),
        loaded=[_loaded(c) for c in parts if c.loads and c.role != "denoiser"],
        values=[c for c in parts if not c.loads],
        denoisers=[_denoiser(d, analysis) for d in ported], dummy="num_frames" in names,
        outputs=next((p.name for p in taken if p.place == "outputs"), None),
        plain_sampling=[p for p in taken if p.place == "sampling" and _sampling(p, tables) is None],
        filled_sampling=[
            {"name": p.name, "expression": _sampling(p, tables)}
            for p in taken if p.place == "sampling" and _sampling(p, tables) is not None
        ],
        prompts=[p for p in taken if p.place == "prompt"], media=[p for p in taken if p.place == "media"],
        pictures="image" in keys.values(), media_keys=[(name, key) for name, key in keys.items() if name != key],
        extra=[p for p in taken if p.place == "extra"],
        signature=[declaration(arguments[p.name]) for p in taken],
        loop_inputs=cut.loop_inputs, predict_inputs=cut.predict_inputs, decode_inputs=cut.decode_inputs,
        decode_signature=cut.decode_signature, noise=cut.noise, returned=cut.returned,
        prediction=", ".join([cut.noise, *cut.extras]),
        prediction_type=" -> " + absolute("torch.Tensor") if not cut.extras else "",
        diffuse_returns=_returns(len(cut.returned)), decode_returns=_returns(len(analysis.tail.values)),
        loop_target=_target(loop.index, loop.timestep, cut) if loop is not None else "",
        result=code(analysis.tail.result), whole=loop is None, video=finished.video, sound=finished.sound,
        sample=cut.sample, extras=cut.extras, step_value=_step_values(cut, loop),
        branches=branches_of(analysis), guiders=guiders(analysis.cut) if isinstance(analysis.cut, Regions) else (),
        loop_value={n: f"self.{n}" if n == SCHEDULER else n for n in cut.predict_inputs},
    )  # fmt: skip
    return told_of_cache(node, {d.component for d in ported}, branches_of(analysis))


def _joins(batch: Merge | Join | Unknown, prepares: bool) -> dict[str, str] | None:
    """What the template prints about a join; an empty tuple is left out."""
    if not isinstance(batch, Join):
        return None
    groups = {name: getattr(batch, name) for name in ("arguments", "rows", "branches", "counts", "facts")}
    groups["arguments"] += (ARGUMENT,) if prepares else ()
    return {name: _tuple(names) if names else "" for name, names in groups.items()}


def _returns(count: int) -> str:
    tensor = absolute("torch.Tensor")
    return {0: " -> None", 1: f" -> {tensor}"}.get(count, f" -> tuple[{', '.join([tensor] * count)}]")


def _denoiser(denoiser: Denoiser, analysis: Analysis) -> dict[str, object]:
    component = next(c for c in analysis.denoisers if c.name == denoiser.component)
    main = "od_config.tf_model_config"
    config_class = absolute("vllm_omni.diffusion.data.TransformerConfig")
    own = f'{config_class}.from_dict(read_json(od_config, "{denoiser.component}/config.json"))'
    return {
        "component": denoiser.component, "optional": component.optional,
        "symbol": absolute(f"{SIBLING}.{denoiser.module}.{denoiser.cls}"),
        "config": main if denoiser.component == "transformer" else own,
    }  # fmt: skip


def _place(analysis: Analysis, name: str) -> str:
    return next(p.place for p in analysis.parameters if p.name == name)


def _step_values(cut: Pieces, loop: Loop | None) -> dict[str, str]:
    """Where step execution finds each name of the loop."""
    if loop is None:
        return {}
    special = {loop.timestep: "state.current_timestep", "timesteps": "state.timesteps", SCHEDULER: "state.scheduler"}
    if cut.sample is not None:
        special[cut.sample] = "state.latents"
    if loop.index:
        special[loop.index] = "state.step_index"
    names = (*cut.predict_inputs, *cut.extras, *cut.returned)
    return {n: special.get(n) or f'inputs["{n}"]' for n in names}


def _target(index: str | None, timestep: str, cut: Pieces) -> str:
    needed = index is not None and index in (*cut.predict_inputs, *cut.step_inputs)
    return f"{index}, {timestep} in enumerate(timesteps)" if needed else f"{timestep} in timesteps"


def _is_read(analysis: Analysis, cut: Pieces, name: str) -> bool:
    from porter.facts.pipeline.liveness import uses

    return name in {*cut.loop_inputs, *cut.decode_inputs} or any(name in uses(s) for s in cut.encode)


def _sampling(parameter: Parameter, tables: Tables) -> str | None:
    """Expression for a sampling field that may hold the engine's own filler; None if the field is plain."""
    flag, field = tables.given_by.get(parameter.key), f"sampling.{parameter.key}"
    if flag is not None:
        return f"{field} if sampling.{flag} else None"
    if parameter.filler is None or str(parameter.filler) == parameter.default:
        return None
    if parameter.name == "num_frames":
        return f"{field} if is_dummy_run or {field} != {parameter.filler!r} else None"
    return f"{field} if {field} != {parameter.filler!r} else None"


def _docstring(analysis: Analysis) -> str:
    owner = analysis.members.cls
    first = body(owner.node)[0] if body(owner.node) else None
    if isinstance(first, cst.SimpleStatementLine) and isinstance(first.body[0], cst.Expr):
        value = first.body[0].value
        if isinstance(value, cst.SimpleString):
            lines = str(value.evaluated_value).strip().split("\n\n")[0].split("\n")
            if not lines[0].startswith(("Args:", "Parameters:")):  # a list of arguments is no sentence
                return " ".join(line.strip() for line in lines).replace('"', "'")
    return f"Port of Diffusers' {owner.name}."


def _texts(names) -> str:  # noqa: ANN001 - iterable of str
    return "[" + ", ".join(f'"{n}"' for n in names) + "]"


def _tuple(names) -> str:  # noqa: ANN001 - iterable of str
    return "(" + "".join(f'"{n}", ' for n in names) + ")"


def _targets(parts: Sequence[Component]) -> list[str]:
    encoders = [f"{c.name}.forward" for c in parts if c.role in ("text_encoder", "image_encoder")]
    return [*encoders, "diffuse", *(f"{c.name}.decode" for c in parts if c.role == "vae")]


def _loaded(component: Component) -> dict[str, object]:
    weights = component.role in ("text_encoder", "image_encoder", "vae", "module")
    key = "torch_dtype" if any(c.startswith("diffusers.") for c in component.classes) else "dtype"
    return {
        "name": component.name, "optional": component.optional, "to": ".to(device)" if weights else "",
        "dtype": f", {key}=od_config.dtype" if weights else "",
    }  # fmt: skip
