"""Partial evaluation of statements: what is known when the port is written need not be decided when it runs.

Knowledge comes from rules (a parameter the engine does not offer, a back end it does not run on) and from facts
(components that are always there). Folding only ever removes branches that cannot be taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import ge, gt, le, lt
from typing import TypeVar

import libcst as cst
from msgspec import Struct, field
from msgspec.structs import replace

from porter.source.names import qualified
from porter.source.tree import body, expression, find, transform, with_body

Node = TypeVar("Node", bound=cst.CSTNode)

UNKNOWN = object()
PRESENT = object()
"""A component that is certainly there: not None, true, and no builtin container or scalar."""

ABSENT = object()
"""An attribute that nothing ever sets: only `getattr` with a default and `hasattr` know an answer."""


class Knowledge(Struct, frozen=True, dict=True):
    """What is known: values of locals and of attributes of `self`; `bases` are classes `self` may be an instance of."""

    local: Mapping[str, object] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)
    bases: frozenset[str] = frozenset()

    def with_local(self, local: Mapping[str, object]) -> Knowledge:
        return replace(self, local=local)


def value_of(node: cst.BaseExpression, known: Knowledge) -> object:
    """The value of an expression, PRESENT, or UNKNOWN."""
    if isinstance(node, cst.Name):
        return _name(node.value, known)
    if isinstance(node, cst.Attribute) and isinstance(node.value, cst.Name) and node.value.value == "self":
        value = known.attributes.get(node.attr.value, UNKNOWN)
        return UNKNOWN if value is ABSENT else value
    if isinstance(node, (cst.SimpleString, cst.Integer, cst.Float)):
        return node.evaluated_value
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
        inner = truth(node.expression, known)
        return UNKNOWN if inner is None else not inner
    if isinstance(node, cst.BooleanOperation):
        return _boolean(node, known)
    if isinstance(node, cst.Comparison) and len(node.comparisons) == 1:
        return _comparison(node, known)
    if isinstance(node, cst.IfExp):
        test = truth(node.test, known)
        return UNKNOWN if test is None else value_of(node.body if test else node.orelse, known)
    if isinstance(node, cst.Call):
        return _call(node, known)
    return UNKNOWN


def truth(node: cst.BaseExpression, known: Knowledge) -> bool | None:
    """Whether an expression is true; None if that is not known."""
    if isinstance(node, cst.BooleanOperation):
        decides = not isinstance(node.operator, cst.And)  # one true side decides an `or`, one false side an `and`
        sides = (truth(node.left, known), truth(node.right, known))
        if decides in sides:
            return decides
        return None if None in sides else not decides
    value = value_of(node, known)
    if value is UNKNOWN:
        return None
    return True if value is PRESENT else bool(value)


def _name(name: str, known: Knowledge) -> object:
    constants = {"None": None, "True": True, "False": False}
    if name in constants:
        return constants[name]
    return known.local.get(name, UNKNOWN)


def _boolean(node: cst.BooleanOperation, known: Knowledge) -> object:
    left = truth(node.left, known)
    if left is None:
        return UNKNOWN
    return value_of(node.right if left is isinstance(node.operator, cst.And) else node.left, known)


def _comparison(node: cst.Comparison, known: Knowledge) -> object:
    operator, other = node.comparisons[0].operator, node.comparisons[0].comparator
    left, right = value_of(node.left, known), value_of(other, known)
    if left is UNKNOWN or right is UNKNOWN:
        return UNKNOWN
    if PRESENT in (left, right):
        if None not in (left, right):
            return UNKNOWN
        equal = False
    else:
        equal = left is right if isinstance(operator, (cst.Is, cst.IsNot)) else left == right
    if isinstance(operator, (cst.Is, cst.Equal)):
        return equal
    if isinstance(operator, (cst.IsNot, cst.NotEqual)):
        return not equal
    order = {cst.LessThan: lt, cst.LessThanEqual: le, cst.GreaterThan: gt, cst.GreaterThanEqual: ge}.get(type(operator))
    if order is None or not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return UNKNOWN
    return order(left, right)


def _call(node: cst.Call, known: Knowledge) -> object:
    if not isinstance(node.func, cst.Name):
        return UNKNOWN
    name, args = node.func.value, [a.value for a in node.args]
    on_self = bool(args) and isinstance(args[0], cst.Name) and args[0].value == "self"
    if name == "isinstance" and len(args) == 2:
        if on_self:
            wanted = {qualified(n.value) for n in find(args[1], cst.Name)}
            return UNKNOWN if wanted & known.bases else False
        return _is_instance(value_of(args[0], known), args[1])
    if name in ("getattr", "hasattr") and on_self and len(args) > 1 and isinstance(args[1], cst.SimpleString):
        value = known.attributes.get(str(args[1].evaluated_value), UNKNOWN)
        if value is ABSENT:
            return False if name == "hasattr" else value_of(args[2], known) if len(args) > 2 else UNKNOWN
        return UNKNOWN if value is UNKNOWN else (True if name == "hasattr" else value)
    return UNKNOWN


def _is_instance(value: object, wanted: cst.BaseExpression) -> object:
    """`isinstance(value, wanted)` for a literal and builtin classes; None is an instance of none of ours."""
    builtin = {"int": int, "str": str, "bool": bool, "float": float, "list": list, "tuple": tuple, "dict": dict}
    if value is None:
        return False
    if value is UNKNOWN or not isinstance(wanted, (cst.Name, cst.Tuple)):
        return UNKNOWN
    names = [wanted] if isinstance(wanted, cst.Name) else [e.value for e in wanted.elements]
    classes = [builtin.get(n.value) if isinstance(n, cst.Name) else None for n in names]
    if None in classes:
        return UNKNOWN
    return value is not PRESENT and isinstance(value, tuple(c for c in classes if c is not None))


def _simplified(node: Node, known: Knowledge) -> Node:
    """The expression or simple statement with what is decided folded."""

    def choice(original: cst.IfExp, updated: cst.IfExp) -> cst.BaseExpression:
        test = truth(updated.test, known)
        if test is None:
            return updated
        return updated.body if test else updated.orelse

    def operation(original: cst.BooleanOperation, updated: cst.BooleanOperation) -> cst.BaseExpression:
        both = isinstance(updated.operator, cst.And)
        left = truth(updated.left, known)
        if left is not None:
            return updated.right if left is both else updated.left
        right = value_of(updated.right, known)
        if isinstance(right, bool) and right is both:
            return updated.left
        return updated

    def argument(original: cst.Arg, updated: cst.Arg) -> cst.Arg:
        value = updated.value
        if isinstance(value, cst.Name) and value.value in known.local and not updated.star:
            constant = known.local[value.value]
            if isinstance(constant, (bool, int, str, type(None))):
                return updated.with_changes(value=expression(repr(constant)))
        return updated

    return transform(node, {cst.IfExp: choice, cst.BooleanOperation: operation, cst.Arg: argument})


def fold(statements: Sequence[cst.BaseStatement], known: Knowledge) -> list[cst.BaseStatement]:
    """The statements that can still run, with decided expressions simplified."""
    out: list[cst.BaseStatement] = []
    for statement in statements:
        for new in _fold_one(statement, known):
            out.append(new)
            if isinstance(new, cst.SimpleStatementLine) and isinstance(
                new.body[-1], (cst.Return, cst.Raise, cst.Continue, cst.Break)
            ):
                return out
    return out


def _fold_one(statement: cst.BaseStatement, known: Knowledge) -> list[cst.BaseStatement]:
    if isinstance(statement, cst.If):
        return _fold_if(statement, known)
    if isinstance(statement, cst.SimpleStatementLine):
        return [_simplified(statement, known)]
    if isinstance(statement, (cst.For, cst.While, cst.With)):
        before = body(statement)
        inner = fold(before, known)
        if unchanged(before, inner):
            return [statement]
        return [with_body(statement, inner)] if inner else []
    return [statement]


def unchanged(before: Sequence[object], after: Sequence[object]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))


def _fold_if(node: cst.If, known: Knowledge) -> list[cst.BaseStatement]:
    test = truth(node.test, known)
    if test is True:
        return with_comments(fold(body(node), known), node.leading_lines)
    if test is False:
        return with_comments(_fold_else(node.orelse, known), node.leading_lines)
    before = body(node)
    then, other = fold(before, known), _fold_else(node.orelse, known)
    simplified = _simplified(node.test, known)
    if not then and not other:
        return []
    if simplified is node.test and unchanged(before, then) and _same_else(node.orelse, other):
        return [node]
    if not then:
        negated = cst.UnaryOperation(cst.Not(), _parenthesised(simplified))
        return [with_body(node.with_changes(test=negated, orelse=None), other)]
    return [with_body(node.with_changes(test=simplified, orelse=_else(node.orelse, other)), then)]


def _same_else(before: cst.If | cst.Else | None, after: list[cst.BaseStatement]) -> bool:
    if before is None:
        return not after
    return unchanged([before], after) if isinstance(before, cst.If) else unchanged(body(before), after)


def _else(before: cst.If | cst.Else | None, statements: list[cst.BaseStatement]) -> cst.If | cst.Else | None:
    if not statements:
        return None
    if isinstance(before, cst.If) and len(statements) == 1 and isinstance(statements[0], cst.If):
        return statements[0]
    return cst.Else(cst.IndentedBlock(statements))


def _fold_else(node: cst.If | cst.Else | None, known: Knowledge) -> list[cst.BaseStatement]:
    if node is None:
        return []
    return _fold_if(node, known) if isinstance(node, cst.If) else fold(body(node), known)


def _parenthesised(node: cst.BaseExpression) -> cst.BaseExpression:
    if isinstance(node, (cst.BooleanOperation, cst.Comparison, cst.IfExp)) and not node.lpar:
        return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return node


def with_comments(statements: Sequence[cst.BaseStatement], lines: Sequence[cst.EmptyLine]) -> list[cst.BaseStatement]:
    """Put comment lines in front of the first statement."""
    out = list(statements)
    if out and lines and hasattr(out[0], "leading_lines"):
        out[0] = out[0].with_changes(leading_lines=[*lines, *out[0].leading_lines])
    return out
