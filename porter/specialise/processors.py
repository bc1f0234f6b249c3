"""Attention processors become forwards.

Diffusers splits attention into a container that holds parameters and a processor, a strategy object whose `__call__`
receives the container. A port has one strategy, so the processor's `__call__` becomes the container's `forward`, with
the parameter that received the container renamed to `self`. Module functions that take the container become methods.
"""

from __future__ import annotations

import libcst as cst
from msgspec.structs import replace

from porter.model import Definition, Diagnostic, PorterError
from porter.source import tree
from porter.source.library import Library
from porter.source.names import qualified

STRATEGY = "processor\u00b7self"
"""Stands for the processor's own `self` until its reads are resolved; no source can spell it."""


def sets_processor(definition: Definition) -> cst.Call | None:
    """The `self.set_processor(x)` call of a container's construction: its own constructor's, else an inherited one's."""
    if not isinstance(definition.node, cst.ClassDef):
        return None
    found = [c for c in tree.find(definition.node, cst.Call) if tree.call_name(c) == "self.set_processor"]
    if not found:
        return None
    init = tree.method(definition.node, "__init__")
    own = {id(n) for n in tree.walk(init)} if init is not None else set()
    inherited = [
        c for c in found if any(id(c) in {id(n) for n in tree.walk(m)} for m in _constructors(definition.node))
    ]
    return next((c for c in found if id(c) in own), inherited[0] if inherited else None)


def _constructors(node: cst.ClassDef) -> list[cst.FunctionDef]:
    """Inherited constructors, which flattening keeps under names of their own."""
    return [i for i in node.body.body if isinstance(i, cst.FunctionDef) and i.name.value.endswith("_init")]


def materialise(owner: Definition, processor: Definition, library: Library) -> Definition:
    """The container with the processor's `__call__` as its `forward`.

    Raises PorterError (PORT312) when the processor has state of its own, which a container cannot adopt.
    """
    call = tree.method(processor.node, "__call__")
    forward = tree.method(owner.node, "forward")
    if call is None or forward is None:
        raise PorterError(Diagnostic("PORT310", f"{processor.name} has no __call__", library.span(_name(processor))))
    receiver = tree.parameters(call)[1].name.value
    strategy = tree.parameters(call)[0].name.value
    # Callers know the parameters under the container's names.
    passed = delegated(owner, processor)
    renamed = {theirs: ours for ours, theirs in passed.items() if ours != theirs}
    body = _rename(call, {receiver: "self", strategy: STRATEGY, **renamed})
    body = _without_strategy(body, processor, library)
    params = [p for p in body.params.params if p.name.value not in (STRATEGY,)]
    order = [p.name.value for p in tree.parameters(forward)]
    params = [params[0].with_changes(annotation=None), *sorted(params[1:], key=lambda p: _place(p, order))]
    body = body.with_changes(
        name=cst.Name("forward"),
        params=body.params.with_changes(params=params, star_arg=cst.MaybeSentinel.DEFAULT, star_kwarg=_rest(forward)),
        decorators=[],
    )
    node = owner.node
    assert isinstance(node, cst.ClassDef)
    items = [body if item is forward else item for item in node.body.body]
    node = node.with_changes(body=node.body.with_changes(body=items))
    node = _remove_setting(node)
    return methodise(replace(owner, node=node), library)


def delegated(owner: Definition, processor: Definition) -> dict[str, str]:
    """Parameter of the container's forward -> parameter of the processor it is passed to."""
    forward, call = tree.method(owner.node, "forward"), tree.method(processor.node, "__call__")
    assert forward is not None and call is not None
    labels = [p.name.value for p in tree.parameters(call)[1:]]
    for site in tree.find(forward, cst.Call):
        if tree.call_name(site) == "self.processor":
            bound = tree.arguments(site.with_changes(args=[a for a in site.args if not a.star]), labels) or {}
            return {v.value: k for k, v in bound.items() if isinstance(v, cst.Name) and v.value != "self"}
    return {}


def _rest(forward: cst.FunctionDef) -> cst.Param | None:
    """The container's `**kwargs`: it lets options pass that its processor has no use for."""
    rest = forward.params.star_kwarg
    return rest.with_changes(annotation=None, comma=cst.MaybeSentinel.DEFAULT) if isinstance(rest, cst.Param) else None


def _place(param: cst.Param, order: list[str]) -> int:
    """Position of a parameter: as the container declares it, the processor's own last."""
    return order.index(param.name.value) if param.name.value in order else len(order)


def _name(definition: Definition) -> str:
    return f"{definition.module}.{definition.name}"


