"""The edit verbs of a rule file, turned into edits of nodes. One small function per verb.

`ensure_*` verbs look first: what is there already with the same value plans nothing; with another value they raise
`Clash`. Where an attribute goes is computed (after the last assignment its value reads), never given by line.
"""

from __future__ import annotations

from typing import Any

import libcst as cst

from porter.engine.edits import Add, Code, Edit, Insert, Remove, Replace
from porter.engine.placement import Clash, assigned, init_anchor, leading_anchor, new_init, parent_item, value_of
from porter.engine.predicates import equals
from porter.engine.rule import Rule
from porter.engine.schema import EditSpec
from porter.engine.site import Site
from porter.engine.text import CodeError, interpolate, variables
from porter.source.names import DOT
from porter.source.tree import body, find, keyword_argument, method, normal, parameters, same


def lower(spec: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    """The edits of one verb at one site.

    Raises CodeError if the verb does not apply to what is bound there, Clash if an `ensure_*` finds another value.
    """
    verb = spec.verb
    return _VERBS[verb](getattr(spec, verb), spec, site, rule)


def _target(reference: str, site: Site) -> tuple[cst.CSTNode, ...]:
    """The nodes a `$name` in target position stands for."""
    path = reference.strip().removeprefix("$").strip("${}")
    value = site.nodes if path == "site" else site.lookup(path)
    nodes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(n, cst.CSTNode) for n in nodes):
        raise CodeError(f"{reference} is not a node of the tree")
    return nodes  # type: ignore[return-value]


def _code(text: str, site: Site, rule: Rule, statements: bool) -> Code:
    return Code(rule.template(text), site.lookup, statements)


def _whole(nodes: tuple[cst.CSTNode, ...], site: Site) -> tuple[cst.CSTNode, ...]:
    """A bare expression that is its own statement stands for the statement."""
    if len(nodes) == 1 and isinstance(nodes[0], (cst.BaseExpression, cst.BaseSmallStatement)):
        node: cst.CSTNode = nodes[0]
        above = site.index.parent(node)
        if isinstance(above, cst.Expr):
            node, above = above, site.index.parent(above)
        if (
            isinstance(node, cst.BaseSmallStatement)
            and isinstance(above, cst.SimpleStatementLine)
            and len(above.body) == 1
        ):
            return (above,)
    return nodes


