"""The closed vocabulary of `where`. Each predicate is one small function of a value, a site and the rule's scope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import libcst as cst
from msgspec import UNSET

from porter.engine.schema import Predicate, Within
from porter.engine.site import Site, derives, qualified_bases
from porter.engine.text import encode, resolve
from porter.model import Unknown
from porter.source.names import DOT
from porter.source.tree import same

if TYPE_CHECKING:
    from porter.engine.rule import Rule

_LITERALS = (cst.Integer, cst.Float, cst.Imaginary, cst.SimpleString, cst.ConcatenatedString)


def holds(predicate: object, value: object, site: Site, rule: Rule) -> bool:
    """Whether a value of `where` (a predicate, or a short form of `is` or `in`) holds."""
    if not isinstance(predicate, Predicate):
        predicate = Predicate(in_=predicate) if isinstance(predicate, list) else Predicate(is_=predicate)  # type: ignore[arg-type]
    if predicate.known is not UNSET and predicate.known == isinstance(value, Unknown):
        return False
    if predicate.absent is not UNSET and predicate.absent != (value is None or value == ()):
        return False
    asked = {name: v for name in _TESTS if (v := getattr(predicate, name)) is not UNSET}
    if isinstance(value, Unknown):
        return not asked
    return all(_TESTS[name](value, wanted, site, rule) for name, wanted in asked.items())


def literal(node: object) -> bool:
    """Whether a value is written out: a number, string, True, False, None, or a collection of these."""
    if not isinstance(node, cst.CSTNode):
        return node is not None
    if isinstance(node, cst.Name):
        return node.value in ("True", "False", "None")
    if isinstance(node, cst.UnaryOperation):
        return literal(node.expression)
    if isinstance(node, (cst.Tuple, cst.List, cst.Set)):
        return all(literal(e.value) for e in node.elements)
    return isinstance(node, _LITERALS)


def conjuncts(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    """The parts of `a and b and c`."""
    if isinstance(node, cst.BooleanOperation) and isinstance(node.operator, cst.And):
        yield from conjuncts(node.left)
        yield from conjuncts(node.right)
    else:
        yield node


def equals(value: object, wanted: object, symbols: Mapping[str, str]) -> bool:
    """Whether a node is this code, or a plain value this value."""
    if not isinstance(value, cst.CSTNode):
        return value == wanted and (isinstance(value, bool) == isinstance(wanted, bool))
    text = wanted if isinstance(wanted, str) else repr(wanted)
    if isinstance(value, cst.Name) and DOT in value.value and value.value.replace(DOT, ".") == text:
        return True
    if isinstance(value, (cst.ClassDef, cst.FunctionDef)):
        return value.name.value == text
    parsed = _parsed(text, tuple(sorted(symbols.items())))
    return parsed is not None and same(value, parsed)


@lru_cache(maxsize=1024)
def _parsed(text: str, symbols: tuple[tuple[str, str], ...]) -> cst.CSTNode | None:
    try:
        return resolve(cst.parse_expression(encode(text)), dict(symbols))
    except cst.ParserSyntaxError:
        return None


def matches_name(value: object, patterns: Iterable[str]) -> bool:
    """Whether a qualified or local name fits one of the patterns, in which `*` stands for anything."""
    if isinstance(value, (cst.ClassDef, cst.FunctionDef)):
        text = value.name.value
    elif isinstance(value, cst.Name):
        text = value.value.replace(DOT, ".")
    elif isinstance(value, cst.Attribute):
        from porter.source.names import dotted

        text = (dotted(value) or value.attr.value).replace(DOT, ".")
    elif isinstance(value, str):
        text = value
    else:
        return False
    return any(fnmatchcase(text, p) for p in patterns)


def stands_within(within: Within, site: Site, rule: Rule) -> bool:
    """Whether a site stands in such a class, method or function."""
    owner, function = site.owner, site.function
    if within.class_ is not None and (owner is None or not fnmatchcase(owner.name.value, within.class_)):
        return False
    if within.method is not None:
        inside = function is not None and site.index.enclosing(function, cst.ClassDef) is not None
        if not inside or not matches_name(function, rule.names(within.method)):
            return False
    return within.function is None or matches_name(function, rule.names(within.function))


def _names(value: object, rule: Rule) -> tuple[str, ...]:
    return rule.names(value)  # type: ignore[arg-type]


def _is(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return equals(value, wanted, rule.symbols)


def _is_not(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return not equals(value, wanted, rule.symbols)


def _in(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    options: Any = rule.names(wanted) if isinstance(wanted, str) else wanted
    return any(equals(value, each, rule.symbols) for each in options)


def _not_in(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return not _in(value, wanted, site, rule)


def _literal(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return literal(value) == wanted


def _is_statement(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    above = site.index.parent(value) if isinstance(value, cst.CSTNode) else None
    return (isinstance(value, cst.BaseStatement) or isinstance(above, cst.Expr)) == wanted


def _conjuncts_include(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return isinstance(value, cst.CSTNode) and any(equals(part, wanted, rule.symbols) for part in conjuncts(value))


def _derives_from(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    owner = value
    if isinstance(value, cst.Name):
        name = value.value.replace(DOT, ".")
        owner = next((d.node for d in site.unit.definitions if f"{d.module}.{d.name}" == name), None)
    return isinstance(owner, cst.ClassDef) and derives(owner, frozenset(_names(wanted, rule)), site.unit)


def _bases_in(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    if not isinstance(value, cst.ClassDef):
        return False
    listed = [wanted] if isinstance(wanted, str) else list(wanted)  # type: ignore[call-overload]
    known = set(_names([w for w in listed if w != "@unit"], rule))
    if "@unit" in listed:  # classes that come along
        known |= {f"{d.module}.{d.name}" for d in site.unit.definitions}
    return all(base in known for base in qualified_bases(value))


def _name_matches(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return matches_name(value, _names(wanted, rule))


def _within(value: object, wanted: object, site: Site, rule: Rule) -> bool:
    return isinstance(wanted, Within) and stands_within(wanted, site, rule)


_TESTS = {
    "is_": _is,
    "is_not": _is_not,
    "in_": _in,
    "not_in": _not_in,
    "literal": _literal,
    "is_statement": _is_statement,
    "conjuncts_include": _conjuncts_include,
    "derives_from": _derives_from,
    "bases_in": _bases_in,
    "name_matches": _name_matches,
    "within": _within,
}
