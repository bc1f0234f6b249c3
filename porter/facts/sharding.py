"""Tensor-parallel roles of linears, inferred from where their results go.

A forward is followed once with a *flow* in place of each tensor: which linears it comes from, whether attention lies
between, whether the head dimension has been split off. The projections that reach an attention call as query, key or
value are column-parallel; the linear that next reads its result is row-parallel. A linear whose result passes only
elementwise functions into another linear forms such a pair, too. Whatever meets a whole tensor on the way stays
replicated: a role is inferred only where every step between is known to act on each shard alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import libcst as cst
from msgspec import Struct, field

from porter.facts.flow import WHOLE, AttentionSite, Flow, Linear
from porter.facts.follow import Analysis, Follower, declared_blocks, escape, flag_test
from porter.facts.module_tree import ClassModules
from porter.source import tree


class Roles(Struct, frozen=True):
    """Inferred roles. `across` holds norms (class, path) applied to all heads at once; `packed` the flows that a
    row-parallel linear reads side by side. `chunks` says how many outputs a linear computes side by side (several numbers
    when the forward has a choice), `blocks` what the model itself says about them, as text; `optional` holds statements
    that project attention only where the projection exists, `tables` the rotary tables as wide as all heads."""

    column: frozenset[Linear]
    row: frozenset[Linear]
    across: frozenset[Linear]
    packed: Mapping[Linear, tuple[Flow, ...]]
    attention: tuple[AttentionSite, ...]
    reads: Mapping[Linear, tuple[cst.BaseExpression, ...]]
    whole: frozenset[Linear] = frozenset()
    chunks: Mapping[Linear, frozenset[int]] = field(default_factory=dict)
    blocks: Mapping[Linear, str] = field(default_factory=dict)
    optional: tuple[tuple[str, cst.If], ...] = ()
    tables: tuple[tuple[str, cst.BaseExpression], ...] = ()


def infer_roles(classes: Mapping[str, ClassModules], root: str) -> Roles:
    """Roles over all classes of a unit; classes are in order of use, callees first.

    A flag that several classes test (`self.context_pre_only`) has one value in all of them, so the forwards are followed
    once for each value; a role must hold in every case.
    """
    flags = _shared_flags(classes)[:3]
    blocks = declared_blocks(classes, "col")
    runs: list[Analysis] = []
    for values in itertools.product((True, False), repeat=len(flags)):
        analysis = Analysis(classes, dict(zip(flags, values, strict=True)), blocks)
        for name in classes:
            Follower(analysis, name).run()
        escape(analysis, analysis.summaries.get(root, WHOLE))
        runs.append(analysis)
    vetoed: set[int] = set()
    while True:
        decided = [_decide(a, vetoed) for a in runs]
        found = set().union(*(v for _, v in decided))
        if found == vetoed:
            return _merged([r for r, _ in decided])
        vetoed = found


def _shared_flags(classes: Mapping[str, ClassModules]) -> list[str]:
    """Attributes tested for truth in the forwards of at least two classes."""
    seen: dict[str, set[str]] = {}
    for name, modules in classes.items():
        forward = tree.method(modules.definition.node, "forward")
        for test in tree.find(forward, cst.If) if forward is not None else ():
            flag = flag_test(test.test)
            if flag is not None:
                seen.setdefault(flag[0], set()).add(name)
    return [flag for flag, owners in seen.items() if len(owners) > 1]


def _merged(runs: list[Roles]) -> Roles:
    """Roles of all cases together. A linear read whole in one case is not row-parallel in any."""
    attention = tuple({id(s.call): s for r in runs for s in r.attention}.values())
    row = frozenset().union(*(r.row for r in runs)) - frozenset().union(*(r.whole for r in runs))
    reads: dict[Linear, tuple[cst.BaseExpression, ...]] = {}
    packed: dict[Linear, tuple[Flow, ...]] = {}
    chunks: dict[Linear, frozenset[int]] = {}
    optional: dict[int, tuple[str, cst.If]] = {}
    tables: dict[int, tuple[str, cst.BaseExpression]] = {}
    for r in runs:
        reads.update(r.reads)
        packed.update(r.packed)
        optional.update({id(stmt): (owner, stmt) for owner, stmt in r.optional})
        tables.update({id(table): (owner, table) for owner, table in r.tables})
        for linear, counts in r.chunks.items():
            chunks[linear] = chunks.get(linear, frozenset()) | counts
    return Roles(
        frozenset().union(*(r.column for r in runs)), row, frozenset().union(*(r.across for r in runs)),
        {k: v for k, v in packed.items() if k in row}, attention, reads,
        chunks=chunks, blocks=runs[0].blocks, optional=tuple(optional.values()),
        tables=tuple(tables.values()),
    )  # fmt: skip


def _decide(a: Analysis, excluded: set[int]) -> tuple[Roles, set[int]]:
    live = {s for s in a.sites if s not in a.escaped_attention} - excluded
    # Query, key and value come from known projections, and the result from a linear that sums, or nothing is sharded.
    live -= {s for s in live if not all(f.linears for f in (a.sites[s].query, a.sites[s].key, a.sites[s].value))}
    live &= {s for flows in a.consumers.values() for f in flows for part in (f, *f.parts) for s in part.attention}
    # One linear for query, key and value: its outputs must be known side by side, or a shard would mix them.
    known = set(a.chunks) | set(a.blocks)
    live -= {s for s in live if any(x not in known for x in a.sites[s].query.linears & a.sites[s].key.linears)}
    live -= {s for s in live if any(f.tainted for f in (a.sites[s].query, a.sites[s].key, a.sites[s].value))}
    while vetoed := {s for flows in a.consumers.values() if not _shardable(flows, live, a)
                     for f in flows for s in f.attention & live}:  # fmt: skip
        live -= vetoed
    fixed = _projections(live, a)
    column = set(fixed)
    row: set[Linear] = set()
    packed: dict[Linear, tuple[Flow, ...]] = {}
    for linear, flows in a.consumers.items():
        sources = {x for f in flows for part in (f, *f.parts) for x in part.linears}
        # In a chain of linears every second one sums; its result is whole again.
        if linear in fixed or sources & row or not _shardable(flows, live, a):
            continue
        row.add(linear)
        parts = next((f.parts for f in flows if f.parts), ())
        if parts:
            packed[linear] = parts
        column |= {x for f in flows for x in f.linears} | {x for p in parts for x in p.linears}
    column -= row
    across = {norm for norm, flows in a.norms.items() if any(f.linears & column and not f.split for f in flows)}
    whole = frozenset(linear for linear in a.consumers if linear not in row)
    roles = Roles(
        frozenset(column), frozenset(row), frozenset(across), packed, tuple(a.sites.values()),
        {k: tuple(v) for k, v in a.reads.items()}, whole, dict(a.chunks), a.blocks,
        tuple((owner, stmt) for (owner, path), stmt in a.optional.items() if (owner, path) in row),
        tuple((owner, table) for owner, linears, table in a.tables.values() if linears & column),
    )  # fmt: skip
    return roles, set(a.sites) - live


def _projections(live: set[int], a: Analysis) -> frozenset[Linear]:
    """Linears that compute query, key or value of attention that is sharded."""
    sites = [a.sites[s] for s in live]
    return frozenset(x for s in sites for f in (s.query, s.key, s.value) for x in f.linears)


def _shardable(flows: list[Flow], live: set[int], a: Analysis) -> bool:
    """Whether a linear may read shards: every flow into it is sharded, and nothing whole was mixed in."""

    projections = _projections(live, a)

    def sharded(flow: Flow) -> bool:
        if flow.tainted:
            return False
        if flow.parts:
            return all(sharded(p) for p in flow.parts)
        if flow.linears and flow.linears <= projections & set(
            a.blocks
        ):  # a block of what also computes attention's input
            return flow.elementwise and not flow.mixed
        return (bool(flow.attention & live) and not flow.mixed) or _paired(flow, a)

    return bool(flows) and all(sharded(f) for f in flows)


def _paired(flow: Flow, a: Analysis) -> bool:
    """Whether a linear reads only elementwise functions of other linears that nobody else reads."""
    return bool(flow.linears) and flow.elementwise and not flow.mixed and not (flow.linears & a.spoiled)
