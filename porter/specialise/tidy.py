"""Clean-up after folding: unreachable statements, locals nobody reads, methods that are one expression long."""

from __future__ import annotations

from collections import Counter

import libcst as cst

from porter.source import tree


def tidy_class(node: cst.ClassDef, is_root: bool, external: frozenset[str] = frozenset()) -> cst.ClassDef:
    """Tidy every method, inline helper methods that are called once, repeat until nothing changes.

    `external` are attribute names that other classes read of their modules.
    """
    for _ in range(6):
        before = node
        node = _each_method(node, _truncate)
        node = inline_methods(node)
        node = inline_widths(node)
        node = _each_method(node, propagate_copies)
        node = _each_method(node, drop_dead_locals)
        if not is_root:
            node = propagate_attributes(node, external)
        if node is before or tree.same(node, before):
            break
    return node


def after_lowering(node: cst.ClassDef) -> cst.ClassDef:
    """Assignments that edits have left without a purpose."""
    return _each_method(_each_method(node, _truncate), drop_dead_locals)


def _each_method(node: cst.ClassDef, change) -> cst.ClassDef:  # noqa: ANN001
    body = [change(i) if isinstance(i, cst.FunctionDef) else i for i in node.body.body]
    if all(a is b for a, b in zip(body, node.body.body, strict=True)):
        return node
    return node.with_changes(body=node.body.with_changes(body=body))


def _truncate(method: cst.FunctionDef) -> cst.FunctionDef:
    """Remove statements after a return or raise, and `if` left without a body."""

    def block(stmts: list[cst.BaseStatement]) -> list[cst.BaseStatement]:
        kept: list[cst.BaseStatement] = []
        for stmt in stmts:
            if isinstance(stmt, cst.If):
                stmt = conditional(stmt)
                if stmt is None:
                    continue
            elif isinstance(stmt, (cst.For, cst.While, cst.With)):
                stmt = _rebuilt(stmt, block(tree.body(stmt)))
            kept.append(stmt)
            if _ends(stmt):
                break
        return [s for s in kept if not _is_pass(s)] if any(not _is_pass(s) for s in kept) else kept

    def conditional(stmt: cst.If) -> cst.If | None:
        body = block(tree.body(stmt))
        orelse = stmt.orelse
        if isinstance(orelse, cst.If):
            orelse = conditional(orelse)
        elif orelse is not None:
            rest = block(tree.body(orelse))
            orelse = _rebuilt(orelse, rest) if _does(rest) else None
        if not _does(body) and orelse is None:
            return None
        changed = _rebuilt(stmt, body)
        return changed if orelse is stmt.orelse else changed.with_changes(orelse=orelse)

    new = block(tree.body(method))
    return _rebuilt(method, new)


def _does(stmts: list[cst.BaseStatement]) -> bool:
    return any(not _is_pass(s) for s in stmts)


def _is_pass(stmt: cst.BaseStatement) -> bool:
    return isinstance(stmt, cst.SimpleStatementLine) and all(isinstance(s, cst.Pass) for s in stmt.body)


def _rebuilt(node, stmts: list[cst.BaseStatement]):  # noqa: ANN001, ANN202
    old = tree.body(node)
    if len(old) == len(stmts) and all(a is b for a, b in zip(old, stmts, strict=True)):
        return node
    return tree.with_body(node, stmts)


def _ends(stmt: cst.BaseStatement) -> bool:
    if isinstance(stmt, cst.SimpleStatementLine):
        return isinstance(stmt.body[-1], (cst.Return, cst.Raise))
    if isinstance(stmt, cst.If) and stmt.orelse is not None:
        other = [stmt.orelse] if isinstance(stmt.orelse, cst.If) else tree.body(stmt.orelse)
        return bool(other) and _ends(tree.body(stmt)[-1]) and _ends(other[-1])
    return False


# -- locals ------------------------------------------------------------------------------------------------------------
_PURE_CALLS = ("torch·chunk", "len", "list", "tuple", "int")
_PURE_METHODS = ("copy", "get", "pop", "_default_processor_cls")
"""Methods of the option dicts that are passed down to processors; a dead one takes them along."""


