"""What code that reads the pipeline object gets where no model is loaded: from the checkpoint's json files."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence

import libcst as cst

from porter.facts.pipeline.components import Component
from porter.facts.pipeline.liveness import uses
from porter.facts.pipeline.members import Members, self_reads
from porter.model import Unknown
from porter.source.library import Library
from porter.source.names import DOT, dotted, qualified, referenced
from porter.source.tree import (
    body,
    children,
    code,
    expression,
    find,
    is_none,
    method,
    parameters,
    replace_nodes,
    self_attribute,
    strip_docstring,
    substitute,
)

INDEX = "model_index"
_NOISE = "rand"


class HostValues:
    """Reads of `self` as expressions over `model_index` and `<component>_config`, or why there is none.

    `own` are names that the constructor's own statements give, under the name that they have outside of an object;
    `functions` methods that read nothing of their object.
    """

    def __init__(
        self,
        library: Library,
        members: Members,
        components: Sequence[Component],
        own: Mapping[str, str],
        functions: Collection[str] = (),
    ) -> None:
        self.library, self.members, self.own, self.functions = library, members, own, functions
        self.components = {c.name: c for c in components}
        self._drawing: dict[str, bool] = {}

    def draws(self, name: str) -> bool:
        """Whether an absolute name is a function that draws noise, or calls such a one directly."""
        if _NOISE in name.rpartition(DOT)[2]:
            return True
        target = qualified(name)
        if target is None or not target.startswith("diffusers.pipelines."):
            return False
        if target not in self._drawing:
            found = self.library.definition(target)
            self._drawing[target] = not isinstance(found, Unknown) and draws_noise(found.node)
        return self._drawing[target]

    def expression(self, node: cst.CSTNode) -> cst.CSTNode | Unknown:
        """The node with every read of `self` replaced."""
        edits: list[tuple[cst.CSTNode, object]] = [
            (call, new) for call in find(node, cst.Call) if (new := self._class_question(call)) is not None
        ]
        node, edits = replace_nodes(node, edits), []
        for chain, compared in self_chains(node):
            new = self._chain(chain, compared)
            if isinstance(new, Unknown):
                return new
            edits.append((chain, new))
        return replace_nodes(node, edits)

    def _class_question(self, call: cst.Call) -> cst.BaseExpression | None:
        """`isinstance(self.x, Cls)` of a component: model_index.json names the class that is loaded."""
        if not isinstance(call.func, cst.Name) or call.func.value != "isinstance" or len(call.args) != 2:
            return None
        name, asked = self_attribute(call.args[0].value) or "", call.args[1].value
        given = [e.value for e in asked.elements] if isinstance(asked, cst.Tuple) else [asked]
        classes = [c.rpartition(".")[2] for g in given if (c := referenced(g)) is not None]
        if name not in self.components or not self.components[name].loads or len(classes) != len(given):
            return None
        entry = f'{INDEX}.get("{name}", [None, None])[1]' if self.components[name].optional else f'{INDEX}["{name}"][1]'
        return expression(f'{entry} == "{classes[0]}"' if len(classes) == 1 else f"{entry} in {tuple(classes)!r}")

    def _chain(self, chain: cst.BaseExpression, compared: bool) -> cst.BaseExpression | Unknown:
        path = (dotted(chain) or "self").split(".")[1:]
        if not path:
            return Unknown("the pipeline object itself is passed on")
        name, rest = path[0], path[1:]
        if name in self.own:
            return _attributes(cst.Name(self.own[name]), rest)
        component = self.components.get(name)
        if component is not None and not component.loads:
            return _attributes(expression(f'{INDEX}.get("{name}", {component.default})'), rest)
        if component is not None:
            return self._of_component(component, rest, compared)
        if self.members.class_statement(name) is not None:
            return _attributes(expression(f"{self.members.cls.name}.{name}"), rest)
        if name in self.functions:
            return expression(f"{self.members.cls.name}.{name}")
        if self.members.method(name) is not None:
            return Unknown(f"self.{name} is a method")
        return Unknown(f"self.{name} is known to the worker only")

    def _of_component(self, component: Component, rest: list[str], compared: bool) -> cst.BaseExpression | Unknown:
        name = component.name
        if not rest:
            if compared:
                return expression(f'{INDEX}.get("{name}", [None])[0]')
            return Unknown(f"self.{name} is loaded by the worker")
        if rest[0] == "config":
            if len(rest) == 1 or rest[1] == "get":
                return _attributes(cst.Name(f"{name}_config"), rest[1:])
            return _attributes(self._setting(component, rest[1]), rest[2:])
        value = self._attribute(component, rest[0])
        return value if isinstance(value, Unknown) else _attributes(value, rest[1:])

    def _setting(self, component: Component, key: str) -> cst.BaseExpression:
        """One entry of a component's config.json; an entry that an older file lacks has the default of the class."""
        defaults = {self._default(c, key) for c in component.classes}
        default = defaults.pop() if len(defaults) == 1 else None
        config = f"{component.name}_config"
        return expression(f'{config}["{key}"]' if default is None else f'{config}.get("{key}", {default})')

    def _default(self, cls: str, key: str) -> str | None:
        init = self._init(cls)
        found = next((p.default for p in parameters(init) if p.name.value == key), None) if init is not None else None
        try:
            return repr(ast.literal_eval(code(found))) if found is not None else None
        except (ValueError, SyntaxError):
            return None

    def _attribute(self, component: Component, name: str) -> cst.BaseExpression | Unknown:
        """An attribute that the class's constructor computes from nothing but its parameters."""
        init = self._init(component.classes[0]) if component.classes else None
        worker = Unknown(f"self.{component.name}.{name} belongs to the loaded model")
        if init is None:
            return worker
        known = {p.name.value for p in parameters(init)[1:]}
        assigns = [a for s in strip_docstring(body(init)) for a in find(s, cst.Assign)]
        values = [a.value for a in assigns if any(self_attribute(t.target) == name for t in a.targets)]
        if len(values) != 1 or uses(values[0]) - known or self_reads(values[0]):
            return worker
        holes = {n: self._setting(component, n) for n in uses(values[0])}
        new = substitute(values[0], holes)
        return new if isinstance(new, cst.BaseExpression) else worker

    def _init(self, cls: str) -> cst.FunctionDef | None:
        definition = self.library.definition(cls)
        if isinstance(definition, Unknown) or not isinstance(definition.node, cst.ClassDef):
            return None
        return method(definition.node, "__init__")


def draws_noise(node: cst.CSTNode) -> bool:
    """Whether a function of another module that draws noise is named below a node."""
    return any(DOT in n.value and _NOISE in n.value.rpartition(DOT)[2] for n in find(node, cst.Name))


def self_chains(node: cst.CSTNode, compared: bool = False) -> list[tuple[cst.BaseExpression, bool]]:
    """Each longest `self.x.y` below a node, and whether it is only compared with None."""
    if isinstance(node, cst.Name):
        return [(node, False)] if node.value == "self" else []
    if isinstance(node, cst.Attribute) and (dotted(node) or "").startswith("self."):
        return [(node, compared)]
    if isinstance(node, cst.Attribute):
        return self_chains(node.value)
    if isinstance(node, (cst.Arg, cst.Param)):  # keywords are no reads
        inner = node.value if isinstance(node, cst.Arg) else node.default
        return self_chains(inner) if inner is not None else []
    plain = isinstance(node, cst.Comparison) and all(is_none(c.comparator) for c in node.comparisons)
    return [found for child in children(node) for found in self_chains(child, plain)]


def _attributes(value: cst.BaseExpression, names: Sequence[str]) -> cst.BaseExpression:
    for name in names:
        value = cst.Attribute(value, cst.Name(name))
    return value
