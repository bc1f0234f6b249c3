"""Python text in rule files: metavariables, symbols, and templates that splice what a pattern captured.

`$x` stands for one node, `$$xs` for many, `${site.field}` for a field of a fact. They are written into the code as
identifiers before it is parsed. Names are resolved through the rule's `symbols` to absolute names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import libcst as cst
from msgspec import Struct, field

from porter.model import Unknown
from porter.source.absolutise import MODULES
from porter.source.names import BUILTINS, DOT, absolute
from porter.source.tree import atomic, code, code_fields
from porter.source.walking import is_code

ONE, MANY, FIELD = "MV1_", "MVN_", "MVF_"
_VARIABLE = re.compile(r"\$(\$?)(?:([A-Za-z_]\w*)|\{([A-Za-z]\w*(?:\.[A-Za-z]\w*)*)\})")
_ENCODED = re.compile(rf"{ONE}\w+|{FIELD}\w+")
_BRACKETED = (cst.Arg, cst.Element, cst.Index, cst.DictElement, cst.FormattedStringExpression)
_LOOSE = (*_BRACKETED, cst.Assign, cst.AnnAssign, cst.Return, cst.Expr, cst.AugAssign, cst.If, cst.While)
FREE = BUILTINS | {"self", "cls", "__class__"}

Lookup = Callable[[str], Any]


class CodeError(Exception):
    """A code text that can't be used; `line` counts from 1 inside the text."""

    def __init__(self, message: str, line: int = 1, advice: str | None = None) -> None:
        super().__init__(message)
        self.line = line
        self.advice = advice


def encode(text: str) -> str:
    """Metavariables as identifiers Python can parse."""

    def identifier(found: re.Match[str]) -> str:
        many, name, path = found.groups()
        if name:
            return (MANY if many else ONE) + name
        return (MANY if many else FIELD) + path.replace(".", "__dot__")

    return _VARIABLE.sub(identifier, text)


def decode(identifier: str) -> tuple[str, str] | None:
    """(kind, path) of an encoded metavariable; kind is ONE, MANY or FIELD."""
    kind = identifier[:4]
    return (kind, identifier[4:].replace("__dot__", ".")) if kind in (ONE, MANY, FIELD) else None


def variables(text: str) -> set[str]:
    """Paths of the metavariables in a text."""
    return {name or path for _, name, path in _VARIABLE.findall(text)}


def interpolate(text: str, lookup: Lookup) -> str:
    """A message with its metavariables replaced by the code they stand for."""
    return _VARIABLE.sub(lambda m: readable(lookup(m[2] or m[3])), text)


def readable(value: object) -> str:
    """A binding as text for a person."""
    if isinstance(value, cst.CSTNode):
        text = code(value).strip()
    elif isinstance(value, (tuple, list)):
        text = ", ".join(readable(v) for v in value)
    else:
        text = str(value)
    return re.sub(rf"[\w{DOT}]*{DOT}", "", text)


def resolve_chain(path: str, symbols: Mapping[str, str]) -> str | None:
    """Absolute text of a dotted chain whose first name is a symbol; modules are followed, objects are not."""
    root, *rest = path.split(".")
    target = symbols.get(root)
    if target is None:
        return None
    while rest and (target in MODULES or "." not in target):
        target = f"{target}.{rest.pop(0)}"
    if "." not in target:
        return None if target in BUILTINS else ".".join([target + DOT, *rest])
    return ".".join([absolute(target), *rest])