def drop_dead_locals(method: cst.FunctionDef) -> cst.FunctionDef:
    """Remove assignments whose names are never read and whose value has no effect."""
    read = _read_names(method.body)
    edits: list[tuple[cst.CSTNode, object]] = []
    for line in tree.find(method.body, cst.SimpleStatementLine):
        if len(line.body) != 1 or not isinstance(line.body[0], cst.Assign):
            continue
        assign = line.body[0]
        names = [n for t in assign.targets for n in _bound(t.target)]
        plain = all(_only_names(t.target) for t in assign.targets)
        if (plain and names and all(n.value not in read for n in names) and _pure(assign.value)) or (
            len(assign.targets) == 1 and _overwritten(assign, line, method)
        ):
            edits.append((line, cst.RemoveFromParent()))
        elif len(assign.targets) == 1 and tree.same(assign.targets[0].target, assign.value):
            edits.append((line, cst.RemoveFromParent()))  # `x = x`
    return tree.replace_nodes(method, edits)


def _read_names(node: cst.CSTNode) -> set[str]:
    """Names in load position; attribute names, keywords and assignment targets are none."""
    found: set[str] = set()
    stack: list[cst.CSTNode] = [node]
    while stack:
        top = stack.pop()
        kind = type(top)
        if kind is cst.Name:
            found.add(top.value)
        elif kind is cst.Attribute or kind is cst.Arg:
            stack.append(top.value)
        elif kind is cst.AssignTarget:
            if not _only_names(top.target):
                stack.append(top.target)
        else:
            stack.extend(tree.children(top))
    return found


def _overwritten(assign: cst.Assign, line: cst.SimpleStatementLine, method: cst.FunctionDef) -> bool:
    """A pure store that the same block overwrites before anything can read it."""
    target = assign.targets[0].target
    stmts = tree.body(method)
    if not isinstance(target, cst.Name) or not _pure(assign.value) or not any(s is line for s in stmts):
        return False
    position = next(i for i, s in enumerate(stmts) if s is line)
    for stmt in stmts[position + 1 :]:
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) else None
        if isinstance(small, cst.Assign) and any(isinstance(t.target, cst.Name) and t.target.value == target.value
                                                 for t in small.targets):  # fmt: skip
            return not any(n.value == target.value for n in tree.find(small.value, cst.Name))
        if any(n.value == target.value for n in tree.find(stmt, cst.Name)):
            return False
    return False


def propagate_copies(method: cst.FunctionDef) -> cst.FunctionDef:
    """Replace `a` by `b` after `a = b`, while neither is bound again."""
    stmts = tree.body(method)
    for position, stmt in enumerate(stmts):
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 else None
        if not isinstance(small, cst.Assign) or len(small.targets) != 1:
            continue
        target, value = small.targets[0].target, small.value
        if not (isinstance(target, cst.Name) and isinstance(value, cst.Name)) or "\u00b7" in value.value:
            continue
        names = {target.value, value.value}
        rest = stmts[position + 1 :]
        end = next((i for i, s in enumerate(rest) if names & _binds(s)), len(rest))
        tail = rest[end:]
        if tail and not _rebinds_alone(tail[0], names):
            continue
        reread = any(n.value == target.value for s in tail[1:] for n in tree.find(s, cst.Name))
        if reread and not (tail and target.value in _binds(tail[0])):
            continue
        holes = {target.value: cst.Name(value.value)}
        new = [tree.substitute(s, holes) for s in rest[:end]]
        if tail:
            first = tail[0].body[0]
            tail = [
                tail[0].with_changes(body=[first.with_changes(value=tree.substitute(first.value, holes))]),
                *tail[1:],
            ]
        if all(tree.same(a, b) for a, b in zip(rest, [*new, *tail], strict=True)):
            continue
        return propagate_copies(tree.with_body(method, [*stmts[: position + 1], *new, *tail]))
    return method


def _binds(stmt: cst.BaseStatement) -> set[str]:
    found = {n.value for t in tree.find(stmt, cst.AssignTarget) for n in _bound(t.target)}
    found |= {n.value for t in tree.find(stmt, cst.For, cst.AugAssign) for n in _bound(t.target)}
    return found


def _rebinds_alone(stmt: cst.BaseStatement, names: set[str]) -> bool:
    """A plain assignment, whose value is read before the name is bound again."""
    return isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 and isinstance(stmt.body[0], cst.Assign)


def _bound(target: cst.BaseExpression) -> list[cst.Name]:
    if isinstance(target, cst.Name):
        return [target]
    if isinstance(target, (cst.Tuple, cst.List)):
        return [n for e in target.elements for n in _bound(e.value)]
    return []


def _only_names(target: cst.BaseExpression) -> bool:
    if type(target) is cst.Name:
        return True
    return isinstance(target, (cst.Tuple, cst.List)) and all(_only_names(e.value) for e in target.elements)


