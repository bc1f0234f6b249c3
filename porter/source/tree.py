"""Small tools over LibCST trees: quoting, comparing, printing, changing; those for walking are here under the same names."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar, cast

import libcst as cst
from libcst._nodes.internal import CodegenState

from porter.source.lean import fields
from porter.source.walking import Table, is_code
from porter.source.walking import children as children
from porter.source.walking import code_fields as code_fields
from porter.source.walking import find as find
from porter.source.walking import may_hold_statements as may_hold_statements
from porter.source.walking import suites as suites
from porter.source.walking import walk as walk

Node = TypeVar("Node", bound=cst.CSTNode)


class _Tokens(CodegenState):
    """LibCST's printer without the recording of positions, which takes a third of its time and is used by nobody here."""

    def record_syntactic_position(self, node: object, **_: object) -> nullcontext[None]:  # type: ignore[override]
        return _NOTHING


_NOTHING = nullcontext()


def code(node: cst.CSTNode) -> str:
    """The text of one node."""
    state = _Tokens(default_indent="    ", default_newline="\n")
    node._codegen(state)
    return "".join(state.tokens)


_VALUED = frozenset({cst.Name, cst.Integer, cst.Float, cst.Imaginary})
_NOT_COMPARED = {cst.FormattedString: ("start", "end"), cst.IndentedBlock: ("indent",)}
"""Which quotes were chosen, and how deep a block is indented."""

_compared_fields: Table[type, tuple[str, ...]] = Table(
    lambda kind: tuple(n for n in code_fields(kind) if n not in _NOT_COMPARED.get(kind, ()))
)


def normal(node: cst.CSTNode) -> str:
    """Text without layout, comments and outer parentheses; equal for nodes that mean the same."""
    out: list[str] = []
    _write_normal(node, out.append)
    return "".join(out)


def _write_normal(node: Any, write: Callable[[str], None]) -> None:
    kind = type(node)
    if kind in _VALUED:
        write(node.value + " ")
        return
    if kind is cst.SimpleString:
        write(repr(literal_value(node.value)))
        return
    write(kind.__name__ + "(")
    for name in _compared_fields[kind]:
        value = getattr(node, name)
        held = type(value)
        if held is tuple or held is list:
            write("[")
            for item in value:
                _write_normal(item, write)
                write(",")
            write("]")
        elif is_code[held]:
            _write_normal(value, write)
        else:
            write(_plain(value))
    write(")")


def _plain(value: object) -> str:
    """A field that holds no node."""
    return value.strip() if isinstance(value, str) else "-" if value is None else ""


def same(left: cst.CSTNode | None, right: cst.CSTNode | None) -> bool:
    """Whether two nodes are the same code, whatever their layout: whether `normal` of them is equal."""
    return left is right or _equal(left, right)


def _equal(left: Any, right: Any) -> bool:
    kind = type(left)
    if kind is not type(right):
        return False
    if kind in _VALUED:
        return bool(left.value == right.value)
    if kind is cst.SimpleString:
        return literal_value(left.value) == literal_value(right.value)
    return all(_equal_field(getattr(left, name), getattr(right, name)) for name in _compared_fields[kind])


