"""Which parameters, attributes and locals of a specialised model are still read once dead branches are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import libcst as cst

from porter.source import tree
from porter.specialise.model import Model
from porter.specialise.program import Spec
from porter.specialise.values import Const, Empty, Instance, Items, ListOf, OneOf, Opaque, Value

Slot = tuple[int, str, str]
"""(identity of a spec, method, parameter)."""

Reads = list[cst.Name | cst.Attribute]


def is_constant(value: Value | None) -> bool:
    return isinstance(value, (Const, Empty))


def holds_module(value: Value | None) -> bool:
    """Whether an attribute's value is or contains a module."""
    if isinstance(value, (Instance, Opaque, OneOf)):
        return True
    if isinstance(value, Items):
        return any(holds_module(v) for v in value.items) or not value.items
    return isinstance(value, ListOf) and holds_module(value.item)


@dataclass
class Liveness:
    """Fixed point of: a dead parameter takes its arguments with it, a dead attribute its value."""

    model: Model
    specs: list[Spec]
    removed: set[Slot] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    home: str = ""
    _reads: dict[tuple[int, str], Reads] = field(default_factory=dict)
    """What `reads` found for the present sets."""

    @classmethod
    def of(cls, model: Model) -> Liveness:
        live = cls(model, list(model.used), home=model.root.qualified.rpartition(".")[0])
        before = -1
        while before != len(live.removed):
            before = len(live.removed)
            known = -1
            while known != len(live.attributes):  # an attribute read only by a dead attribute's value is dead, too
                known = len(live.attributes)
                live._attributes()
            live._parameters()
        return live

    def shared(self, spec: Spec) -> bool:
        """Whether the class comes from outside the model's own file."""
        return not spec.qualified.startswith(self.home + ".")

    def _attributes(self) -> None:
        alive = {
            n.attr.value
            for spec in self.specs
            for name, method in methods(spec, self.model)
            for n in self.reads(spec, name, method)
            if type(n) is cst.Attribute
        }
        if alive != self.attributes:
            self.attributes = alive
            self._reads.clear()

    def _parameters(self) -> None:
        chosen = {id(s) for specs in self.model.record.choices.values() for s in specs}
        for spec in self.specs:
            if spec is self.model.root:
                continue
            for name, method in methods(spec, self.model):
                if name == "forward" and (id(spec) in chosen or spec.variadic):
                    continue  # called through a choice of classes, or with arguments in a dict: the signature stays
                read = {n.value for n in self.reads(spec, name, method) if type(n) is cst.Name}
                seen = spec.init if name == "__init__" else spec.calls.get(name, {})
                for param in tree.own_parameters(method):
                    label = param.name.value
                    slot = (id(spec), name, label)
                    value = seen.get(label)
                    constant = is_constant(value) and (self.shared(spec) or value == Const(None) or name != "__init__")
                    if (label not in read or constant) and slot not in self.removed:
                        self.removed.add(slot)
                        self._reads.clear()

    # -- reads -------------------------------------------------------------------------------------------------------
    def reads(self, spec: Spec, name: str, method: cst.FunctionDef) -> Reads:
        """Names and attributes in load position that survive folding in a method."""
        key = (id(spec), name)
        if key not in self._reads:
            found: Reads = []
            self._block(spec, name, tree.body(method), found)
            self._reads[key] = found
        return self._reads[key]

    def _block(self, spec: Spec, name: str, stmts: list[cst.BaseStatement], found: Reads) -> None:
        for stmt in stmts:
            self._statement(spec, name, stmt, found)
            if type(stmt) is cst.SimpleStatementLine and type(stmt.body[-1]) in (cst.Return, cst.Raise):
                return

    def _statement(self, spec: Spec, name: str, stmt: cst.CSTNode, found: Reads) -> None:
        if isinstance(stmt, cst.SimpleStatementLine):
            for small in stmt.body:
                if not self.dead(spec, name, small):
                    self._small(spec, name, small, found)
        elif isinstance(stmt, cst.If):
            outcome = self.model.record.truth.get(id(stmt.test), False)
            if outcome is None:
                self._expression(spec, name, stmt.test, found)
            if outcome is not False:
                self._block(spec, name, tree.body(stmt), found)
            if outcome is not True and stmt.orelse is not None:
                if isinstance(stmt.orelse, cst.If):
                    self._statement(spec, name, stmt.orelse, found)
                else:
                    self._block(spec, name, tree.body(stmt.orelse), found)
        elif isinstance(stmt, (cst.For, cst.While)):
            self._expression(spec, name, stmt.iter if isinstance(stmt, cst.For) else stmt.test, found)
            self._block(spec, name, tree.body(stmt), found)
        elif isinstance(stmt, cst.With):
            for item in stmt.items:
                self._expression(spec, name, item.item, found)
            self._block(spec, name, tree.body(stmt), found)
        else:
            found += tree.find(stmt, cst.Name, cst.Attribute)

    def _small(self, spec: Spec, name: str, small: cst.CSTNode, found: Reads) -> None:
        if isinstance(small, cst.Assign):
            self._expression(spec, name, small.value, found)
            for target in small.targets:
                self._target(spec, name, target.target, found)
        elif isinstance(small, cst.AnnAssign):
            if small.value is not None:
                self._expression(spec, name, small.value, found)
        else:
            for child in tree.children(small):
                self._expression(spec, name, child, found)

    def _target(self, spec: Spec, name: str, target: cst.CSTNode, found: Reads) -> None:
        """Reads inside a target: `a[i].b = x` reads `a` and `i`."""
        if type(target) is cst.Name:
            return
        if isinstance(target, (cst.Tuple, cst.List)):
            for item in target.elements:
                self._target(spec, name, item.value, found)
        elif isinstance(target, cst.Attribute):
            self._expression(spec, name, target.value, found)
        else:
            self._expression(spec, name, target, found)

    def _expression(self, spec: Spec, name: str, node: Any, found: Reads) -> None:
        kind = type(node)  # LibCST's classes are slow to ask with `isinstance`
        if kind is cst.Name or kind is cst.Attribute:
            if not self.folds_to_literal(spec, name, node):
                found.append(node)
                if kind is cst.Attribute:
                    self._expression(spec, name, node.value, found)
        elif kind is cst.Call:
            self._expression(spec, name, node.func, found)
            for arg in self.kept_arguments(node):
                self._expression(spec, name, arg.value, found)
        else:
            for each in self._evaluated(node):
                self._expression(spec, name, each, found)

    def _evaluated(self, node: cst.CSTNode) -> Sequence[cst.CSTNode]:
        """Children of an expression; of one that is decided only the operand it comes to."""
        truth = self.model.record.truth
        if type(node) is cst.IfExp:
            outcome = truth.get(id(node.test))
            return [node.test, node.body, node.orelse] if outcome is None else [node.body if outcome else node.orelse]
        if type(node) is cst.BooleanOperation and truth.get(id(node.left)) is not None:
            return [node.right if truth[id(node.left)] == isinstance(node.operator, cst.And) else node.left]
        return tree.children(node)

    def folds_to_literal(self, spec: Spec, name: str, node: cst.CSTNode) -> bool:
        """Whether a read is replaced by the constant it always has."""
        value = self.model.record.constants.get(id(node))
        if not isinstance(value, Const):
            return False
        if type(node) is cst.Name:
            return (id(spec), name, node.value) in self.removed
        if tree.self_attribute(node) is None or spec is self.model.root or name == "__init__":
            return False
        return self.shared(spec) or value.value is None or isinstance(value.value, bool)

    def kept_arguments(self, call: cst.Call) -> list[cst.Arg]:
        """Arguments that stay when the callee has lost parameters."""
        bound = self.callee(call)
        kept = []
        position = 0
        for arg in call.args:
            if arg.star:
                if not self.model.record.empty_stars.get(id(arg), False):
                    kept.append(arg)
                continue
            if bound is not None:
                spec, method, labels = bound
                label = arg.keyword.value if arg.keyword else labels[position] if position < len(labels) else None
                position += 0 if arg.keyword else 1
                if label is not None and (id(spec), method, label) in self.removed:
                    continue
                if spec.processor is not None and method == "forward" and label is not None and label not in labels:
                    continue  # the container's **kwargs took it, the processor has no use for it
            kept.append(arg)
        return kept

    def callee(self, call: cst.Call) -> tuple[Spec, str, list[str]] | None:
        """Spec, method and parameter names a call goes to."""
        record = self.model.record
        spec, method = record.constructors.get(id(call)), "__init__"
        if spec is None:
            spec, method = record.calls.get(id(call), (None, ""))
        function = spec.method(method) if spec is not None else None
        if spec is None or function is None:
            return None
        return spec, method, [p.name.value for p in tree.own_parameters(function)]

    def dead(self, spec: Spec, name: str, small: cst.CSTNode) -> bool:
        """An assignment to an attribute nobody reads, of something that is not a module."""
        if not isinstance(small, cst.Assign) or spec is self.model.root:
            return False
        names = [tree.self_attribute(t.target) for t in small.targets]
        if not all(names):
            return False
        return all(
            n not in self.attributes
            and not holds_module(spec.attributes.get(n or ""))
            and not _is_parameter(small.value)
            for n in names
        )


def _is_parameter(value: cst.BaseExpression) -> bool:
    return isinstance(value, cst.Call) and isinstance(value.func, cst.Name) and value.func.value.endswith("Parameter")


def methods(spec: Spec, model: Model) -> list[tuple[str, cst.FunctionDef]]:
    """Methods that construction and forward reach."""
    found = []
    for item in spec.definition.node.body.body:
        if isinstance(item, cst.FunctionDef):
            name = item.name.value
            if name == "__init__" or name in spec.calls or item.decorators or spec is model.root:
                found.append((name, item))
    return found