def _pure(value: cst.BaseExpression) -> bool:
    return all(_pure_call(c) for c in tree.find(value, cst.Call))


def _pure_call(call: cst.Call) -> bool:
    if isinstance(call.func, cst.Attribute) and call.func.attr.value in _PURE_METHODS:
        return True
    name = tree.call_name(call) or ""
    # Building an object that nobody keeps (a processor, say) has no effect.
    builds = "\u00b7" in name and name.rpartition("\u00b7")[2][:1].isupper()
    return builds or name in _PURE_CALLS


def inline_widths(node: cst.ClassDef) -> cst.ClassDef:
    """`self.proj.out_features` is the width the linear was built with; a parallel linear has no such attribute."""
    built: dict[str, list[cst.Call]] = {}
    for assign in tree.find(node, cst.Assign):
        attribute = tree.self_attribute(assign.targets[0].target)
        if attribute is not None and tree.call_name(assign.value) == "torch\u00b7nn\u00b7Linear":
            built.setdefault(attribute, []).append(assign.value)
    edits: list[tuple[cst.CSTNode, object]] = []
    for read in tree.find(node, cst.Attribute) if built else ():
        calls = built.get(tree.self_attribute(read.value) or "", [])
        if len(calls) == 1 and read.attr.value in ("in_features", "out_features"):
            bound = tree.arguments(calls[0], ["in_features", "out_features"]) or {}
            if read.attr.value in bound:
                edits.append((read, tree.atomic(bound[read.attr.value])))
    return tree.replace_nodes(node, edits)


def propagate_attributes(node: cst.ClassDef, external: frozenset[str]) -> cst.ClassDef:
    """In the constructor, read the parameter instead of the attribute that merely holds it; drop attributes left unread."""
    init = tree.method(node, "__init__")
    if init is None:
        return node
    assigned = Counter(n.value for t in tree.find(init, cst.AssignTarget) for n in _bound(t.target))
    stored = Counter(a for t in tree.find(node, cst.AssignTarget) if (a := tree.self_attribute(t.target)))
    uses: dict[str, list[cst.Attribute]] = {}
    for each in tree.find(node, cst.Attribute):
        uses.setdefault(tree.self_attribute(each) or "", []).append(each)
    inside = {id(n) for n in tree.find(init, cst.Attribute)}
    edits: list[tuple[cst.CSTNode, object]] = []
    for stmt in tree.body(init):
        small = stmt.body[0] if isinstance(stmt, cst.SimpleStatementLine) and len(stmt.body) == 1 else None
        if not isinstance(small, cst.Assign) or len(small.targets) != 1:
            continue
        target, value = small.targets[0].target, small.value
        attribute = tree.self_attribute(target)
        if attribute is None or stored[attribute] != 1:
            continue
        alias = isinstance(value, cst.Name) and not assigned[value.value] and "\u00b7" not in value.value
        if isinstance(value, cst.Name) and value.value in ("None", "True", "False"):
            continue
        alias = alias or (tree.self_attribute(value) is not None and stored[tree.self_attribute(value) or ""] == 1)
        if not alias:
            continue
        reads = [a for a in uses[attribute] if a is not target]
        edits += [(a, value) for a in reads if id(a) in inside]
        if attribute not in external and all(id(a) in inside for a in reads):
            edits.append((stmt, cst.RemoveFromParent()))
        if edits:
            return tree.replace_nodes(node, edits)
    return node


_ENTRIES = frozenset({"__init__", "forward", "load_weights"})
"""Methods that are called from outside."""


# -- methods -----------------------------------------------------------------------------------------------------------
def inline_methods(node: cst.ClassDef) -> cst.ClassDef:
    """Splice helper methods called once, as a statement of their own, whose only return is their last statement."""
    functions = {i.name.value: i for i in node.body.body if isinstance(i, cst.FunctionDef)}
    helpers = {n: f for n, f in functions.items() if n not in _ENTRIES and not f.decorators}
    if not helpers:
        return node
    calls = Counter(tree.self_attribute(a) for a in tree.find(node, cst.Attribute))
    for name, helper in helpers.items():
        if calls[name] != 1:
            continue
        stmts = tree.strip_docstring(tree.body(helper))
        variadic = isinstance(helper.params.star_kwarg, cst.Param) or isinstance(helper.params.star_arg, cst.Param)
        if not stmts or variadic or not (_returns_last(stmts) or _returns_nothing(stmts)):
            continue
        for caller in functions.values():
            if caller is helper:
                continue
            spliced = _splice(caller, name, helper, stmts)
            if spliced is not None:
                body = [spliced if i is caller else i for i in node.body.body if i is not helper]
                return inline_methods(node.with_changes(body=node.body.with_changes(body=body)))
    return node


