"""The root's forward, followed from the place where tokens are divided to the one where they are put together."""

from __future__ import annotations

import libcst as cst

from porter.facts.sequence.calls import Env, Findings
from porter.facts.sequence.classes import Classes
from porter.facts.sequence.follow import Frame
from porter.facts.sequence.places import Gather, Stream
from porter.facts.sequence.region import maybe_none
from porter.facts.sequence.values import (
    NONE,
    Either,
    Instance,
    Length,
    Many,
    Named,
    NotShardable,
    Tokens,
    Value,
    Whole,
    counted,
    flattened,
    has_tokens,
    opaque,
    same_length,
    whole,
)
from porter.source import tree


class Copied(NotShardable):
    """A variable holds the same tensor as a stream where the region starts."""

    def __init__(self, name: str, stream: Stream) -> None:
        super().__init__(f"{name} holds a stream as well")
        self.name, self.stream = name, stream


class Root(Frame):
    """The root's forward: the region starts at the first loop and ends at the gather."""

    def __init__(
        self, classes: Classes, owner: str, region: set[int], streams: tuple[Stream, ...], gather: Gather | None
    ) -> None:
        super().__init__(classes, Findings(), owner)
        self.region, self.gather = region, gather
        self.streams = {s.name: s for s in streams}
        self.read_later: frozenset[str] = frozenset()
        self.empty: frozenset[str] = frozenset()
        self.left = len(region)
        self.finished = False
        self.problem: NotShardable | None = None
        self.calls: list[Gather] = []
        self.optional: frozenset[str] = frozenset()
        self.recounted: dict[str, Stream] = {}

    def start(self, forward: cst.FunctionDef, refused: tuple[str, ...]) -> None:
        env: Env = {"self": Instance((self.owner,))}
        for param in tree.parameters(forward)[1:]:
            name = param.name.value
            env[name] = NONE if name in refused else whole("source", name=name)
            if name in self.empty:
                env[name] = Named(())
        self.maybe_none = maybe_none(forward)
        try:
            self.block(tree.body(forward), env)
            if any(isinstance(v, Tokens) for r in self.returned for v in flattened(r)):
                raise NotShardable("the result is not put together")
        except NotShardable as problem:
            self.problem = problem

    def statement(self, stmt: cst.BaseStatement, env: Env) -> bool:
        if id(stmt) in self.region and self.left == len(self.region):
            self.divide(env)
        reached = super().statement(stmt, env)
        if id(stmt) in self.region:
            self.left -= 1
            if self.left == 0:
                self.finished = True
                if self.gather is not None and self.gather.module is None:
                    for each in (self.gather, *self.gather.also):
                        held = env.get(each.variable)
                        if not isinstance(held, Tokens) or held.parts != (each.stream,):
                            raise NotShardable(f"{each.variable} holds several streams where it is put together")
                        env[each.variable] = whole("opaque", name="gathered")
        elif self.finished and isinstance(stmt, cst.SimpleStatementLine):
            self.note(stmt, env)
        return reached

    def divide(self, env: Env) -> None:
        held = {id(v): s for n, s in self.streams.items() if isinstance(v := env.get(n), Whole) and v.kind != "fixed"}
        for name, value in env.items():
            if name in self.read_later and name not in self.streams and id(value) in held:
                raise Copied(name, held[id(value)])
        self.optional = frozenset(n for n in env if n in self.maybe_none)
        before = dict(env)
        for name, value in list(env.items()):
            if name in self.streams and value != NONE:
                held_by = self.streams[name]
                env[name] = Tokens(held_by.rank, held_by.axis, (held_by.tokens,))
            elif (stream := self.counted(value, before)) is not None and name in self.read_later:
                env[name] = Length((stream.tokens,))
                self.recounted[name] = stream
            elif name != "self":
                env[name] = _marked(name, value, ())

    def counted(self, value: Value, env: Env) -> Stream | None:
        """The stream whose number of tokens this is."""
        found = counted(value)
        if found is None:
            return None
        tensor, axis = found
        return next(
            (s for s in self.streams.values() if s.axis == axis and same_length(env.get(s.name, NONE), tensor)), None
        )

    def note(self, stmt: cst.SimpleStatementLine, env: Env) -> None:
        """A statement `x = self.module(...)` after the loops whose result is tokens of one stream."""
        small = stmt.body[0]
        if not isinstance(small, cst.Assign) or not isinstance(small.value, cst.Call):
            return
        target, module = small.targets[0].target, tree.self_attribute(small.value.func)
        if not isinstance(target, cst.Name) or module is None:
            return
        value = env.get(target.value)
        if isinstance(value, Tokens) and value.rank == 3 and len(value.parts) == 1:
            self.calls.append(Gather(stmt, module, target.value, value.parts[0]))
            if self.gather is not None and self.gather.statement is stmt:
                env[target.value] = whole("opaque", name="gathered")


def _entry_of(name: str, key: str, value: Value) -> Value:
    return whole("item", args=(key,), base=(_marked(name, value, ()),)) if isinstance(value, Whole) else value


def _marked(name: str, value: Value, path: tuple[int, ...]) -> Value:
    if isinstance(value, Many):
        return Many(tuple(_marked(name, v, (*path, i)) for i, v in enumerate(value.items)))
    if isinstance(value, Named):
        return Named(tuple((k, _entry_of(name, k, v)) for k, v in value.items))
    if isinstance(value, Either) and not has_tokens(value):
        value = opaque(list(value.options))
    if not isinstance(value, Whole) or value.kind == "fixed":
        return value
    result: Value = whole("boundary", name=name, base=(value,))
    for at in path:
        result = whole("item", args=(at,), base=(result,))
    return result
