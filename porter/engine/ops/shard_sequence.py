"""Op: the root divides its tokens before the blocks and puts them together again behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from porter.engine.edits import Edit, inserted
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.sequence.plan import SequencePlan, sequence_plan
from porter.facts.sequence.tables import Entry
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

INPUT = absolute("vllm_omni.diffusion.distributed.sp_plan.SequenceParallelInput")
OUTPUT = absolute("vllm_omni.diffusion.distributed.sp_plan.SequenceParallelOutput")
IDENTITY = absolute("torch.nn.Identity")
STREAMS = absolute("porter_template.shard_streams")


@op("shard_sequence")
def shard_sequence(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """`_sp_plan`, the points it names, and their calls."""
    plan = sequence_plan(unit)
    assert isinstance(plan, SequencePlan)
    init = tree.method(site.definition.node, "__init__")  # type: ignore[arg-type]
    assert init is not None
    tables = _by_variable(plan.tables)
    single = {v: rows for v, rows in tables.items() if len(rows[0].parts) == 1}
    points = [*single, *(s.name for s in plan.streams)]
    built = [f"self.shard_{v} = {IDENTITY}()\n" for v in points]
    gathers = (plan.gather, *plan.gather.also)
    if plan.gather.module is None:
        built += [f"self.gather_{g.variable} = {IDENTITY}()\n" for g in gathers]
    edits: list[Edit] = [
        inserted(init, [tree.statement(_plan_text(plan, single))], after=False),
        inserted(tree.body(init)[-1], [s for text in built for s in tree.statements(text)]),
        inserted(plan.start, tree.statements("".join(_divide(plan, tables, single))), after=False),
    ]
    if plan.gather.module is None:
        lines = [tree.statement(f"{g.variable} = self.gather_{g.variable}({g.variable})\n") for g in gathers]
        edits.append(inserted(plan.gather.statement, lines))
    return edits


def _by_variable(tables: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in tables:
        found.setdefault(entry.variable, []).append(entry)
    return found


def _plan_text(plan: SequencePlan, single: Mapping[str, list[Entry]]) -> str:
    """The engine counts a region of divided tokens as open from each `split_output` to a gather: only what is gathered is
    divided as an output, so that nothing is open after the forward. All else is divided as the input of its point."""
    rows = []
    for variable, entries in single.items():
        specs = ", ".join(_table(e) for e in sorted(entries, key=lambda e: e.path))
        rows.append(f'"shard_{variable}": {{"input": {f"[{specs}]" if entries[0].path else specs}}},')
    gathered = {each.stream for each in (plan.gather, *plan.gather.also)}
    for stream in plan.streams:
        key, output = ("0", "split_output=True, ") if stream.name in gathered else ('"input"', "")
        rows.append(
            f'"shard_{stream.name}": {{{key}: {INPUT}(split_dim={stream.axis}, expected_dims={stream.rank}, {output}'
            f'auto_pad=True, shard_group="{stream.name}")}},'
        )
    axis = plan.streams[0].axis
    for each in (plan.gather, *plan.gather.also):
        point = each.module or f"gather_{each.variable}"
        rows.append(f'"{point}": {OUTPUT}(gather_dim={axis}, expected_dims=3, shard_group="{each.stream}"),')
    return "_sp_plan = {" + " ".join(rows) + "}\n"


def _table(entry: Entry) -> str:
    expected = f", expected_dims={entry.rank}" if entry.rank is not None else ""
    split = entry.axis if entry.rank is None else entry.axis + entry.rank
    return f"{INPUT}(split_dim={split}{expected}, auto_pad=True)"


def _divide(plan: SequencePlan, tables: Mapping[str, list[Entry]], single: Mapping[str, list[Entry]]) -> list[str]:
    """Statements before the first loop: tables first, because they ask for the whole streams' lengths."""
    lines = [
        f"if {name} is not None and self.od_config.parallel_config.sequence_parallel_size > 1:\n"
        f'    raise NotImplementedError("`{name}` can not be divided between the ranks of sequence parallelism")\n'
        for name in plan.refused
    ]
    lines += [
        f"if isinstance(self.{blocks}[0], {cls}) and self.od_config.parallel_config.sequence_parallel_size > 1:\n"
        f'    raise NotImplementedError("tokens of `{cls}` can not be divided between the ranks of sequence parallelism")\n'
        for blocks, cls in plan.mixing
    ]
    axes = {s.name: s.axis for s in plan.streams}
    for variable, entries in tables.items():
        line = f"{variable} = self.shard_{variable}({variable})"
        if variable not in single:
            axis = entries[0].axis
            lengths = ", ".join(f"{p}.shape[{axes[p]}]" for p in entries[0].parts)
            line = f"{variable} = {STREAMS}({variable}, {axis}, ({lengths}))"
            if entries[0].path:
                line = f"{variable} = tuple({STREAMS}(table, {axis}, ({lengths})) for table in {variable})"
        lines.append(_guarded(variable, line, plan))
    lines += [_guarded(s.name, f"{s.name} = self.shard_{s.name}({s.name})", plan) for s in plan.streams]
    lines += [f"{name} = {stream.name}.shape[{stream.axis}]\n" for name, stream in plan.recounted]
    return lines


def _guarded(variable: str, line: str, plan: SequencePlan) -> str:
    return f"if {variable} is not None:\n    {line}\n" if variable in plan.optional else f"{line}\n"