def check(text: str, symbols: Mapping[str, str], statements: bool | None = None) -> tuple[set[str], set[str], str]:
    """Parse a rule text with Python's own parser, without LibCST: (metavariable paths, free names, kind).

    Kind is "expression" or "statements". Raises CodeError with the line inside the text.
    """
    source = encode(text)
    try:
        tree: ast.AST = ast.parse(source.strip(), mode="eval")
        kind = "expression"
    except SyntaxError:
        try:
            tree = ast.parse(source)
            kind = "statements"
        except SyntaxError as error:
            raise CodeError(f"the code does not parse: {error.msg}", error.lineno or 1) from None
    if statements is False and kind == "statements":
        raise CodeError("an expression is wanted here, not statements")
    bound: set[str] = set()
    loaded: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                loaded.setdefault(node.id, node.lineno)
            else:
                bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
    free = {n for n in loaded if n not in bound and n not in symbols and n not in FREE and decode(n) is None}
    return variables(text), free, kind


def bound_in(text: str) -> set[str]:
    """Every plain identifier a pattern spells out, so that edits may use it."""
    found = set()
    for node in ast.walk(ast.parse(encode(text))):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
        if isinstance(name, str) and decode(name) is None:
            found.add(name)
    return found


def rewrite(node: Any, change: Callable[[Any, Any], Any], parent: Any = None) -> Any:  # noqa: ANN401 - any node class
    """A copy of a tree: `change(node, parent)` gives a replacement, a list to splice, or NotImplemented to go on below.

    Only what changed is copied; everything else is shared.
    """
    result = change(node, parent)
    if result is not NotImplemented:
        return result
    changes: dict[str, object] = {}
    kind: Any = type(node)
    for name in code_fields(kind):
        value = getattr(node, name)
        if is_code[type(value)]:
            new = rewrite(value, change, node)
            if new is not value:
                changes[name] = new
        elif isinstance(value, (list, tuple)) and value:
            items: list[object] = []
            for item in value:
                new = rewrite(item, change, node) if is_code[type(item)] else item
                items.extend(new) if isinstance(new, list) else items.append(new)
            if len(items) != len(value) or any(a is not b for a, b in zip(items, value)):
                changes[name] = items
    return node.with_changes(**changes) if changes else node


def _unreferenced(node: cst.CSTNode, parent: Any) -> bool:  # noqa: ANN401
    """Whether a Name is not a reference: an attribute, a keyword, a parameter's or definition's own name."""
    return (
        (isinstance(parent, cst.Attribute) and parent.attr is node)
        or (isinstance(parent, cst.Arg) and parent.keyword is node)
        or (isinstance(parent, (cst.Param, cst.FunctionDef, cst.ClassDef)) and parent.name is node)
    )


def resolve(node: Any, symbols: Mapping[str, str], local: Iterable[str] = ()) -> Any:  # noqa: ANN401
    """The tree with every name found in `symbols` made absolute."""
    from porter.source.names import dotted

    shadowed = frozenset(local)

    def change(each: Any, parent: Any) -> Any:  # noqa: ANN401
        if isinstance(each, (cst.Import, cst.ImportFrom)):
            return each
        if isinstance(each, (cst.Name, cst.Attribute)) and not _unreferenced(each, parent):
            path = dotted(each)
            if path is not None:
                root = path.split(".", 1)[0]
                found = None if root in shadowed else resolve_chain(path, symbols)
                return each if found is None else cst.parse_expression(found)
        return NotImplemented

    return rewrite(node, change)


def stored_names(text: str) -> set[str]:
    """Names a code text assigns or takes as parameters."""
    tree = ast.parse(encode(text))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return names | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}


class Template(Struct, frozen=True, dict=True):
    """Code of an edit, parsed when it is first used."""

    text: str
    symbols: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _statements(self) -> list[cst.BaseStatement]:
        module = cst.parse_module(encode(self.text))
        body = resolve(module, self.symbols, stored_names(self.text)).body
        if module.header and body:  # comments above the first statement belong to it
            body = [body[0].with_changes(leading_lines=[*module.header, *body[0].leading_lines]), *body[1:]]
        return list(body)

    @cached_property
    def _expression(self) -> cst.BaseExpression:
        return resolve(cst.parse_expression(encode(self.text.strip())), self.symbols, stored_names(self.text.strip()))

    def expression(self, lookup: Lookup) -> cst.BaseExpression:
        """The code as an expression, with captures spliced in."""
        node = self._expression
        if isinstance(node, cst.Name) and (found := decode(node.value)):
            return as_expression(lookup(found[1]))
        return splice(node, lookup)

    def statements(self, lookup: Lookup) -> list[cst.BaseStatement]:
        """The code as statements, with captures spliced in."""
        result: list[cst.BaseStatement] = []
        for node in self._statements:
            new = splice(node, lookup)
            result.extend(new) if isinstance(new, list) else result.append(new)
        return result


