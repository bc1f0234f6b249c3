"""Masks of which the layers do without where nothing is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import libcst as cst
from msgspec import Struct

from porter.engine.registry import FactSite, fact
from porter.facts.key_bias import Variable
from porter.facts.masks import metadata_names, variables
from porter.facts.module_calls import Calls, module_calls
from porter.facts.module_tree import module_tree
from porter.model import Unit
from porter.source import tree
from porter.source.names import absolute

VALID_KEYS = absolute("porter_template.valid_keys")
VALID_FIRST = absolute("porter_template.valid_first")
KEY_PADDING_MASK = absolute("porter_template.key_padding_mask")
MASK_IF_PADDED = absolute("porter_template.mask_if_padded")
_SAME = frozenset({"to", "bool", "view", "reshape", "expand", "unsqueeze", "repeat", "transpose", "contiguous"})


@fact("unpadded_mask", fields=["mask"])
def unpadded_masks(unit: Unit) -> Iterator[FactSite]:
    """Loops of the root before which a mask can give way to None if all of it is true.

    From the loop on, the mask is only handed to layers, and those hand it on, or give it to attention if it is not None, in a
    form that is true where it is.
    """
    forwards: dict[str, cst.FunctionDef] = {}
    for definition in unit.definitions:
        forward = tree.method(definition.node, "forward") if isinstance(definition.node, cst.ClassDef) else None
        if forward is not None:
            forwards[definition.name] = forward
    root = forwards.get(unit.root)
    if root is None:
        return
    calls = module_calls(forwards, module_tree(unit))
    neutral = _neutral(unit.root, forwards, calls)
    body = tree.body(root)
    names = sorted({n.value for stmt in body for n in tree.find(stmt, cst.Name)} - {"self", "None"})
    for name in names:
        handed = {id(value) for value, target in calls.given(unit.root, name) if target in neutral}
        start = next(
            (
                i
                for i, s in enumerate(body)
                if isinstance(s, cst.For) and any(id(n) in handed for n in tree.find(s, cst.Name))
            ),
            None,
        )
        if start is None or _settled(root, name):
            continue
        used = [n for stmt in body[start:] for n in variables(stmt) if n.value == name]
        if all(id(n) in handed for n in used):
            yield FactSite(body[start], unit.root, {"mask": used[0]})


def _settled(root: cst.FunctionDef, name: str) -> bool:
    """Whether the variable has been asked already, or is the result of arithmetic: something to add to scores."""
    return any(
        isinstance(a.value, cst.BinaryOperation) or tree.call_name(a.value) in (KEY_PADDING_MASK, MASK_IF_PADDED)
        for a in tree.find(root.body, cst.Assign)
        if any(isinstance(t.target, cst.Name) and t.target.value == name for t in a.targets)
    )


def _neutral(root: str, forwards: Mapping[str, cst.FunctionDef], calls: Calls) -> set[Variable]:
    """Parameters for which None does what a mask does that is true everywhere; one of them reaches attention at least."""
    found = {(c, p.name.value) for c, f in forwards.items() if c != root for p in tree.own_parameters(f)}
    read = {c: _Forward.of(f) for c, f in forwards.items() if c != root}
    while True:
        refuted = {(c, n) for c, n in found if not _Use(read[c], c, n, found, calls).neutral()}
        if not refuted:
            break
        found -= refuted
    reaching: set[Variable] = {(c, n) for c, n in found if _Use(read[c], c, n, found, calls).attends()}
    while more := {(c, n) for c, n in found - reaching if any(t in reaching for _, t in calls.given(c, n))}:
        reaching |= more
    return reaching


class _Forward(Struct, frozen=True):
    """What is asked of a forward for each of its parameters."""

    body: list[cst.BaseStatement]
    variables: list[cst.Name]
    assigns: list[cst.Assign]
    attends: Mapping[str, set[int]]
    """Names in what attention is given, by the mask that it is given."""
    allowed: frozenset[int]
    """Names whose use is of no consequence."""

    @classmethod
    def of(cls, node: cst.FunctionDef) -> _Forward:
        first = [c for c in tree.find(node.body, cst.Call) if tree.call_name(c) == VALID_FIRST]
        return cls(
            tree.body(node), list(variables(node.body)), list(tree.find(node.body, cst.Assign)), metadata_names(node),
            frozenset(id(c.args[1].value) for c in first),
        )  # fmt: skip


class _Use:
    """What one forward does with a parameter that may be a mask."""

    def __init__(self, forward: _Forward, cls: str, name: str, found: set[Variable], calls: Calls) -> None:
        self.forward, self.cls, self.name = forward, cls, name
        self.found, self.calls = found, calls
        self.masks = {name}
        self.allowed: set[int] = set()

    def attends(self) -> bool:
        """Whether attention of the class itself takes it."""
        return self.neutral() and any(self.forward.attends.get(m) for m in self.masks)

    def neutral(self) -> bool:
        """Whether every use is known, and of no consequence where the mask is true everywhere."""
        for stmt in self.forward.body:
            if not self._statement(stmt):
                return False
        for mask in self.masks:
            self.allowed |= self.forward.attends.get(mask, set())
            self.allowed |= {id(value) for value, target in self.calls.given(self.cls, mask) if target in self.found}
        self.allowed |= self.forward.allowed
        return all(id(n) in self.allowed for n in self.forward.variables if n.value in self.masks)

    def _statement(self, stmt: cst.BaseStatement) -> bool:
        """Follow one statement; False if it makes another thing of the mask."""
        if isinstance(stmt, cst.If) and tree.code(stmt.test) in {f"{m} is not None" for m in self.masks}:
            return stmt.orelse is None and self._guarded(stmt)
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 else None
        target = small.targets[0].target if isinstance(small, cst.Assign) and len(small.targets) == 1 else None
        if isinstance(small, cst.Assign) and isinstance(target, cst.Name):
            if tree.call_name(small.value) == VALID_KEYS and self._true(small.value.args[0].value):  # type: ignore[attr-defined]
                self._takes(target, small.value)
            elif target.value in self.masks:
                return False
        return True

    def _guarded(self, stmt: cst.If) -> bool:
        """`if mask is not None:` makes other masks of it, which are None if it is; what else it stores stays inside."""
        stored: set[str] = set()
        inner: set[str] = set()
        for line in tree.body(stmt):
            small = line.body[0] if isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1 else None
            if isinstance(small, cst.Assign) and len(small.targets) == 1:
                target = small.targets[0].target
                if isinstance(target, cst.Name) and self._true(small.value) and self._mask(small.value):
                    if target.value not in self.masks and not self._made(target.value):
                        inner.add(target.value)
                    self.masks.add(target.value)
                    self.allowed |= {id(n) for n in self._made(target.value)}
                    continue
                stored |= {n.value for n in tree.find(target, cst.Name)}
            elif not (isinstance(line, cst.If) and all(isinstance(s, cst.Raise) for s in _smalls(line))):
                return False
        self.masks -= inner
        inside = {id(n) for n in tree.find(stmt, cst.Name)}
        self.allowed |= inside
        left = [n.value for n in self.forward.variables if id(n) not in inside]
        return not stored & self.masks and not (stored | inner) & set(left)

    def _made(self, name: str) -> list[cst.Name]:
        """Targets of `name = None`."""
        return [
            t.target
            for a in self.forward.assigns
            for t in a.targets
            if isinstance(t.target, cst.Name) and t.target.value == name and tree.code(a.value) == "None"
        ]

    def _takes(self, target: cst.Name, value: cst.BaseExpression) -> None:
        self.masks.add(target.value)
        self.allowed |= {id(target)} | {id(n) for n in tree.find(value, cst.Name)}

    def _true(self, value: cst.BaseExpression) -> bool:
        """Whether an expression is true everywhere if the mask is."""
        if isinstance(value, cst.Name):
            return value.value in self.masks or self._ones(value)
        if isinstance(value, cst.Subscript):
            return self._true(value.value)
        if isinstance(value, cst.BinaryOperation):
            both = isinstance(value.operator, (cst.Multiply, cst.BitAnd))
            return both and self._true(value.left) and self._true(value.right)
        if not isinstance(value, cst.Call):
            return False
        name = tree.call_name(value)
        if name in (absolute("torch.cat"), absolute("torch.concat")):
            parts = getattr(value.args[0].value, "elements", ())
            return any(self._mask(e.value) for e in parts) and all(self._true(e.value) for e in parts)
        if name == absolute("torch.ones"):
            return True
        return isinstance(value.func, cst.Attribute) and value.func.attr.value in _SAME and self._true(value.func.value)

    def _mask(self, value: cst.BaseExpression) -> bool:
        return any(n.value in self.masks for n in tree.find(value, cst.Name))

    def _ones(self, name: cst.Name) -> bool:
        """A variable that is `torch.ones(...)`, assigned once."""
        made = [a.value for a in self.forward.assigns if any(tree.same(t.target, name) for t in a.targets)]
        return len(made) == 1 and tree.call_name(made[0]) == absolute("torch.ones")


def _smalls(stmt: cst.If) -> list[cst.CSTNode]:
    return [s for line in tree.body(stmt) for s in (line.body if isinstance(line, cst.SimpleStatementLine) else [line])]
