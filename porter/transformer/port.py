"""The transformer half of a port: one denoiser class, from Diffusers' source to the definitions of one file."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.emit.templates import render
from porter.engine import RuleSet, refuse_conflicts, run_rules
from porter.engine.absolute_text import absolutise_text
from porter.engine.index import IndexCache
from porter.engine.run import unshared
from porter.engine.schema import Phase
from porter.facts.module_tree import module_tree
from porter.facts.persistent_buffers import persistent_buffers
from porter.facts.projections import Merge
from porter.facts.sequence.plan import sequence_plan
from porter.facts.tensor_parallel import TensorParallel, tensor_parallel
from porter.model import Definition, Diagnostic, SiteStatus, Unit, Unknown
from porter.source import tree
from porter.source.library import Library
from porter.source.names import absolute
from porter.specialise import tidy
from porter.specialise.fold import fold
from porter.specialise.model import Driver, Model
from porter.specialise.naming import attention_role, class_names, snake, stem
from porter.transformer.attributes import class_attributes
from porter.transformer.closure import close
from porter.transformer.lower import surface
from porter.transformer.policy import Policy

TEMPLATE_MODULE = "porter_template"


class TransformerPort(Struct, frozen=True):
    """A converted denoiser: definitions in order of emission and what the manifest and the pipeline need to know."""

    source: str
    class_name: str
    folder: str
    module: str
    definitions: tuple[Definition, ...]
    local: dict[str, str]
    merges: tuple[Merge, ...]
    whole_sequence: str | None
    """Why ranks can't share a sequence; None if they can."""
    decisions: dict[str, str]
    diagnostics: tuple[Diagnostic, ...]
    statuses: tuple[SiteStatus, ...]
    edits: int


def port_transformer(library: Library, name: str, rules: RuleSet, policy: Policy) -> TransformerPort:
    """Convert one denoiser class. Raises PorterError if the source cannot be followed."""
    run = _Run(rules)
    policy = policy.hinted(library.canonical(name).rpartition(".")[2])
    model, names, unit = _specialised(run, library, name, policy)
    roles_by_class = {names[id(s)]: attention_role(s) or "self" for s in model.used}
    unit, merges = _lower(run, unit, roles_by_class)
    unit, whole = _shard(run, unit, library, policy)
    unit = run.rules(replace(unit, facts={"library": library}), "optimise")
    extra = _templates(unit)
    unit = _surface(unit, policy, list(merges), persistent_buffers(unit, library))
    unit = run.rules(unit, "tidy")
    home = model.root.qualified.rpartition(".")[0]
    # Helpers may name a class of the model (a static method, an isinstance test): it is the port's own.
    own = {s.qualified: names[id(s)] for s in model.used}
    closure = close(unit.definitions, own, home, library, policy, run.normalise)
    short = stem(unit.root)
    folder = snake(short)
    # Helpers that are still called are part of what the layers compute, so they are optimised, too.
    optimised = run.rules(Unit((*closure.helpers, *extra, *unit.definitions), unit.root), "optimise")
    local = {**own, **closure.local, **{f"{TEMPLATE_MODULE}.{d.name}": d.name for d in extra}}
    return TransformerPort(
        model.root.qualified, unit.root, folder, f"{folder}_transformer", optimised.definitions, local, merges,
        whole, closure.decisions, (*run.diagnostics, *closure.diagnostics), tuple(run.statuses), run.edits,
    )  # fmt: skip


def shared_classes(library: Library, name: str) -> list[str]:
    """Classes of other files that the port of a denoiser will look into, the longest ones first."""
    source = library.canonical(name)
    module = library.module(source.rpartition(".")[0])
    above = library.ancestors(source)
    imported = {library.canonical(target) for target in module.imports.values()} if module is not None else set()
    found = [n for n in imported if n.startswith("diffusers.models.") and n not in above and library.is_torch_module(n)]
    lines = {n: entry.last_line - entry.first_line for n in found if (entry := library.entry(n)) is not None}
    return sorted(lines, key=lambda n: (-lines[n], n))


def port_name(library: Library, name: str) -> tuple[str, str, str]:
    """Qualified name of a denoiser class, and module and class of its port, as they will be."""
    source = library.canonical(name)
    short = source.rpartition(".")[2]
    return source, f"{snake(stem(short))}_transformer", short


def specialised(library: Library, name: str, rules: RuleSet, policy: Policy) -> tuple[Unit, TensorParallel]:
    """A denoiser as the rules of phase `lower` see it, and what the analyses say of it."""
    unit = _specialised(_Run(rules), library, name, policy)[2]
    return unit, tensor_parallel(unit)


def _specialised(run: _Run, library: Library, name: str, policy: Policy) -> tuple[Model, dict[int, str], Unit]:
    model = Driver(library, name, policy, run.normalise).run()
    names = class_names(model)
    return model, names, Unit(fold(model, names), names[id(model.root)])


