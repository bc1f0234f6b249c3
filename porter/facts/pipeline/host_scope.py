"""What is known at one point of the statements that are followed for their media."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import libcst as cst
from msgspec import Struct, field

from porter.facts.pipeline.host_program import GROWING
from porter.facts.pipeline.liveness import names_of, uses
from porter.source.tree import find


class Scope(Struct):
    """What is known at one point. `holes` are other names, or values, of locals of a method that is followed.

    `known` names have, where they are bound, a value that the program computes, too; `bound` ones are so on every path.
    `why` says for other names what only the worker has; `fresh` are lists that the program itself made. `given` are the
    caller's names for parameters of a method that is followed.
    """

    known: set[str]
    bound: set[str]
    media: set[str]
    holes: dict[str, cst.BaseExpression] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    given: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Scope:
        own = (set(self.known), set(self.bound), set(self.media), self.holes, dict(self.why), set(self.fresh))
        return Scope(*own, self.given)

    def bind(self, names: Iterable[str]) -> None:
        for name in names:
            self.known.add(name)
            self.bound.add(name)
            self.why.pop(name, None)

    def join(self, ends: Sequence[Scope]) -> None:
        """The scope behind branches, of which `ends` reach the following statement."""
        if not ends:
            return
        self.why = {n: r for s in ends for n, r in s.why.items()}
        self.known = set.union(*(s.known for s in ends)) - self.why.keys()
        self.bound = set.intersection(*(s.bound for s in ends)) - self.why.keys()
        self.fresh = set.intersection(*(s.fresh for s in ends))
        self.media = set.union(*(s.media for s in ends))


def tainted(node: cst.CSTNode, media: set[str]) -> set[str]:
    """Names that get something of the media in a statement."""
    found: set[str] = set()
    for each in find(node, cst.Assign, cst.For, cst.Call):
        if isinstance(each, cst.Assign) and uses(each.value) & (media | found):
            found |= {n for t in each.targets for n in names_of(t.target)}
        elif isinstance(each, cst.For) and uses(each.iter) & (media | found):
            found |= names_of(each.target)
        elif isinstance(each, cst.Call) and isinstance(each.func, cst.Attribute):
            if each.func.attr.value in GROWING and any(uses(a.value) & (media | found) for a in each.args):
                found |= uses(each.func.value)
    return found
