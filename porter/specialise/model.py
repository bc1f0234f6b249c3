"""Drives the interpreter to a fixed point over one denoiser and holds what it learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import libcst as cst
from msgspec.structs import replace

from porter.model import Definition, Diagnostic, PorterError, Unknown
from porter.source import tree
from porter.source.library import Library
from porter.source.names import absolute
from porter.specialise import processors
from porter.specialise.interpret import Bind, Interpreter
from porter.specialise.program import Key, Record, Spec, structural
from porter.specialise.values import GIVEN, NONE, TOP, Const, Instance, Opaque, Value, join
from porter.transformer.policy import Policy

ROUNDS = 6

Prepare = Callable[[Definition], Definition]
"""Applies the normalising rules to a definition before it is looked into."""


@dataclass
class Model:
    """A denoiser class with every class of its module tree that the port carries, specialised to its use."""

    library: Library
    root: Spec
    specs: dict[Key, Spec]
    record: Record
    functions: dict[str, Definition] = field(default_factory=dict)

    @cached_property
    def used(self) -> tuple[Spec, ...]:
        """Specs the root reaches, constructors before their users."""
        order: list[Spec] = []

        def visit(spec: Spec) -> None:
            if spec in order:
                return
            for call in tree.find(spec.definition.node, cst.Call):
                child = self.record.constructors.get(id(call))
                if child is not None and child is not spec:
                    visit(child)
            order.append(spec)

        visit(self.root)
        return tuple(order)


class Driver:
    """Builds specs on demand while the interpreter runs."""

    def __init__(self, library: Library, root: str, policy: Policy, prepare: Prepare) -> None:
        self.library = library
        self.root_name = library.canonical(root)
        self.home = self.root_name.rpartition(".")[0]
        self.policy = policy
        self.prepare = prepare
        self.prepared: dict[str, Definition] = {}
        self.flat: dict[str, Definition] = {}
        self.setting: dict[str, cst.Call | None] = {}
        self.sites: dict[int, dict[str, Value]] = {}
        self.specs: dict[Key, Spec] = {}
        self.site_keys: dict[int, Key] = {}
        self.constructed: set[int] = set()
        self.record = Record()
        self.processors: dict[Key, str | None] = {}
        self.forward_names: dict[int, dict[str, str]] = {}

    def run(self) -> Model:
        """Interpret until arguments, calls and results no longer widen; the last run's record is the answer."""
        definition = self._definition(self.root_name)
        flat = self._flattened(definition)
        root = Spec((self.root_name,), self.root_name, replace(flat, node=pruned(flat.node)))
        self.specs[root.key] = root
        before: object = None
        for _ in range(ROUNDS):
            self.record = Record()
            self.constructed = set()
            interpreter = Interpreter(self.record, self.build, self.policy.constants)
            self._root_parameters(root)
            self.constructed.add(id(root))
            interpreter.construct(root)
            interpreter.call_method(root, "forward", self._forward_parameters(root))
            after = self._state()
            if after == before:
                break
            before = after
        return Model(self.library, root, self.specs, self.record)

    def _state(self) -> object:
        return (
            {k: {n: repr(v) for n, v in s.init.items()} for k, s in self.specs.items()},
            {k: {m: {n: repr(v) for n, v in c.items()} for m, c in s.calls.items()} for k, s in self.specs.items()},
            {k: {n: repr(v) for n, v in s.attributes.items()} for k, s in self.specs.items()},
        )

    # -- root --------------------------------------------------------------------------------------------------------
    def _root_parameters(self, root: Spec) -> None:
        init = root.method("__init__")
        if init is None:
            raise PorterError(Diagnostic("PORT102", f"{root.qualified} has no constructor"))
        tested = tested_for_none(root.definition.node)
        root.init = {p.name.value: TOP if p.name.value in tested else declared(p) for p in tree.parameters(init)[1:]}

    def _forward_parameters(self, root: Spec) -> dict[str, Value]:
        forward = root.method("forward")
        if forward is None:
            raise PorterError(Diagnostic("PORT102", f"{root.qualified} has no forward"))
        values: dict[str, Value] = {}
        tested = tested_for_none(forward)
        for param in tree.parameters(forward)[1:]:
            name = param.name.value
            values[name] = NONE if name in self.policy.refused else TOP if name in tested else declared(param)
        return values

    # -- classes -----------------------------------------------------------------------------------------------------
    def build(self, call: cst.Call, name: str, bind: Bind, interpreter: Interpreter) -> Value:
        """Value of a call of a global name that is not torch's."""
        name = self.library.canonical(name)
        if name in self.policy.outcomes:
            bind(None)
            return Const(self.policy.outcomes[name])
        if not self.library.is_class(name):
            bind(None)
            return TOP
        if not self.library.is_torch_module(name):
            bind(None)
            return Opaque(name)
        if not self._is_copied(name):
            bind(None)
            return Opaque(name)
        definition = self._definition(name)
        # A constructor of `*args, **kwargs` takes its base's parameters: only the flattened class shows them.
        init = _inherited_method(self._flattened(definition), self._base_definitions(definition), "__init__")
        labels = [p.name.value for p in tree.parameters(init)[1:]] if init is not None else []
        given = bind(labels) or {}
        defaults = {p.name.value: p.default for p in tree.parameters(init)[1:]} if init is not None else {}
        arguments = {
            label: given[label] if label in given
            else interpreter.eval(defaults[label], {}) if defaults.get(label) is not None else GIVEN
            for label in labels
        }  # fmt: skip
        site = self.sites.setdefault(id(call), dict(arguments))
        for label, value in arguments.items():
            site[label] = join(site[label], value) if label in site else value
        spec = self._spec(name, definition, site, interpreter)
        self.record.constructors[id(call)] = spec
        for label, value in site.items():
            spec.init[label] = join(spec.init[label], value) if label in spec.init else value
        if id(spec) not in self.constructed:
            self.constructed.add(id(spec))
            interpreter.construct(spec)
        return Instance(spec)

    def _is_copied(self, name: str) -> bool:
        return name.startswith(self.home + ".") or self.policy.copies(name)

    def _spec(self, name: str, definition: Definition, site: dict[str, Value], interpreter: Interpreter) -> Spec:
        definition = self._flattened(definition)
        holds_processor = self.setting[name] is not None
        shared = not name.startswith(self.home + ".")
        key: Key = (name, structural(site)) if shared or holds_processor else (name,)
        if key not in self.specs:
            # Which methods other classes call is known only in the end; a shared container is pruned, it is large.
            node = pruned(definition.node) if shared and not holds_processor else definition.node
            if any(s.qualified == name for s in self.specs.values()):
                node = tree.clone(node)  # facts are kept by node, so specs may not share nodes
            spec = Spec(key, name, replace(definition, node=node))
            if holds_processor:
                processor = self._processor(spec, site)
                spec.processor = processor
                strategy = self._definition(processor)
                merged = processors.materialise(spec.definition, strategy, self.library)
                clash = any(s.processor == processor for s in self.specs.values())
                node = pruned(merged.node)  # only now is known which methods the processor calls
                spec.definition = replace(merged, node=tree.clone(node) if clash else node)
            self.specs[key] = spec
        return self.specs[key]

    def _processor(self, spec: Spec, site: dict[str, Value]) -> str:
        """The processor class a container ends up with, found by running its constructor."""
        probe = Spec(spec.key, spec.qualified, spec.definition, init=dict(site))
        call = processors.sets_processor(spec.definition)
        assert call is not None
        record = Record()
        Interpreter(record, lambda c, n, b, i: self._probe(n, b)).construct(probe)
        value = record.constants.get(id(call.args[0].value))
        if not isinstance(value, Opaque):
            default = probe.class_attribute("_default_processor_cls")
            name = default.value.replace("\u00b7", ".") if isinstance(default, cst.Name) else None
            if name is None:
                raise PorterError(
                    Diagnostic(
                        "PORT310",
                        f"cannot tell which processor {spec.qualified} uses",
                        self.library.span(spec.qualified),
                    )
                )
            return self.library.canonical(name)
        return value.cls

    def _probe(self, name: str, bind: Bind) -> Value:
        bind(None)
        return Opaque(self.library.canonical(name)) if self.library.is_class(name) else TOP

    def _definition(self, name: str) -> Definition:
        if name not in self.prepared:
            found = self.library.definition(name)
            if isinstance(found, Unknown):
                raise PorterError(Diagnostic("PORT103", found.reason))
            self.prepared[name] = self.prepare(found)
        return self.prepared[name]

    def _base_definitions(self, definition: Definition) -> tuple[Definition, ...]:
        """Base classes with model code of their own (mixins of Diffusers' infrastructure have none)."""
        name = f"{definition.module}.{definition.name}"
        found = []
        for base in self.library.ancestors(name):
            if self.policy.copies(base) and self.library.is_class(base):
                found.append(self._definition(base))
        return tuple(found)

    def _flattened(self, definition: Definition) -> Definition:
        """The class with what it inherits from model classes copied in: its own methods win, `super().m()` becomes a call
        of the base's method under a name of its own."""
        name = f"{definition.module}.{definition.name}"
        if name not in self.flat:
            node = definition.node
            assert isinstance(node, cst.ClassDef)
            for base in self._base_definitions(definition):
                node = _with_base(node, base, self.library.is_torch_module(f"{base.module}.{base.name}"))
            self.flat[name] = replace(definition, node=node)
            self.setting[name] = processors.sets_processor(self.flat[name])
        return self.flat[name]


