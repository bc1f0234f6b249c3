"""Attributes that a pipeline asks for and that Diffusers itself never gives it."""

from __future__ import annotations

from collections.abc import Iterable

import libcst as cst

from porter.facts.pipeline.members import Members
from porter.model import Unknown
from porter.source.library import Library
from porter.source.names import referenced
from porter.source.tree import body, find, self_attribute


def undefined(library: Library, members: Members, names: Iterable[str]) -> frozenset[str]:
    """Those of the names that no class of the pipeline's whole inheritance defines or sets."""
    left = set(names)
    queue = [f"{members.cls.module}.{members.cls.name}"]
    seen: set[str] = set()
    while queue and left:
        current = queue.pop(0)
        definition = library.definition(current) if current not in seen else Unknown("seen")
        seen.add(current)
        if isinstance(definition, Unknown) or not isinstance(definition.node, cst.ClassDef):
            continue
        left -= _defined(definition.node)
        queue += [b for a in definition.node.bases if (b := referenced(a.value)) and b.startswith("diffusers.")]
    return frozenset(left)


def asked_for(members: Members) -> frozenset[str]:
    """Names `x` of `getattr(self, "x", ...)` and `hasattr(self, "x")` in any method."""
    found: set[str] = set()
    for definition in members.classes:
        for call in find(definition.node, cst.Call):
            if isinstance(call.func, cst.Name) and call.func.value in ("getattr", "hasattr") and len(call.args) > 1:
                owner, name = call.args[0].value, call.args[1].value
                if isinstance(owner, cst.Name) and owner.value == "self" and isinstance(name, cst.SimpleString):
                    found.add(str(name.evaluated_value))
    return frozenset(found)


def _defined(cls: cst.ClassDef) -> set[str]:
    """Methods and attributes of a class, those set on `self` or registered by keyword included."""
    found = {m.name.value for m in body(cls) if isinstance(m, cst.FunctionDef)}
    for node in find(cls, cst.Assign, cst.AnnAssign, cst.Call):
        if isinstance(node, cst.Call):
            if self_attribute(node.func) in ("register_modules", "register_to_config"):
                found |= {a.keyword.value for a in node.args if a.keyword is not None}
            continue
        targets = [t.target for t in node.targets] if isinstance(node, cst.Assign) else [node.target]
        for target in targets:
            found |= {t.value for t in [target] if isinstance(t, cst.Name)}
            found |= {name for name in [self_attribute(target)] if name is not None}
    return found