class _Run:
    """Rule runs of one port and what they reported."""

    def __init__(self, rules: RuleSet) -> None:
        self.set = rules
        self.diagnostics: list[Diagnostic] = []
        self.statuses: list[SiteStatus] = []
        self.edits = 0
        self.cache = IndexCache()

    def rules(self, unit: Unit, phase: Phase) -> Unit:
        outcome = run_rules(unit, self.set, phase=phase, scope="transformer", cache=self.cache)
        refuse_conflicts(outcome)
        self.diagnostics += outcome.diagnostics
        self.statuses += outcome.statuses
        self.edits += len(outcome.edits)
        return outcome.unit

    def normalise(self, definition: Definition) -> Definition:
        unit = self.rules(Unit((definition,), definition.name), "normalize")
        return unit.get(definition.name) or definition


def _lower(run: _Run, unit: Unit, attention_roles: dict[str, str]) -> tuple[Unit, tuple[Merge, ...]]:
    """Engine layers for attention, projections and norms, by the rules of phase `lower`."""
    unit = unshared(replace(unit, facts={"attention_roles": attention_roles}), run.cache)
    merges = tensor_parallel(unit).merges()
    unit = run.rules(unit, "lower")
    tidied = [
        d.with_node(tidy.after_lowering(d.node)) if isinstance(d.node, cst.ClassDef) else d for d in unit.definitions
    ]
    return replace(unit, definitions=tuple(tidied)), merges


def _shard(run: _Run, unit: Unit, library: Library, policy: Policy) -> tuple[Unit, str | None]:
    """The sequence-parallel plan, by the rules of phase `shard`; or why there is none."""
    unit = unshared(replace(unit, facts={"library": library, "refused": policy.refused}), run.cache)
    plan = sequence_plan(unit)
    return run.rules(unit, "shard"), plan.reason if isinstance(plan, Unknown) else None


def _templates(unit: Unit) -> tuple[Definition, ...]:
    """Classes that rules use and the engine does not have; they are printed into the port."""
    used = {
        n.value
        for d in unit.definitions
        for n in tree.find(d.node, cst.Name)
        if n.value.startswith(absolute(f"{TEMPLATE_MODULE}."))
    }
    names = sorted(u.rpartition(absolute("."))[2] for u in used)
    return tuple(
        d for n in names for d in absolutise_text(render(f"transformer/{snake(n)}.py.jinja"), module=TEMPLATE_MODULE)
    )


def _surface(unit: Unit, policy: Policy, merges: list[Merge], buffers: tuple[str, ...]) -> Unit:
    """Signature, class attributes and loader of the root class; `buffers` are those of a checkpoint."""
    modules = module_tree(unit)
    unit = surface.root_surface(unit, modules, set(policy.refused))
    root = unit.get(unit.root)
    assert root is not None and isinstance(root.node, cst.ClassDef)
    attributes = class_attributes(unit, modules, merges)
    loader = absolutise_text(render("transformer/load_weights.py.jinja", merged=bool(merges)), module=TEMPLATE_MODULE)
    members = [_unmarked(d.node) for d in loader]
    properties = absolutise_text(render("transformer/properties.py.jinja"), module=TEMPLATE_MODULE)
    members += [_unmarked(d.node) for d in properties]
    kept = any(
        isinstance(i, cst.SimpleStatementLine) and "_keep_in_fp32_modules =" in tree.code(i)
        for i in root.node.body.body
    )
    node = _loaded_dtypes(root.node, kept, bool(buffers)) if kept or buffers else root.node
    body = list(node.body.body)
    docstring = body[: len(body) - len(tree.strip_docstring(body))]
    rest = [i for i in body[len(docstring) :] if not surface.replaced_attribute(i)]
    new = [*docstring, *attributes, *rest, *members]
    return unit.replace(root.with_node(node.with_changes(body=node.body.with_changes(body=new))))


def _loaded_dtypes(node: cst.ClassDef, kept: bool, buffers: bool) -> cst.ClassDef:
    """What Diffusers' loader does with `_keep_in_fp32_modules` and with buffers, at the end of the constructor."""
    init = tree.method(node, "__init__")
    assert init is not None
    text = render("transformer/loaded_dtypes.py.jinja", kept=kept, buffers=buffers)
    (function,) = absolutise_text(text, module=TEMPLATE_MODULE)
    assert isinstance(function.node, cst.FunctionDef)
    new = tree.with_body(init, [*tree.body(init), *tree.body(function.node)])
    return tree.replace_nodes(node, [(init, new)])


def _unmarked(node: cst.CSTNode) -> cst.CSTNode:
    return node.with_changes(leading_lines=[cst.EmptyLine()])