def _with_base(node: cst.ClassDef, base: Definition, torch_module: bool) -> cst.ClassDef:
    have = {i.name.value for i in node.body.body if isinstance(i, cst.FunctionDef)}
    attributes = {tree.code(t.target) for i in node.body.body for t in tree.find(i, cst.AssignTarget)
                  if isinstance(i, cst.SimpleStatementLine)}  # fmt: skip
    edits: list[tuple[cst.CSTNode, object]] = []
    renamed: set[str] = set()
    mine = absolute(f"{base.module}.{base.name}")
    for call in tree.find(node, cst.Call):
        target = call.func
        if isinstance(target, cst.Attribute) and tree.call_name(target.value) == "super":
            name = target.attr.value
            skipped = target.value.args[:1]  # `super(Base, self)` looks behind Base
            if skipped and isinstance(skipped[0].value, cst.Name) and skipped[0].value.value == mine:
                edits.append((target.value, target.value.with_changes(args=[])))
            elif tree.method(base.node, name) is not None:
                renamed.add(name)
                edits.append((target, tree.expression(f"self.{_inherited_name(base, name)}")))
    node = _with_signature(tree.replace_nodes(node, edits), base, renamed)
    extra: list[cst.BaseStatement] = []
    for item in base.node.body.body:
        if isinstance(item, cst.FunctionDef):
            if item.name.value in renamed:
                extra.append(tree.clone(item.with_changes(name=cst.Name(_inherited_name(base, item.name.value)))))
            elif item.name.value not in have:
                extra.append(tree.clone(item))
        elif not torch_module:
            continue  # settings of a mixin that manages processors
        elif isinstance(item, cst.SimpleStatementLine) and isinstance(item.body[0], (cst.Assign, cst.AnnAssign)):
            names = {tree.code(t.target) for t in tree.find(item, cst.AssignTarget)}
            if not names & attributes:
                extra.insert(0, tree.clone(item))
    bases = [b for b in node.bases if not (isinstance(b.value, cst.Name) and b.value.value == mine)]
    bases = bases or [cst.Arg(cst.Name(absolute("torch.nn.Module")))]
    keeps = {b.value.value for b in bases if isinstance(b.value, cst.Name)}
    bases += (
        []
        if not torch_module
        else [tree.clone(b) for b in base.node.bases if not (isinstance(b.value, cst.Name) and b.value.value in keeps)]
    )
    if bases:
        bases = [*bases[:-1], bases[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]
    return node.with_changes(bases=bases, body=node.body.with_changes(body=[*node.body.body, *extra]))


def _with_signature(node: cst.ClassDef, base: Definition, names: set[str]) -> cst.ClassDef:
    """Methods that hand `*args, **kwargs` on to the base take the base's parameters and pass them by name."""
    edits: list[tuple[cst.CSTNode, object]] = []
    for name in names:
        own, theirs = tree.method(node, name), tree.method(base.node, name)
        if own is None or theirs is None or len(tree.parameters(own)) != 1:
            continue
        if not isinstance(own.params.star_kwarg, cst.Param):
            continue
        labels = [p.name.value for p in tree.parameters(theirs)[1:]]
        passed = [tree.keyword_argument(label, cst.Name(label)) for label in labels]
        for call in tree.find(own.body, cst.Call):
            if tree.call_name(call) == f"self.{_inherited_name(base, name)}":
                edits.append((call, call.with_changes(args=passed)))
        edits.append((own.params, tree.clone(theirs.params)))
    return tree.replace_nodes(node, edits)


def _inherited_name(base: Definition, name: str) -> str:
    return f"_{base.name.lower()}_{name.strip('_')}"


def pruned(node: cst.ClassDef) -> cst.ClassDef:
    """The class without methods that construction and forward cannot reach."""
    methods = {i.name.value: i for i in node.body.body if isinstance(i, cst.FunctionDef)}
    reached: set[str] = set()
    pending = [n for n, m in methods.items() if n in ("__init__", "forward") or m.decorators]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [
                a.attr.value for a in tree.find(methods[name], cst.Attribute)
                if isinstance(a.value, cst.Name) and a.value.value == "self" and a.attr.value in methods
            ]  # fmt: skip
    body = [i for i in node.body.body if not isinstance(i, cst.FunctionDef) or i.name.value in reached]
    return node.with_changes(body=node.body.with_changes(body=body))


def _inherited_method(definition: Definition, bases: tuple[Definition, ...], name: str) -> cst.FunctionDef | None:
    for each in (definition, *bases):
        found = tree.method(each.node, name)
        if found is not None:
            return found
    return None


def tested_for_none(node: cst.CSTNode) -> set[str]:
    """Names compared with None, also as `self.x` or `self.config.x`: the source expects None whatever it declares."""
    found: set[str] = set()
    for test in tree.find(node, cst.Comparison):
        operands = [test.left, *(c.comparator for c in test.comparisons)]
        if any(isinstance(o, cst.Name) and o.value == "None" for o in operands):
            found |= {o.value for o in operands if isinstance(o, cst.Name)}
            found |= {o.attr.value for o in operands if isinstance(o, cst.Attribute)}
    return found - {"None"}


def declared(param: cst.Param) -> Value:
    """What a parameter's annotation and default promise: a value, or possibly None."""
    if param.default is not None and isinstance(param.default, cst.Name) and param.default.value == "None":
        return TOP
    if param.annotation is not None:
        for name in tree.find(param.annotation.annotation, cst.Name):
            if name.value == "None" or name.value.endswith("Optional"):
                return TOP
        return GIVEN
    return GIVEN if param.default is not None else TOP
