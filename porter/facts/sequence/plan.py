"""Where the sequence is divided and where it is put together again."""

from __future__ import annotations

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.module_tree import module_tree
from porter.facts.sequence.calls import AttentionUse, Counted, Findings
from porter.facts.sequence.classes import Classes
from porter.facts.sequence.places import Gather, Stream
from porter.facts.sequence.region import block_loops, handed_on, read_after, read_behind
from porter.facts.sequence.root import Copied, Root
from porter.facts.sequence.shapes import Joined, Paired, Parallel
from porter.facts.sequence.tables import Entry, variables
from porter.facts.sequence.values import (
    NotShardable,
    Tokens,
    forget,
    origins,
)
from porter.model import Unit, Unknown
from porter.source import tree
from porter.source.library import Library


class SequencePlan(Struct, frozen=True):
    """How one denoiser is divided.

    `start` is the loop before which the tokens are divided; `streams` the variables that hold tokens there; `tables` what has
    one entry per token; `modulations` what has one or is the same for all, and `undivided` that of it which must be the same;
    `restored` what of these is needed whole behind the place where tokens are put together; `attention` every attention call
    and what it is given; `optional` the variables that may be None at the start; `refused` the inputs that the plan has no
    place for, which must be None; `mixing` lists of blocks and a class of blocks they may be of, which mixes tokens;
    `recounted` the variables that hold the number of tokens of a stream; `counted` the expressions whose number of tokens is
    that of all ranks.
    """

    start: cst.BaseStatement
    streams: tuple[Stream, ...]
    tables: tuple[Entry, ...]
    modulations: tuple[Entry, ...]
    undivided: tuple[Entry, ...]
    restored: tuple[str, ...]
    attention: tuple[AttentionUse, ...]
    gather: Gather
    optional: frozenset[str]
    refused: tuple[str, ...]
    mixing: tuple[tuple[str, str], ...]
    recounted: tuple[tuple[str, Stream], ...]
    counted: tuple[Counted, ...]

    def switched(self) -> frozenset[str]:
        """Classes whose attention is divided in one place of the model and not in another."""
        inside = {u.owner for u in self.attention if u.key is not None}
        return frozenset(u.owner for u in self.attention if u.key is None) & inside

    def outside(self) -> frozenset[str]:
        """Attributes of the root that hold the undivided ones of these."""
        return frozenset(u.origin for u in self.attention if u.key is None and u.owner in self.switched())


_last: list[tuple[Unit, SequencePlan | Unknown]] = []


def sequence_plan(unit: Unit) -> SequencePlan | Unknown:
    """The plan of a unit after lowering, or why there is none. `unit.facts["library"]` gives sources of imported classes."""
    if not (_last and _last[0][0] is unit):
        forget()
        library = unit.facts.get("library")
        _last[:] = [(unit, _plan(unit, library if isinstance(library, Library) else None))]
    return _last[0][1]


def _plan(unit: Unit, library: Library | None) -> SequencePlan | Unknown:
    modules = module_tree(unit)
    root = modules.get(unit.root)
    forward = tree.method(root.definition.node, "forward") if root is not None else None  # type: ignore[arg-type]
    if forward is None:
        return Unknown("the class has no forward")
    classes = Classes(modules, library)
    lists = {p[:-2] for p in root.sites if p.endswith(".*")}  # type: ignore[union-attr]
    steps = [s for s in tree.body(forward) if block_loops(s, lists)]
    reasons: list[str] = []
    for first in range(len(steps)):
        region = steps[first:]
        for axis in (1, 0):
            for refused in _refusals(forward):
                try:
                    return _with_more_streams(_Search(unit, classes, forward, region, refused), axis)
                except NotShardable as problem:
                    if axis == 1 and not refused:
                        reasons.append(str(problem))
    return Unknown(reasons[0] if reasons else "there is no loop over blocks")


def _refusals(forward: cst.FunctionDef) -> list[tuple[str, ...]]:
    """Sets of optional inputs to do without: first none of them."""
    optional = [p.name.value for p in tree.parameters(forward) if tree.is_none(p.default)]
    residuals = tuple(n for n in optional if "controlnet" in n or "cache" in n)
    masks = tuple(n for n in optional if n == "attention_mask")
    return list(dict.fromkeys([(), residuals, masks, (*residuals, *masks)]))


def _with_more_streams(search: _Search, axis: int) -> SequencePlan:
    """Streams are what the blocks hand on, and what they put beside it (text whose blocks don't change it)."""
    streams = tuple(Stream(n, 3, axis, n) for n in handed_on(search.region, search.forward))
    for _ in range(6):
        try:
            return search.plan(streams)
        except Joined as problem:
            others = [v for v in problem.values if not isinstance(v, Tokens)]
            rank = next(v.rank for v in problem.values if isinstance(v, Tokens))
            found = {n for v in others for n in variables(v, problem.axis, rank)} - {s.name for s in streams}
            if len(found) != 1:
                raise
            rank = 2 if "mask" in min(found) else 3
            streams = (*streams, Stream(min(found), rank, 1, min(found)))
        except Copied as problem:
            streams = (*streams, replace(problem.stream, name=problem.name))
        except Paired:
            if search.pairs:
                raise
            search.pairs = True
        except Parallel as problem:
            streams = tuple(replace(s, tokens=problem.second) if s.tokens == problem.first else s for s in streams)
    raise NotShardable("more and more tensors are concatenated with the tokens")