def _equal_field(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(a is b or _equal(a, b) for a, b in zip(left, right, strict=True))
    if is_code[type(left)] or is_code[type(right)]:
        return _equal(left, right)
    return _plain(left) == _plain(right)


def clone(node: Node) -> Node:
    """The same code with an identity of its own. Layout is shared: nothing is ever keyed on it."""
    kind = type(node)
    new = object.__new__(kind)
    code_names = code_fields(kind)
    for name in fields(kind):
        value = getattr(node, name)
        if name in code_names:
            held = type(value)
            if held is tuple or held is list:
                value = held(clone(i) if is_code[type(i)] else i for i in value)
            elif is_code[held]:
                value = clone(value)
        object.__setattr__(new, name, value)
    return new


def changed(node: Node, changes: Mapping[str, object]) -> Node:
    """`node.with_changes` without the checks of the node class: what is printed is parsed again in the end."""
    kind = type(node)
    new = object.__new__(kind)
    for name in fields(kind):
        object.__setattr__(new, name, changes[name] if name in changes else getattr(node, name))
    return new


@lru_cache(maxsize=4096)
def literal_value(text: str) -> object:
    """Value of a number or string literal."""
    return ast.literal_eval(text)


def expression(text: str, **holes: cst.BaseExpression) -> cst.BaseExpression:
    """Parse an expression; `holes` are spliced for the names of the same spelling (parenthesised where needed)."""
    node = _parse_expression(text)
    return cast(cst.BaseExpression, substitute(node, holes)) if holes else node


@lru_cache(maxsize=4096)
def _parse_expression(text: str) -> cst.BaseExpression:
    return cst.parse_expression(text)


def statements(text: str, **holes: cst.BaseExpression) -> list[cst.BaseStatement]:
    """Parse statements; `holes` as in `expression`."""
    body = list(cst.parse_module(text).body)
    return [cast(cst.BaseStatement, substitute(s, holes)) for s in body] if holes else body


def statement(text: str, **holes: cst.BaseExpression) -> cst.BaseStatement:
    """Parse exactly one statement."""
    (only,) = statements(text, **holes)
    return only


_ATOMIC = (cst.Name, cst.Attribute, cst.Call, cst.Subscript, cst.Integer, cst.Float, cst.SimpleString, cst.List, cst.Dict,
           cst.ListComp, cst.DictComp, cst.FormattedString, cst.ConcatenatedString, cst.Set)  # fmt: skip


def atomic(node: cst.BaseExpression) -> cst.BaseExpression:
    """`node`, in parentheses unless it binds as tightly as a name."""
    if isinstance(node, _ATOMIC) or node.lpar:
        return node
    return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def substitute(node: cst.CSTNode, holes: dict[str, cst.BaseExpression]) -> cst.CSTNode:
    """Replace names by expressions. Attribute names, keywords and parameter names are left alone."""
    if isinstance(node, cst.Name):
        return atomic(holes[node.value]) if node.value in holes else node
    edits: list[tuple[cst.CSTNode, object]] = []
    stack: list[tuple[cst.CSTNode, bool]] = [(node, False)]
    while stack:
        top, bare = stack.pop()
        if type(top) is cst.Name:
            if top.value in holes:
                edits.append((top, holes[top.value] if bare else atomic(holes[top.value])))
        elif type(top) is cst.Attribute:
            stack.append((top.value, False))
        elif type(top) is cst.Arg:
            stack.append((top.value, not top.star))  # an argument needs no parentheses of its own
        elif type(top) is cst.Param:
            stack.extend((c, True) for c in (top.annotation, top.default) if c is not None)
        else:
            stack.extend((child, type(top) is cst.Assign) for child in children(top))
    return replace_nodes(node, edits)


def replace_nodes(tree: Node, edits: Sequence[tuple[cst.CSTNode, object]]) -> Node:
    """Apply edits planned against `tree`, once.

    Each edit is a node of `tree` and its replacement: a node, a `cst.FlattenSentinel`, `cst.RemoveFromParent()`, or a
    function from the (already updated) node to one of these. Only the way from the root to an edited node is rebuilt.
    """
    if not edits:
        return tree
    planned = {id(node): edit for node, edit in edits}
    return cast(Node, _rebuilt(tree, planned, _touched(tree, planned)))


def _touched(root: cst.CSTNode, planned: dict[int, object]) -> set[int]:
    """Ids of nodes that are edited or have an edited node below them."""
    touched: set[int] = set()

    def visit(node: cst.CSTNode) -> bool:
        hit = id(node) in planned
        for child in children(node):
            hit = visit(child) or hit
        if hit:
            touched.add(id(node))
        return hit

    visit(root)
    return touched


def _rebuilt(node: cst.CSTNode, planned: dict[int, object], touched: set[int]) -> object:
    """The node after the edits below it and its own."""
    changes: dict[str, object] = {}
    for name in code_fields(type(node)):
        value = getattr(node, name)
        kind = type(value)
        if kind is tuple or kind is list:
            if any(id(item) in touched for item in value):
                changes[name] = _items_rebuilt(value, planned, touched)
        elif id(value) in touched:
            new = _rebuilt(value, planned, touched)
            changes[name] = None if isinstance(new, cst.RemovalSentinel) else new
    updated = changed(node, changes) if changes else node
    if id(node) in planned:
        edit = planned[id(node)]
        return edit(updated) if callable(edit) else edit
    return updated


def _items_rebuilt(items: Sequence[cst.CSTNode], planned: dict[int, object], touched: set[int]) -> list[object]:
    return _flattened(_rebuilt(item, planned, touched) if id(item) in touched else item for item in items)


Leave = Mapping[type, Callable[[Any, Any], object]]
"""Class of a node -> what a node of this class becomes, given it and its update by what happened below it: a node, a
`cst.FlattenSentinel` or `cst.RemoveFromParent()`."""


def transform(node: Node, leave: Leave) -> Node:
    """Change nodes by their class, innermost first. What does not change is shared, not copied."""
    return cast(Node, _transformed(node, leave))


def _transformed(node: Any, leave: Leave) -> object:
    changes: dict[str, object] = {}
    kind = type(node)
    for name in code_fields(kind):
        value = getattr(node, name)
        held = type(value)
        if held is tuple or held is list:
            items = [_transformed(item, leave) if is_code[type(item)] else item for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                changes[name] = _flattened(items)
        elif is_code[held]:
            new = _transformed(value, leave)
            if new is not value:
                changes[name] = None if isinstance(new, cst.RemovalSentinel) else new
    updated = changed(node, changes) if changes else node
    return leave[kind](node, updated) if kind in leave else updated


def _flattened(items: Iterable[object]) -> list[object]:
    """Items of a sequence after edits."""
    result: list[object] = []
    for new in items:
        if isinstance(new, cst.FlattenSentinel):
            result.extend(new)
        elif not isinstance(new, cst.RemovalSentinel):
            result.append(new)
    return result


def call_name(node: cst.CSTNode) -> str | None:
    """The (absolute or local) name a call's function is written with; `self.x.y` for attribute chains."""
    if not isinstance(node, cst.Call):
        return None
    func = node.func
    if isinstance(func, cst.Name):
        return func.value
    from porter.source.names import dotted

    return dotted(func)


def is_none(node: cst.CSTNode | None) -> bool:
    """Whether a node is the literal None; False where there is no node."""
    return isinstance(node, cst.Name) and node.value == "None"


def self_attribute(node: cst.CSTNode) -> str | None:
    """`x` for `self.x`, else None."""
    if type(node) is cst.Attribute and type(node.value) is cst.Name and node.value.value == "self":
        return node.attr.value
    return None


def method(owner: cst.ClassDef, name: str) -> cst.FunctionDef | None:
    """The method of that name defined in the class body."""
    for item in owner.body.body:
        if isinstance(item, cst.FunctionDef) and item.name.value == name:
            return item
    return None


Block: TypeAlias = (
    cst.FunctionDef | cst.ClassDef | cst.If | cst.For | cst.While | cst.With | cst.Else | cst.Try | cst.ExceptHandler
    | cst.Finally
)  # fmt: skip


def body(node: Block) -> list[cst.BaseStatement]:
    """Statements of a suite; a one-line suite is turned into ordinary statements."""
    suite = node.body
    if type(suite) is cst.SimpleStatementSuite:
        return [cst.SimpleStatementLine([s]) for s in suite.body]
    return list(suite.body)  # type: ignore[arg-type]


def with_body(node: Node, new: Sequence[cst.BaseStatement]) -> Node:
    """`node` with another suite; an empty one becomes `pass`."""
    filled = list(new) or [cst.SimpleStatementLine([cst.Pass()])]
    suite = node.body  # type: ignore[attr-defined]
    if isinstance(suite, cst.IndentedBlock):
        return cast(Node, node.with_changes(body=suite.with_changes(body=filled)))
    return cast(Node, node.with_changes(body=cst.IndentedBlock(filled)))


def arguments(call: cst.Call, parameters: Sequence[str]) -> dict[str, cst.BaseExpression] | None:
    """Bind a call's arguments to parameter names; None if it uses * or ** or has too many."""
    bound: dict[str, cst.BaseExpression] = {}
    for position, arg in enumerate(call.args):
        if arg.star:
            return None
        if arg.keyword is not None:
            bound[arg.keyword.value] = arg.value
        elif position < len(parameters):
            bound[parameters[position]] = arg.value
        else:
            return None
    return bound


def keyword_argument(name: str, value: cst.BaseExpression) -> cst.Arg:
    """`name=value` without spaces."""
    tight = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    return cst.Arg(value=value, keyword=cst.Name(name), equal=tight)


def parameters(function: cst.FunctionDef) -> list[cst.Param]:
    """All named parameters, receiver included, in order."""
    p = function.params
    return [*p.posonly_params, *p.params, *p.kwonly_params]


def own_parameters(function: cst.FunctionDef) -> list[cst.Param]:
    """Parameters a caller gives: all of a static method's, all but the receiver of another method's."""
    static = any(isinstance(d.decorator, cst.Name) and d.decorator.value == "staticmethod" for d in function.decorators)
    return parameters(function) if static else parameters(function)[1:]


def strip_docstring(stmts: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """Statements without a leading docstring."""
    rest = list(stmts)
    if rest and isinstance(rest[0], cst.SimpleStatementLine) and isinstance(rest[0].body[0], cst.Expr):
        if isinstance(rest[0].body[0].value, (cst.SimpleString, cst.ConcatenatedString)):
            return rest[1:]
    return rest
