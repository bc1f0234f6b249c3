"""Write the specialised classes: dead branches out, constants in, lost parameters gone from signatures and calls."""

from __future__ import annotations

import libcst as cst
from msgspec.structs import replace

from porter.model import Definition
from porter.source import tree
from porter.specialise import tidy
from porter.specialise.liveness import Liveness, methods
from porter.specialise.model import Model
from porter.specialise.program import Record, Spec
from porter.specialise.values import Const

Edits = list[tuple[cst.CSTNode, object]]


def fold(model: Model, names: dict[int, str]) -> tuple[Definition, ...]:
    """Definitions of all classes the root reaches, in order of use. `names` gives each spec its class name."""
    live = Liveness.of(model)
    external = frozenset(
        n.attr.value
        for spec in live.specs
        for n in tree.find(spec.definition.node, cst.Attribute)
        if not (isinstance(n.value, cst.Name) and n.value.value == "self")
    )
    return tuple(_fold_class(spec, live, names, external) for spec in live.specs)


def _fold_class(spec: Spec, live: Liveness, names: dict[int, str], external: frozenset[str]) -> Definition:
    node = spec.definition.node
    assert isinstance(node, cst.ClassDef)
    kept = dict(methods(spec, live.model))
    edits: Edits = []
    for item in node.body.body:
        if not isinstance(item, cst.FunctionDef):
            continue
        if item.name.value not in kept:
            edits.append((item, cst.RemoveFromParent()))
            continue
        edits += _fold_method(spec, item, live, names)
    folded = tree.replace_nodes(node, edits).with_changes(name=cst.Name(names[id(spec)]))
    if live.shared(spec):
        folded = _described(folded, spec)
    return replace(
        spec.definition, name=names[id(spec)], node=tidy.tidy_class(folded, spec is live.model.root, external)
    )


def _described(node: cst.ClassDef, spec: Spec) -> cst.ClassDef:
    """A docstring that speaks of this class; that of the shared one describes options which are gone."""
    stmts = tree.strip_docstring(list(node.body.body))
    origin = spec.qualified.rpartition(".")[2]
    text = f"`{origin}` of Diffusers as this model uses it"
    if spec.processor is not None:
        text += f", with `{spec.processor.rpartition('.')[2]}`"
    line = tree.statement(f'"""{text}."""')
    return node.with_changes(body=node.body.with_changes(body=[line, *stmts]))


def _fold_method(spec: Spec, method: cst.FunctionDef, live: Liveness, names: dict[int, str]) -> Edits:
    name = method.name.value
    edits: Edits = []
    record = live.model.record
    if spec.processor is not None and name == "forward" and not spec.variadic:
        rest = method.params.star_kwarg
        if isinstance(rest, cst.Param):
            edits.append((rest, cst.RemoveFromParent()))
    prologue: list[cst.BaseStatement] = []
    if spec is not live.model.root:
        seen = spec.init if name == "__init__" else spec.calls.get(name, {})
        read = {n.value for n in live.reads(spec, name, method) if type(n) is cst.Name}
        for param in tree.own_parameters(method):
            label = param.name.value
            if (id(spec), name, label) in live.removed:
                edits.append((param, cst.RemoveFromParent()))
                if label in read and not _assigned_first(tree.body(method), label, record):
                    value = seen[label]
                    constant = literal(value.value) if isinstance(value, Const) else cst.Dict([])
                    prologue.append(tree.statement(f"{label} = value", value=constant))
    if prologue:
        edits.append((method, _with_prologue(prologue)))
    elifs = {id(i.orelse) for i in tree.find(method.body, cst.If)}
    decided = (cst.If, cst.IfExp, cst.BooleanOperation, cst.Call, cst.SimpleStatementLine, cst.Name, cst.Attribute)
    for node in tree.find(method.body, *decided):
        kind = type(node)  # LibCST's classes are slow to ask with `isinstance`
        if kind is cst.Name or kind is cst.Attribute:
            if live.folds_to_literal(spec, name, node):
                value = record.constants[id(node)]
                assert isinstance(value, Const)
                edits.append((node, literal(value.value)))
        elif isinstance(node, cst.If):
            outcome = record.truth.get(id(node.test))
            if outcome is not None:
                edits.append((node, _fold_if(outcome, id(node) in elifs)))
        elif isinstance(node, cst.IfExp):
            outcome = record.truth.get(id(node.test))
            if outcome is not None:
                edits.append((node, _choose("body" if outcome else "orelse")))
        elif isinstance(node, cst.BooleanOperation):
            outcome = record.truth.get(id(node.left))
            if outcome is not None:
                edits.append((node, _choose("right" if outcome == isinstance(node.operator, cst.And) else "left")))
        elif isinstance(node, cst.Call):
            edits += _fold_call(node, live, names)
        elif isinstance(node, cst.SimpleStatementLine):
            if len(node.body) == 1 and live.dead(spec, name, node.body[0]):
                edits.append((node, cst.RemoveFromParent()))
    return edits