def _returns_last(stmts: list[cst.BaseStatement]) -> bool:
    last = stmts[-1]
    if not (isinstance(last, cst.SimpleStatementLine) and len(last.body) == 1 and isinstance(last.body[0], cst.Return)):
        return False
    return last.body[0].value is not None and sum(1 for s in stmts for _ in tree.find(s, cst.Return)) == 1


def _returns_nothing(stmts: list[cst.BaseStatement]) -> bool:
    return not any(True for s in stmts for _ in tree.find(s, cst.Return))


def _splice(
    caller: cst.FunctionDef, name: str, helper: cst.FunctionDef, stmts: list[cst.BaseStatement]
) -> cst.FunctionDef | None:
    for line in tree.find(caller.body, cst.SimpleStatementLine):
        small = line.body[0]
        silent = _returns_nothing(stmts)
        kinds = (cst.Expr,) if silent else (cst.Assign, cst.Return)
        value = small.value if isinstance(small, kinds) else None
        if not isinstance(value, cst.Call) or tree.call_name(value) != f"self.{name}":
            continue
        params = [p.name.value for p in tree.own_parameters(helper)]
        given = tree.arguments(value, params)
        if given is None:
            return None
        for param in tree.own_parameters(helper):
            if param.name.value not in given and param.default is not None:
                given[param.name.value] = param.default
        if set(given) != set(params):
            return None
        taken = {n.value for n in tree.find(caller, cst.Name)}
        own = {n.value for s in stmts for t in tree.find(s, cst.AssignTarget) for n in _bound(t.target)}
        result = cst.Name("None") if silent else stmts[-1].body[0].value  # type: ignore[attr-defined]
        outputs = {n.value for t in getattr(small, "targets", ()) for n in _bound(t.target)}
        # A helper's local of the same name as a caller's variable is safe only if the call overwrites that variable.
        assigned_params = own & set(params)
        holes: dict[str, cst.BaseExpression] = {}
        renames: dict[str, cst.BaseExpression] = {}
        prologue: list[cst.BaseStatement] = []
        for local in sorted(own - set(params)):
            if local in taken and local not in outputs:
                renames[local] = cst.Name(f"{name.strip('_')}_{local}")
        for param in params:
            if param in assigned_params:
                if not tree.same(given[param], cst.Name(param)):
                    prologue.append(tree.statement(f"{param} = value", value=given[param]))
            else:
                holes[param] = given[param]
        body = [tree.substitute(s, {**holes, **renames}) for s in (stmts if silent else stmts[:-1])]
        final = tree.substitute(result, {**holes, **renames})
        tail = [] if silent else _assign_result(small, line, final)
        new = [*prologue, *body, *tail]
        if new:
            new[0] = new[0].with_changes(leading_lines=[*line.leading_lines, *getattr(new[0], "leading_lines", ())])
        return tree.replace_nodes(caller, [(line, cst.FlattenSentinel(new))])
    return None


def _assign_result(
    small: cst.CSTNode, line: cst.SimpleStatementLine, value: cst.BaseExpression
) -> list[cst.BaseStatement]:
    """`a, b = x, y` after inlining; names assigned to themselves fall away, the rest stays one assignment."""
    if isinstance(small, cst.Return):
        return [line.with_changes(body=[small.with_changes(value=value)], leading_lines=())]
    assert isinstance(small, cst.Assign)
    target = small.targets[0].target
    bare = line.with_changes(leading_lines=())
    if isinstance(target, cst.Tuple) and isinstance(value, cst.Tuple) and len(target.elements) == len(value.elements):
        pairs = [(t.value, v.value) for t, v in zip(target.elements, value.elements, strict=True)]
        pairs = [(t, v) for t, v in pairs if not tree.same(t, v)]
        names = {n.value for t, _ in pairs for n in _bound(t)}
        independent = all(not (names & {n.value for n in tree.find(v, cst.Name)}) for _, v in pairs)
        if not pairs:
            return []
        if independent:
            return [bare.with_changes(body=[cst.Assign(targets=[cst.AssignTarget(t)], value=v)]) for t, v in pairs]
    if tree.same(target, value):
        return []
    return [bare.with_changes(body=[small.with_changes(value=value)])]