def _rename(function: cst.FunctionDef, names: dict[str, str]) -> cst.FunctionDef:
    """The function with other names for its variables, in nodes of its own."""
    function = tree.clone(function)
    labels = {id(n.attr) for n in tree.find(function, cst.Attribute)}
    labels |= {id(n.keyword) for n in tree.find(function, cst.Arg)}
    edits: list[tuple[cst.CSTNode, object]] = [
        (n, n.with_changes(value=names[n.value]))
        for n in tree.find(function, cst.Name)
        if n.value in names and id(n) not in labels
    ]
    edits += [
        (p, lambda new: new.with_changes(comma=cst.MaybeSentinel.DEFAULT)) for p in tree.find(function, cst.Param)
    ]
    return tree.replace_nodes(function, edits)


def _without_strategy(body: cst.FunctionDef, processor: Definition, library: Library) -> cst.FunctionDef:
    """Reads of the processor's own attributes: class attributes become their values, backend settings None."""
    edits: list[tuple[cst.CSTNode, object]] = []
    for node in tree.find(body, cst.Attribute):
        if not (isinstance(node.value, cst.Name) and node.value.value == STRATEGY):
            continue
        name = node.attr.value
        if name in ("_attention_backend", "_parallel_config"):
            edits.append((node, cst.Name("None")))
            continue
        constant = _class_constant(processor, name)
        if constant is None:
            raise PorterError(
                Diagnostic("PORT312", f"{processor.name} keeps state ({name})", library.span(_name(processor)))
            )
        edits.append((node, constant))
    body = tree.replace_nodes(body, edits)
    # Handed on as a whole it can only be asked for backend settings, which are the engine's.
    rest = [(n, cst.Name("None")) for n in tree.find(body.body, cst.Name) if n.value == STRATEGY]
    return tree.replace_nodes(body, rest)


def _class_constant(processor: Definition, name: str) -> cst.BaseExpression | None:
    for item in processor.node.body.body:
        if isinstance(item, cst.SimpleStatementLine) and isinstance(item.body[0], cst.Assign):
            target = item.body[0].targets[0].target
            if isinstance(target, cst.Name) and target.value == name:
                return item.body[0].value
    return None


def _remove_setting(node: cst.ClassDef) -> cst.ClassDef:
    """Drop `self.set_processor(...)`; what it leaves dead is folded away later."""
    edits: list[tuple[cst.CSTNode, object]] = []
    for line in tree.find(node, cst.SimpleStatementLine):
        for small in line.body:
            if isinstance(small, cst.Expr) and tree.call_name(small.value) == "self.set_processor":
                edits.append((line, cst.RemoveFromParent()))
    return tree.replace_nodes(node, edits)


def methodise(owner: Definition, library: Library) -> Definition:
    """Module functions called with the container as first argument become methods, transitively."""
    node = owner.node
    done: dict[str, str] = {}
    while True:
        calls = [c for c in tree.find(node, cst.Call) if _takes_self(c, library)]
        if not calls:
            break
        added: list[cst.FunctionDef] = []
        edits: list[tuple[cst.CSTNode, object]] = []
        for call in calls:
            assert isinstance(call.func, cst.Name)
            name = qualified(call.func.value) or ""
            short = name.rpartition(".")[2]
            if name not in done:
                function = library.definition(name)
                assert isinstance(function, Definition) and isinstance(function.node, cst.FunctionDef)
                first = function.node.params.params[0]
                method = _rename(function.node, {first.name.value: "self"})
                params = [method.params.params[0].with_changes(annotation=None), *method.params.params[1:]]
                added.append(tree.clone(method.with_changes(params=method.params.with_changes(params=params))))
                done[name] = short
            edits.append((call, _as_method(call, short)))
        node = tree.replace_nodes(node, edits)
        node = node.with_changes(body=node.body.with_changes(body=[*node.body.body, *added]))
    return replace(owner, node=node)


def _as_method(call: cst.Call, name: str):  # noqa: ANN202
    def edit(updated: cst.Call) -> cst.Call:
        return updated.with_changes(func=cst.Attribute(cst.Name("self"), cst.Name(name)), args=updated.args[1:])

    return edit


def _takes_self(call: cst.Call, library: Library) -> bool:
    if not call.args or not isinstance(call.func, cst.Name):
        return False
    first = call.args[0].value
    name = qualified(call.func.value)
    if name is None or not (isinstance(first, cst.Name) and first.value == "self") or call.args[0].keyword:
        return False
    entry = library.entry(library.canonical(name))
    return entry is not None and entry.kind == "FunctionDef"