def as_expression(value: object) -> cst.BaseExpression:
    """A binding as an expression. Raises CodeError if it can't be one."""
    if isinstance(value, cst.BaseExpression):
        return value
    if isinstance(value, (cst.Arg, cst.Element)):
        return value.value
    if isinstance(value, (cst.ClassDef, cst.FunctionDef)):
        return value.name
    if isinstance(value, str):
        return cst.parse_expression(value)
    if value is None or isinstance(value, (bool, int, float)):
        return cst.parse_expression(repr(value))
    if isinstance(value, Unknown):
        raise CodeError(f"what the code needs is not known: {value.reason}")
    raise CodeError(f"{type(value).__name__} can't be spliced as an expression")


def splice(node: Any, lookup: Lookup) -> Any:  # noqa: ANN401 - any node class
    """The tree with its metavariables replaced. A list if the node itself stood for many."""

    def change(each: Any, parent: Any) -> Any:  # noqa: ANN401
        many = _standing(each)
        if many is not None:
            kind, path = many
            if kind == MANY:
                value = lookup(path)
                return list(value) if isinstance(value, (tuple, list)) else [value]
            if isinstance(each, cst.SimpleStatementLine):
                value = lookup(path)
                if isinstance(value, (tuple, list)):
                    return list(value)
                if isinstance(value, cst.BaseStatement):
                    return value
        if isinstance(each, cst.Name) and (found := decode(each.value)):
            value = as_expression(lookup(found[1]))
            if _unreferenced(each, parent):
                return value if isinstance(value, cst.Name) else _name_of(value)
            return _fitting(value, parent, each)
        if isinstance(each, cst.SimpleString) and _ENCODED.search(each.value):
            return each.with_changes(value=_ENCODED.sub(lambda m: _quoted(lookup, m[0]), each.value))
        return NotImplemented

    return rewrite(node, change)


def _quoted(lookup: Lookup, identifier: str) -> str:
    found = decode(identifier)
    return readable(lookup(found[1] if found else identifier)).replace('"', "'")


def _name_of(value: cst.BaseExpression) -> cst.Name:
    if isinstance(value, cst.SimpleString) and str(value.evaluated_value).isidentifier():
        return cst.Name(str(value.evaluated_value))
    raise CodeError(f"`{code(value)}` can't be used as a name")


def _standing(node: cst.CSTNode) -> tuple[str, str] | None:
    """The metavariable that makes up a whole statement, argument, element or parameter."""
    inner: object = None
    if isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1 and isinstance(node.body[0], cst.Expr):
        inner = node.body[0].value
    elif isinstance(node, (cst.Arg, cst.Element)) and not getattr(node, "keyword", None):
        inner = node.value
    elif isinstance(node, cst.Param):
        inner = node.name
    return decode(inner.value) if isinstance(inner, cst.Name) else None


def _fitting(value: cst.BaseExpression, parent: Any, hole: cst.CSTNode) -> cst.BaseExpression:  # noqa: ANN401
    """Parentheses only where the new place needs them."""
    if isinstance(parent, _BRACKETED) and not isinstance(
        value, (cst.Tuple, cst.GeneratorExp, cst.Yield, cst.NamedExpr)
    ):
        return value.with_changes(lpar=[], rpar=[]) if getattr(value, "lpar", ()) else value
    if isinstance(parent, _LOOSE) and "\n" not in code(value):
        return value
    return atomic(value)