def _replace(target: str, spec: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    nodes, text = _target(target, site), spec.with_ or ""
    if not nodes:
        return []
    if isinstance(nodes[0], cst.BaseExpression):
        from porter.engine.text import check

        if check(text, rule.symbols)[2] == "expression" and not (text.strip().startswith("$$")):
            return [Replace(nodes, _code(text, site, rule, False))]
        nodes = _whole(nodes, site)
    if not isinstance(nodes[0], cst.BaseStatement):
        raise CodeError(f"{target} is inside an expression; statements can't replace it")
    return [Replace(nodes, _code(text, site, rule, True))]


def _remove(target: str, spec: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    return [Remove(tuple(parent_item(n, site.index) for n in _whole(_target(target, site), site)))]


def _insert(target: str, spec: EditSpec, site: Site, rule: Rule, after: bool) -> list[Edit]:
    nodes = _target(target, site)
    anchor = site.index.statement(nodes[-1] if after else nodes[0])
    if anchor is None:
        raise CodeError(f"{target} is not inside a statement")
    return [Insert(anchor, _code(spec.with_ or "", site, rule, True), after)]


def _insert_before(target: str, spec: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    return _insert(target, spec, site, rule, after=False)


def _insert_after(target: str, spec: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    return _insert(target, spec, site, rule, after=True)


def _class(name: str | None, site: Site) -> cst.ClassDef:
    node = _target(name, site)[0] if name else site.owner
    if not isinstance(node, cst.ClassDef):
        raise CodeError("there is no class here", advice="name one with `class: $owner`")
    if not isinstance(node.body, cst.IndentedBlock):
        raise CodeError(f"class {node.name.value} is written on one line")
    return node


def _remove_bases(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401 - the verb's own struct
    unwanted = set(rule.absolute_names(spec.bases))
    bases = [a for a in _class(spec.class_, site).bases if isinstance(a.value, cst.Name) and a.value.value in unwanted]
    return [Remove(tuple(bases))] if bases else []


def _ensure_base(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    owner = _class(spec.class_, site)
    value = rule.template(spec.base).expression(site.lookup)
    if any(same(a.value, value) for a in owner.bases):
        return []
    return [Add(owner, "bases", Code.of(cst.Arg(value)), key=("base", owner.name.value, normal(value)))]


def _remove_decorator(name: str, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:
    if name.startswith("$"):
        return [Remove(_target(name, site))]
    owner = site.node if isinstance(site.node, (cst.FunctionDef, cst.ClassDef)) else site.function
    wanted, found = rule.absolute_names(name), []
    for each in owner.decorators if owner is not None else ():
        target = each.decorator.func if isinstance(each.decorator, cst.Call) else each.decorator
        if isinstance(target, cst.Name) and target.value in wanted:
            found.append(each)
    return [Remove(tuple(found))] if found else []


def _function(reference: str | None, owner: str | None, site: Site) -> cst.FunctionDef:
    if reference is None:
        found = site.function
    elif reference.startswith("$"):
        found = _target(reference, site)[0]  # type: ignore[assignment]
    else:
        found = method(_class(owner, site), reference)
    if not isinstance(found, cst.FunctionDef):
        raise CodeError(f"there is no function {reference or ''} here".replace("  ", " "))
    return found


def _ensure_parameter(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    function = _function(spec.of, spec.class_, site)
    name = interpolate(spec.name, site.lookup)
    annotation = rule.template(spec.type).expression(site.lookup) if spec.type else None
    default = rule.template(spec.default).expression(site.lookup) if spec.default else None
    present = next((p for p in parameters(function) if p.name.value == name), None)
    if present is not None:
        if spec.default is not None and not same(present.default, default):
            raise Clash(f"parameter {name} of {function.name.value} has another default already")
        return []
    param = cst.Param(
        cst.Name(name),
        annotation=cst.Annotation(annotation) if annotation else None,
        default=default,
        star="",
        equal=_equal(annotation is not None) if default is not None else cst.MaybeSentinel.DEFAULT,
    )
    key = ("parameter", site.owner.name.value if site.owner else "", function.name.value, name)
    where, position = "params", -1
    if spec.at == "keyword" or (spec.at == "last" and default is None and _defaults(function)):
        where = "kwonly_params"
    elif spec.at == "first":
        position = 1 if function.params.params and function.params.params[0].name.value in ("self", "cls") else 0
    return [Add(function.params, where, Code.of(param), position, key)]


def _equal(annotated: bool) -> cst.AssignEqual:
    space = cst.SimpleWhitespace(" " if annotated else "")
    return cst.AssignEqual(space, space)


def _defaults(function: cst.FunctionDef) -> bool:
    return any(p.default is not None for p in function.params.params)


def _ensure_argument(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    call = _target(spec.call, site)[0]
    if not isinstance(call, cst.Call):
        raise CodeError(f"{spec.call} is not a call")
    name = interpolate(spec.name, site.lookup)
    value = rule.template(spec.value).expression(site.lookup)
    for arg in call.args:
        if arg.keyword is not None and arg.keyword.value == name:
            if not same(arg.value, value):
                raise Clash(f"argument {name} is given already, with another value")
            return []
    stars = sum(1 for a in call.args if a.star == "**")
    code = Code.of(keyword_argument(name, value))
    return [Add(call, "args", code, len(call.args) - stars if stars else -1, ("argument", str(id(call)), name))]


def _assignment(target: str, spec: Any, site: Site, rule: Rule) -> cst.SimpleStatementLine:  # noqa: ANN401
    value = rule.template(spec.value).expression(site.lookup)
    left: Any = cst.parse_expression(target)
    if spec.type:
        annotation = rule.template(spec.type).expression(site.lookup)
        small: cst.BaseSmallStatement = cst.AnnAssign(left, cst.Annotation(annotation), value)
    else:
        small = cst.Assign([cst.AssignTarget(left)], value)
    return cst.SimpleStatementLine([small])


def _ensure_init_attribute(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    owner = _class(spec.class_, site)
    name = interpolate(spec.name, site.lookup)
    line = _assignment(f"self.{name}", spec, site, rule)
    init, key = method(owner, "__init__"), ("init", owner.name.value, name)
    if init is None:
        code = Code.of(new_init(line))
        return [
            Insert(
                leading_anchor(owner)[0], code, leading_anchor(owner)[1], key=("method", owner.name.value, "__init__")
            )
        ]
    present = assigned(init, f"self.{name}")
    if present is not None:
        if not same(present, value_of(line)):
            raise Clash(f"self.{name} is set already in {owner.name.value}.__init__, to another value")
        return []
    anchor, after = init_anchor(init, line)
    return [Insert(anchor, Code.of(line), after, key)]


def _ensure_class_attribute(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    owner = _class(spec.class_, site)
    name = interpolate(spec.name, site.lookup)
    line = _assignment(name, spec, site, rule)
    present = assigned(owner, name)
    if present is not None:
        if not same(present, value_of(line)):
            raise Clash(f"{owner.name.value}.{name} exists already, with another value")
        return []
    anchor, after = leading_anchor(owner)
    return [Insert(anchor, Code.of(line), after, ("attribute", owner.name.value, name))]


def _ensure_method(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    owner = _class(spec.class_, site)
    new = rule.template(spec.code).statements(site.lookup)
    if len(new) != 1 or not isinstance(new[0], cst.FunctionDef):
        raise CodeError("ensure_method wants exactly one `def`")
    name = new[0].name.value
    present = method(owner, name)
    if present is not None:
        if normal(present) != normal(new[0]):
            raise Clash(f"{owner.name.value}.{name} exists already, with another body")
        return []
    spaced = new[0].with_changes(leading_lines=[cst.EmptyLine(indent=False), *new[0].leading_lines])
    return [Insert(body(owner)[-1], Code.of(spaced), True, ("method", owner.name.value, name))]


def _rename_local(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    function = _function(spec.of, None, site)
    old, new = interpolate(spec.name, site.lookup), interpolate(spec.to, site.lookup)
    if any(n.value == new and DOT not in n.value for n in find(function, cst.Name)):
        raise Clash(f"{new} is a name in {function.name.value} already")
    edits: list[Edit] = []
    for name in find(function, cst.Name, where=lambda n: n.value == old):
        above: Any = site.index.parent(name)
        is_label = (isinstance(above, cst.Attribute) and above.attr is name) or (
            isinstance(above, cst.Arg) and above.keyword is name
        )
        if not is_label:
            edits.append(Replace((name,), Code.of(cst.Name(new))))
    return edits


def _mark_raise(spec: Any, _: EditSpec, site: Site, rule: Rule) -> list[Edit]:  # noqa: ANN401
    nodes = _target(spec.at, site) if spec.at else site.nodes
    whole = nodes if isinstance(nodes[0], cst.BaseStatement) else (site.index.statement(nodes[0]),)
    message = interpolate(spec.message, site.lookup)
    line = cst.parse_statement(f"raise NotImplementedError({message!r})")
    return [Replace(whole, Code.of(line))]  # type: ignore[arg-type]


def unread(spec: EditSpec) -> set[str]:
    """Metavariables of an edit, for checking a rule file."""
    found: set[str] = set()
    value = getattr(spec, spec.verb)
    texts = [value] if isinstance(value, str) else [getattr(value, f) for f in value.__struct_fields__]
    for text in [*texts, spec.with_]:
        if isinstance(text, str):
            found |= variables(text)
    return found


def is_value(node: object, text: str, rule: Rule) -> bool:
    """Whether an option's value is what `must_be` says (a value written as code)."""
    return equals(node, text, rule.symbols)


_VERBS = {
    "replace": _replace,
    "remove": _remove,
    "insert_before": _insert_before,
    "insert_after": _insert_after,
    "remove_bases": _remove_bases,
    "ensure_base": _ensure_base,
    "remove_decorator": _remove_decorator,
    "ensure_parameter": _ensure_parameter,
    "ensure_argument": _ensure_argument,
    "ensure_init_attribute": _ensure_init_attribute,
    "ensure_class_attribute": _ensure_class_attribute,
    "ensure_method": _ensure_method,
    "rename_local": _rename_local,
    "mark_raise": _mark_raise,
}
