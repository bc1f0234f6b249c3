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
    points = [
        *(m.variable for m in plan.modulations),
        *(p for v, rows in single.items() for p in _points(v, rows)),
        *(s.name for s in plan.streams),
    ]
    built = [f"self.shard_{v} = {IDENTITY}()\n" for v in points]
    gathers = (plan.gather, *plan.gather.also)
    if plan.gather.module is None:
        built += [f"self.gather_{g.variable} = {IDENTITY}()\n" for g in gathers]
    edits: list[Edit] = [
        inserted(init, [tree.statement(_plan_text(plan, single))], after=False),
        inserted(tree.body(init)[-1], [s for text in built for s in tree.statements(text)]),
        inserted(plan.start, tree.statements("".join(_divide(plan, tables, single))), after=False),
    ]
    behind = [f"{v} = whole_{v}\n" for v in plan.restored]
    if plan.gather.module is None:
        behind = [f"{g.variable} = self.gather_{g.variable}({g.variable})\n" for g in gathers] + behind
    if behind:
        edits.append(inserted(plan.gather.statement, [tree.statement(line) for line in behind]))
    return edits


def _by_variable(tables: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in tables:
        found.setdefault(entry.variable, []).append(entry)
    return found


def _points(variable: str, entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Points at which a variable is divided, one for each tuple of tensors in it: its tensors by the point's name."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault("_".join([variable, *map(str, entry.path[:-1])]), []).append(entry)
    return found


def _plan_text(plan: SequencePlan, single: Mapping[str, list[Entry]]) -> str:
    """The engine counts a region of divided tokens as open from each `split_output` to a gather: only what is gathered is
    divided as an output, so that nothing is open after the forward. All else is divided as the input of its point."""
    rows = []
    for variable, entries in single.items():
        for point, inside in _points(variable, entries).items():
            specs = ", ".join(_table(e) for e in sorted(inside, key=lambda e: e.path))
            rows.append(f'"shard_{point}": {{"input": {f"[{specs}]" if inside[0].path else specs}}},')
    rows += [f'"shard_{m.variable}": {{"input": {_table(m)}}},' for m in plan.modulations]
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
    lines += [
        f"if {_per_token(m, plan)} and self.od_config.parallel_config.sequence_parallel_size > 1:\n"
        f'    raise NotImplementedError("`{m.variable}` of every token can not be divided between the ranks of sequence '
        'parallelism")\n'
        for m in plan.undivided
    ]
    lines += [f"whole_{v} = {v}\n" for v in plan.restored]
    lines += [f"if {_per_token(m, plan)}:\n    {_pointed(m.variable, m.variable, ())}\n" for m in plan.modulations]
    axes = {s.name: s.axis for s in plan.streams}
    for variable, entries in tables.items():
        steps = [_pointed(variable, p, rows[0].path[:-1]) for p, rows in _points(variable, entries).items()]
        if variable not in single:
            axis = entries[0].axis
            lengths = ", ".join(f"{p}.shape[{axes[p]}]" for p in entries[0].parts)
            steps = [f"{variable} = {STREAMS}({variable}, {axis}, ({lengths}))"]
            if entries[0].path:
                steps = [f"{variable} = tuple({STREAMS}(table, {axis}, ({lengths})) for table in {variable})"]
        lines += _guarded(variable, steps, plan)
    for s in plan.streams:
        lines += _guarded(s.name, [f"{s.name} = self.shard_{s.name}({s.name})"], plan)
    lines += [f"{name} = {stream.name}.shape[{stream.axis}]\n" for name, stream in plan.recounted]
    return lines


def _per_token(entry: Entry, plan: SequencePlan) -> str:
    """Test for what has one entry per token, or one for all."""
    assert entry.rank is not None
    name = entry.variable
    given = f"{name} is not None and " if name in plan.optional else ""
    return f"{given}{name}.ndim == {entry.rank} and {name}.shape[{entry.axis + entry.rank}] > 1"


def _pointed(variable: str, point: str, outer: tuple[int, ...]) -> str:
    """The statement that divides a variable, or the tuple `outer` of the tuple that it is."""
    if not outer:
        return f"{variable} = self.shard_{point}({variable})"
    (at,) = outer
    before = f"*{variable}[:{at}], " if at else ""
    return f"{variable} = ({before}self.shard_{point}({variable}[{at}]), *{variable}[{at + 1}:])"


def _guarded(variable: str, steps: Sequence[str], plan: SequencePlan) -> list[str]:
    """Statements for a variable that may be None."""
    if variable not in plan.optional:
        return [f"{step}\n" for step in steps]
    return [f"if {variable} is not None:\n" + "".join(f"    {step}\n" for step in steps)]