def _with_prologue(prologue: list[cst.BaseStatement]):  # noqa: ANN202
    def edit(updated: cst.FunctionDef) -> cst.FunctionDef:
        stmts = tree.body(updated)
        docstring = stmts[: len(stmts) - len(tree.strip_docstring(stmts))]
        return tree.with_body(updated, [*docstring, *prologue, *stmts[len(docstring) :]])

    return edit


def _assigned_first(stmts: list[cst.BaseStatement], name: str, record: Record) -> bool:
    """Whether control assigns `name` before anything reads it."""
    for stmt in stmts:
        if isinstance(stmt, cst.If) and record.truth.get(id(stmt.test)) is not None:
            branch = stmt if record.truth[id(stmt.test)] else stmt.orelse
            if isinstance(branch, cst.If) and branch is not stmt:
                if _assigned_first([branch], name, record):
                    return True
                continue
            if branch is not None and _assigned_first(tree.body(branch), name, record):
                return True
            continue
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) else None
        mentions = any(n.value == name for n in tree.find(stmt, cst.Name))
        if isinstance(small, cst.Assign) and isinstance(small.targets[0].target, cst.Name):
            if small.targets[0].target.value == name:
                return not any(n.value == name for n in tree.find(small.value, cst.Name))
        if mentions:
            return False
    return False


def _fold_if(outcome: bool, is_elif: bool):  # noqa: ANN202
    def edit(updated: cst.If):  # noqa: ANN202
        if outcome:
            if is_elif:
                return cst.Else(body=updated.body, leading_lines=updated.leading_lines)
            return cst.FlattenSentinel(_with_comments(updated.leading_lines, tree.body(updated)))
        other = updated.orelse
        if other is None:
            return cst.RemoveFromParent()
        if is_elif:
            return other
        if isinstance(other, cst.If):
            return other.with_changes(leading_lines=[*updated.leading_lines, *_comments(other.leading_lines)])
        return cst.FlattenSentinel(_with_comments(updated.leading_lines, tree.body(other)))

    return edit


def _comments(lines) -> list[cst.EmptyLine]:  # noqa: ANN001
    return [line for line in lines if line.comment is not None]


def _with_comments(lines, stmts: list[cst.BaseStatement]) -> list[cst.BaseStatement]:  # noqa: ANN001
    """Statements of a folded suite, under the comment that stood above the test."""
    if stmts and lines:
        own = getattr(stmts[0], "leading_lines", ())
        stmts = [stmts[0].with_changes(leading_lines=[*lines, *own]), *stmts[1:]]
    return stmts


def _choose(field: str):  # noqa: ANN202
    def edit(updated: cst.CSTNode):  # noqa: ANN202
        chosen = getattr(updated, field)
        lpar = getattr(updated, "lpar", ())
        if lpar and not chosen.lpar:
            return chosen.with_changes(lpar=lpar, rpar=updated.rpar)
        return chosen

    return edit


def _fold_call(call: cst.Call, live: Liveness, names: dict[int, str]) -> Edits:
    record = live.model.record
    target = record.constructors.get(id(call))
    kept = live.kept_arguments(call)
    callee = live.callee(call)
    edits: Edits = []
    if target is not None and id(target) in names:
        edits.append((call.func, cst.Name(names[id(target)])))
    if len(kept) != len(call.args):
        labels = callee[2] if callee else []
        edits.append((call, _drop_arguments([call.args.index(a) for a in kept], labels)))
    return edits


def _drop_arguments(indices: list[int], labels: list[str]):  # noqa: ANN202
    """Keep arguments by index; a positional one after a gap is passed by name."""

    def edit(updated: cst.Call) -> cst.Call:
        args: list[cst.Arg] = []
        for new, index in enumerate(indices):
            arg = updated.args[index]
            if arg.keyword is None and not arg.star and new != index and index < len(labels):
                arg = tree.keyword_argument(labels[index], arg.value)
            args.append(arg)
        if args:
            args[-1] = args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(args=args)

    return edit


def literal(value: object) -> cst.BaseExpression:
    """A constant as source text; small floats in the form people write."""
    if isinstance(value, float):
        text = repr(value)
        if "e-0" in text:
            text = text.replace("e-0", "e-")
        return tree.expression(text)
    if isinstance(value, str):
        return cst.SimpleString('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return tree.expression(repr(value))
