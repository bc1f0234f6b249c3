"""What `__call__` makes of pictures, masks and videos before it needs a model: the part that another process can do.

The statements up to the loop are followed with the names whose values the request, literals and the checkpoint's json
files give. A *unit* is a place where an image or video processor gets something of the request's media and everything it
reads is known in that way: a statement as a whole (a branch or a loop with all that is in it), or one call within a
statement. Units in a method that the call makes are followed into it. The program that computes all units is the source's
own statements, without those that no unit needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.host_places import Refused, Unit
from porter.facts.pipeline.host_program import (
    branch,
    changed_by,
    grown,
    hand_over,
    is_message,
    merged,
    needed,
    only_suite,
    quiet,
    suite_of,
    without_copies,
)
from porter.facts.pipeline.host_scope import Scope, tainted
from porter.facts.pipeline.host_values import HostValues
from porter.facts.pipeline.liveness import always_writes, leaves, live_before, names_of, uses, writes
from porter.model import Unknown
from porter.source.marks import mark_of
from porter.source.names import DOT
from porter.source.tree import (
    arguments,
    body,
    code,
    find,
    own_parameters,
    self_attribute,
    statement,
    strip_docstring,
    substitute,
    with_body,
)

_WORKER = frozenset({"generator"})


class HostMedia(Struct, frozen=True):
    """The program over the parameters of the call, the units that it computes, and the methods that have units in them."""

    program: tuple[cst.BaseStatement, ...]
    units: tuple[Unit, ...]
    methods: Mapping[str, cst.Call]
    refused: tuple[Refused, ...]


def host_media(
    statements: Sequence[cst.BaseStatement],
    parameters: Iterable[str],
    media: Iterable[str],
    processors: frozenset[str],
    helpers: Mapping[str, cst.FunctionDef],
    values: HostValues,
    after: Iterable[str],
) -> HostMedia:
    """Units of the statements. `after` are names read behind them; `processors` attributes that are image processors."""
    given = set(parameters) - _WORKER
    scope = Scope(given, set(given), set(media))
    walk = _Walk(processors, helpers, values, {*parameters, *writes(statements)})
    program = walk.block(statements, scope, frozenset(after))
    program = without_copies(needed(program, walk.whole, set()))
    return HostMedia(tuple(program), tuple(walk.units), walk.methods, tuple(walk.refused))


class _Walk:
    """Follows statements; collects units, and what has to stay."""

    def __init__(
        self, processors: frozenset[str], helpers: Mapping[str, cst.FunctionDef], values: HostValues, taken: set[str]
    ) -> None:
        self.processors, self.helpers, self.values, self.taken = processors, helpers, values, taken
        self.units: list[Unit] = []
        self.refused: list[Refused] = []
        self.methods: dict[str, cst.Call] = {}
        self.whole: set[int] = set()

    # -- walking ---------------------------------------------------------------------------------------------------

    def block(
        self, statements: Sequence[cst.BaseStatement], scope: Scope, after: frozenset[str]
    ) -> list[cst.BaseStatement]:
        """The program of a list of statements; the scope is that behind them in the end."""
        out: list[cst.BaseStatement] = []
        for index, each in enumerate(statements):
            out += self._statement(each, scope, live_before(statements[index + 1 :], after))
        return out

    def _statement(self, node: cst.BaseStatement, scope: Scope, after: frozenset[str]) -> list[cst.BaseStatement]:
        sites = self._sites(node, scope)
        trial = scope.copy()
        found = self._check([node], trial)
        new = self._resolved(node, scope) if found is None else found
        if not isinstance(new, Unknown):
            captured = self._capture(node, new, scope, trial, after) if sites else [new]
            if captured is None and not isinstance(node, cst.If):
                self._refuse(
                    node,
                    sites if (writes([node]) | grown(node)) & after else (),
                    "what it binds is not bound on every path",
                )
                captured = [new]
            if captured is not None:
                scope.join([trial])
                self._taint(node, scope)
                return captured
        if isinstance(node, cst.If) and not isinstance(self._host(node.test, scope), Unknown):
            return self._branches(node, scope, after)
        if isinstance(node, cst.With):
            return self.block(body(node), scope, after)
        out = self._values(node, sites, scope) if isinstance(node, cst.SimpleStatementLine) else None
        reason = new.reason if isinstance(new, Unknown) else ""
        if out is None:
            self._refuse(node, sites, reason)
        self._forget(node, scope, reason)
        self._taint(node, scope)
        return out or []

    def _branches(self, node: cst.If, scope: Scope, after: frozenset[str]) -> list[cst.BaseStatement]:
        then, other = scope.copy(), scope.copy()
        test = self._host(node.test, scope)
        assert not isinstance(test, Unknown)
        first = self.block(body(node), then, after)
        rest: list[cst.BaseStatement] = []
        if node.orelse is not None:
            rest = self.block([node.orelse] if isinstance(node.orelse, cst.If) else body(node.orelse), other, after)  # type: ignore[list-item]
        open_ends = [s for s, suite in ((then, body(node)), (other, suite_of(node.orelse))) if not leaves(suite)]
        scope.join(open_ends)
        return [branch(node, cast(cst.BaseExpression, test), first, rest)]

    # -- what a unit is --------------------------------------------------------------------------------------------

    def _sites(self, node: cst.CSTNode, scope: Scope) -> list[cst.Call]:
        """Calls of processors, and of methods that call one, with something of the media."""
        media = set(scope.media)
        for _ in range(2):
            media |= tainted(node, media)
        found = []
        for call in find(node, cst.Call):
            owner = call.func.value if isinstance(call.func, cst.Attribute) else None
            direct = owner is not None and self_attribute(owner) in self.processors
            if (direct or self._has_sites(self_attribute(call.func))) and any(uses(a.value) & media for a in call.args):
                found.append(call)
        return found

    def _has_sites(self, name: str | None, seen: frozenset[str] = frozenset()) -> bool:
        if name is None or name not in self.helpers or name in seen:
            return False
        for call in find(self.helpers[name], cst.Call):
            if isinstance(call.func, cst.Attribute) and self_attribute(call.func.value) in self.processors:
                return True
            if self._has_sites(self_attribute(call.func), seen | {name}):
                return True
        return False

    def _capture(
        self,
        node: cst.BaseStatement,
        new: cst.BaseStatement,
        before: Scope,
        behind: Scope,
        after: frozenset[str],
    ) -> list[cst.BaseStatement] | None:
        """The statement with what it hands over behind it; None if it can't be taken as a whole."""
        names = tuple(sorted((writes([node]) | grown(node)) & after))
        if not names:
            return None
        only = only_suite(node)
        if only is not None:
            if not set(names) <= before.bound | always_writes(only):
                return None
            keys = self._keys(names, before)
            self.units.append(Unit(node, keys, names))
            suite = [*(only_suite(new) or ()), *hand_over(keys, self._values_of(names, before))]
            inner = branch(new, new.test, suite, []) if node.orelse is None else branch(new, new.test, [], suite)  # type: ignore[arg-type, attr-defined]
            inner = with_body(inner, merged(body(inner)))
            self.whole.add(id(inner))
            return [inner]
        if not set(names) <= behind.bound:
            return None
        keys = self._keys(names, before)
        self.units.append(Unit(node, keys, names))
        self.whole.add(id(new))
        return [new, *hand_over(keys, self._values_of(names, before))]

    def _values_of(self, names: Sequence[str], scope: Scope) -> list[cst.BaseExpression]:
        return [scope.holes.get(name, cst.Name(name)) for name in names]

    def _keys(self, names: Sequence[str], scope: Scope) -> tuple[str, ...]:
        """Keys under which values are handed over: their names, those of the caller for parameters of a method."""
        wanted = [scope.given.get(name, name) for name in names]
        taken = {k for u in self.units for k in u.keys}
        return tuple(next(k for k in (n, *(f"{n}_{i}" for i in range(2, 99))) if k not in taken) for n in wanted)

    def _values(
        self, node: cst.SimpleStatementLine, sites: Sequence[cst.Call], scope: Scope
    ) -> list[cst.BaseStatement] | None:
        """Calls within a statement whose other parts need the worker. None if there is none to take."""
        scopes = find(node, cst.ListComp, cst.GeneratorExp, cst.DictComp, cst.Lambda)
        nested = {id(c) for inner in scopes for c in find(inner, cst.Call)}
        out: list[cst.BaseStatement] = []
        left = []
        for call in sites:
            if id(call) in nested:
                left.append((call, "it is one of several calls, made with a value each that the worker has"))
                continue
            name = self_attribute(call.func)
            new = self._method(name, call, scope) if name is not None else self._host(call, scope)
            if isinstance(new, Unknown):
                left.append((call, new.reason))
            elif isinstance(new, list):
                out += new
            else:
                keys = self._keys([_target(node) or "media"], scope)
                self.units.append(Unit(call, keys, ()))
                out += hand_over(keys, [cast(cst.BaseExpression, new)])
        for call, reason in left:
            self._refuse(node, [call], reason)
        return out

    def _method(self, name: str, call: cst.Call, scope: Scope) -> list[cst.BaseStatement] | Unknown:
        """The program of a method that the call makes, with its arguments for its parameters."""
        if name in self.methods:
            return Unknown(f"self.{name} is called at more than one place")
        function = self.helpers[name]
        names = [p.name.value for p in own_parameters(function)]
        bound = arguments(call, names)
        if bound is None:
            return Unknown(f"self.{name} is called with unnamed arguments")
        statements = strip_docstring(body(function))
        inner, out = Scope(set(), set(), set()), []
        local = writes(statements)
        for parameter in own_parameters(function):
            argument, p = bound.get(parameter.name.value, parameter.default), parameter.name.value
            value = self._host(argument, scope) if argument is not None else Unknown(f"{p} is not given")
            if isinstance(value, Unknown):
                inner.why[p] = value.reason
                continue
            inner.bind([p])
            if argument is not None and uses(argument) & scope.media:
                inner.media.add(p)
            if isinstance(argument, cst.Name):
                inner.given[p] = scope.given.get(argument.value, argument.value)
            if p in local:
                inner.holes[p] = cst.Name(self._free(p))
                out.append(statement("target = value", target=inner.holes[p], value=cast(cst.BaseExpression, value)))
            else:
                inner.holes[p] = cast(cst.BaseExpression, value)
        for each in local - inner.holes.keys():
            inner.holes[each] = cst.Name(self._free(each))
        before = len(self.units)
        out += self.block(statements, inner, frozenset())
        if len(self.units) > before:
            self.methods[name] = call
        return out

    def _free(self, name: str) -> str:
        found = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 99))) if n not in self.taken)
        self.taken.add(found)
        return found

    # -- what is known ---------------------------------------------------------------------------------------------

    def _host(self, node: cst.CSTNode, scope: Scope) -> cst.CSTNode | Unknown:
        """An expression without the worker's object; Unknown if it reads something that only the worker has."""
        for name in sorted(uses(node) - scope.known):
            return Unknown(scope.why.get(name) or f"{name} is known to the worker only")
        if any(self.values.draws(n.value) for n in find(node, cst.Name) if DOT in n.value):
            return Unknown("it draws noise")
        for call in find(node, cst.Call):
            if changed_by(call) is not None and not self._grows_own(call, scope):
                return Unknown(f"{code(call.func).replace(DOT, '.')} changes a value in place")
        return self.values.expression(substitute(node, scope.holes))

    def _grows_own(self, call: cst.Call, scope: Scope) -> bool:
        """Whether a call adds to a list that the program itself made."""
        owner = call.func.value if isinstance(call.func, cst.Attribute) else None
        return isinstance(owner, cst.Name) and owner.value in scope.fresh and bool(grown(call))

    def _resolved(self, node: cst.BaseStatement, scope: Scope) -> cst.BaseStatement | Unknown:
        new = self.values.expression(substitute(quiet(node), scope.holes))
        return new if isinstance(new, Unknown) else cast(cst.BaseStatement, new)

    def _check(self, statements: Sequence[cst.BaseStatement], scope: Scope) -> Unknown | None:
        """None if all that the statements do can be done without the worker; the scope is that behind them then."""
        for node in statements:
            found = self._check_one(node, scope)
            if found is not None:
                return found
        return None

    def _check_one(self, node: cst.BaseStatement, scope: Scope) -> Unknown | None:
        if isinstance(node, cst.SimpleStatementLine):
            return next((f for s in node.body if (f := self._check_small(s, scope)) is not None), None)
        if isinstance(node, cst.If):
            test = self._host(node.test, scope)
            if isinstance(test, Unknown):
                return test
            then, other = scope.copy(), scope.copy()
            found = self._check(body(node), then)
            found = found if found is not None else self._check(suite_of(node.orelse), other)
            scope.join([s for s, suite in ((then, body(node)), (other, suite_of(node.orelse))) if not leaves(suite)])
            return found
        if isinstance(node, cst.For) and node.orelse is None:
            over = self._host(node.iter, scope)
            if isinstance(over, Unknown):
                return over
            inner = scope.copy()
            inner.bind(names_of(node.target))
            found = self._check(body(node), inner)
            scope.join([scope.copy(), inner])
            return found
        return Unknown(f"a `{type(node).__name__.lower()}` statement is not followed")

    def _check_small(self, node: cst.BaseSmallStatement, scope: Scope) -> Unknown | None:
        if isinstance(node, (cst.Pass, cst.Break, cst.Continue)):
            return None
        if isinstance(node, cst.Assign) and all(_names_only(t.target) for t in node.targets):
            found = self._host(node.value, scope)
            names = {n for t in node.targets for n in names_of(t.target)}
            if isinstance(found, Unknown):
                return found
            scope.bind(names)
            new = isinstance(node.value, (cst.List, cst.ListComp, cst.Dict))
            scope.fresh = scope.fresh | names if new else scope.fresh - names
            return None
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
            if is_message(node.value):
                return None
            found = self._host(node.value, scope)
            return found if isinstance(found, Unknown) else None
        if isinstance(node, cst.Raise):
            found = self._host(node, scope)
            return found if isinstance(found, Unknown) else None
        return Unknown(f"`{code(node).strip().splitlines()[0][:60]}` is not followed")

    def _forget(self, node: cst.BaseStatement, scope: Scope, reason: str) -> None:
        gone = set(writes([node]))
        for assign in find(node, cst.Assign):
            gone |= {n for t in assign.targets if not _names_only(t.target) for n in uses(t.target)}
        gone |= grown(node)
        scope.known -= gone
        scope.bound -= gone
        scope.fresh -= gone
        scope.why |= dict.fromkeys(gone, reason)

    def _taint(self, node: cst.BaseStatement, scope: Scope) -> None:
        for _ in range(2):
            scope.media |= tainted(node, scope.media)

    def _refuse(self, node: cst.BaseStatement, sites: Sequence[cst.Call], reason: str) -> None:
        for call in sites:
            where = next((s for s in _statements(node) if any(c is call for c in find(s, cst.Call))), node)
            self.refused.append(Refused(mark_of(where) or mark_of(node), code(call.func).replace(DOT, "."), reason))


def _statements(node: cst.BaseStatement) -> list[cst.SimpleStatementLine]:
    return list(find(node, cst.SimpleStatementLine))


def _names_only(target: cst.BaseExpression) -> bool:
    if isinstance(target, (cst.Tuple, cst.List)):
        return all(_names_only(e.value) for e in target.elements)
    return isinstance(target, cst.Name)


def _target(node: cst.SimpleStatementLine) -> str | None:
    first = node.body[0]
    names = names_of(first.targets[0].target) if isinstance(first, cst.Assign) else set()
    return next(iter(names)) if len(names) == 1 else None


def host_statements(
    statements: Sequence[cst.BaseStatement], values: HostValues
) -> tuple[list[cst.BaseStatement], frozenset[str]]:
    """Those of the statements that need no worker, and the names that they bind."""
    scope = Scope(set(), set(), set())
    walk = _Walk(frozenset(), {}, values, set())
    return walk.block(statements, scope, frozenset()), frozenset(scope.known)