class _Search:
    """Tries places for the gather, the latest first."""

    def __init__(
        self,
        unit: Unit,
        classes: Classes,
        forward: cst.FunctionDef,
        region: list[cst.BaseStatement],
        refused: tuple[str, ...],
    ) -> None:
        self.unit, self.classes, self.forward, self.region, self.refused = unit, classes, forward, region, refused
        self.pairs = False

    def plan(self, streams: tuple[Stream, ...]) -> SequencePlan:
        if not streams:
            raise NotShardable("the blocks hand no tensor on")
        scan = self.follow(streams, None)
        problem: NotShardable | None = scan.problem
        if not scan.finished:
            assert problem is not None
            raise problem
        singles = [Gather(self.region[-1], None, s.name, s.name) for s in streams if s.rank == 3]
        places = [*reversed(scan.calls), *singles, replace(singles[0], also=tuple(singles[1:]))]
        for place in places:
            run = self.follow(streams, place)
            tables = tuple(sorted(run.findings.met.entries, key=lambda e: (e.variable, e.path, e.axis, e.rank or 0)))
            certain = tuple(t for t in tables if t.certain)
            needed = read_behind(self.forward, place.statement)
            if run.problem is None:
                self._check(certain)
                attention = tuple(u for uses in run.findings.attention.values() for u in uses)
                _check_attention(attention)
                modulations, undivided = _modulations(tables, run.findings.met.hidden)
                divided = dict.fromkeys(t.variable for t in (*modulations, *certain))
                return SequencePlan(
                    self.region[0],
                    streams,
                    certain,
                    modulations,
                    undivided,
                    tuple(v for v in divided if v in needed),
                    attention,
                    place,
                    run.optional,
                    self.refused,
                    tuple(sorted(run.findings.mixing)),
                    tuple(sorted(run.recounted.items())),
                    _counted(run.findings, certain, attention),
                )
            problem = problem or run.problem
        raise problem if problem is not None else NotShardable("the tokens can't be put together again")

    def follow(self, streams: tuple[Stream, ...], gather: Gather | None) -> Root:
        run = Root(self.classes, self.unit.root, set(map(id, self.region)), streams, gather)
        run.empty = frozenset(self.unit.facts.get("refused", ()))  # type: ignore[call-overload]
        run.findings.pairs = self.pairs
        run.read_later = read_after(self.forward, self.region[0])
        run.start(self.forward, self.refused)
        return run

    @staticmethod
    def _check(tables: tuple[Entry, ...]) -> None:
        seen: dict[tuple[str, tuple[int, ...], int | None], Entry] = {}
        for entry in tables:
            key = (entry.variable, entry.path, entry.rank)
            if key in seen and (seen[key].axis, seen[key].parts) != (entry.axis, entry.parts):
                raise NotShardable(f"{entry.variable} is used for tokens of different streams")
            seen[key] = entry
            if not entry.variable:
                raise NotShardable("a tensor is grown to the number of all tokens")
            if len(entry.path) > 2 or (len(entry.path) == 2 and len(entry.parts) > 1):
                raise NotShardable(f"{entry.variable} is a nested tuple")
        tuples: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for entry in tables:
            if entry.path:
                tuples.setdefault((entry.variable, entry.path[:-1]), []).append(entry.path[-1])
        for (variable, _), elements in tuples.items():
            if len(elements) < 2 or sorted(elements) != list(range(len(elements))):
                raise NotShardable(f"{variable} is a tuple of which not all elements count tokens")


def _counted(findings: Findings, tables: tuple[Entry, ...], attention: tuple[AttentionUse, ...]) -> tuple[Counted, ...]:
    """Numbers of all tokens; one that is compared with the length of a table stays this rank's, as the table's is."""
    divided = {t.variable for t in tables}
    found = tuple(c for c in findings.counted.values() if not divided & origins(c.beside))
    whole_keys = {u.owner for u in attention if u.key is None}
    for each in found:
        if each.owner in whole_keys:
            raise NotShardable(f"{each.owner} counts divided tokens and whole ones")
    return found


def _modulations(tables: tuple[Entry, ...], elsewhere: set[str]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """What may have one entry per token: that which is divided then, and that which can't be, because it has another use."""
    divided = {t.variable for t in tables if t.certain}
    found: dict[str, Entry] = {}
    for entry in tables:
        if not entry.certain and entry.variable not in divided:
            if found.setdefault(entry.variable, entry) != entry:
                elsewhere = elsewhere | {entry.variable}
    entries = found.values()
    return tuple(e for e in entries if e.variable not in elsewhere), tuple(
        e for e in entries if e.variable in elsewhere
    )


def _check_attention(uses: tuple[AttentionUse, ...]) -> None:
    """Every attention layer is either always inside the divided part, with the same streams, or always outside."""
    if not any(u.key is not None for u in uses):
        raise NotShardable("no attention goes over the tokens")
    for use in uses:
        for other in uses:
            if use.owner == other.owner and use.origin == other.origin and (use.key is None) != (other.key is None):
                raise NotShardable(f"{use.owner} attends to divided tokens and to whole ones")
            inside = use.key is not None and other.key is not None
            if use.call is other.call and inside and (use.query, use.key) != (other.query, other.key):
                raise NotShardable(f"{use.owner} attends to different streams")
