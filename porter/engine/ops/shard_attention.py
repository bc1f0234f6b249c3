"""Op: attention over divided tokens, whose keys and masks stand in the order in which the ranks hold them."""

from __future__ import annotations

from collections.abc import Mapping

import libcst as cst

from porter.engine.edits import Edit, replaced
from porter.engine.registry import op
from porter.engine.site import Site
from porter.facts.sequence.calls import AttentionUse
from porter.facts.sequence.follow import METADATA
from porter.facts.sequence.plan import SequencePlan, sequence_plan
from porter.model import Diagnostic, Unit
from porter.source import tree
from porter.source.names import absolute

SEQUENCE_METADATA = absolute("porter_template.sequence_metadata")


@op("shard_attention")
def shard_attention(site: Site, unit: Unit, args: Mapping[str, object]) -> list[Edit] | Diagnostic:
    """Edits of one constructor call and of the calls of the layer it builds."""
    call = site.node
    assert isinstance(call, cst.Call)
    edits: list[Edit] = []
    skip = args["skip"]
    kept = [a for a in call.args if a.keyword is None or a.keyword.value != "skip_sequence_parallel"]
    position = next((i for i, a in enumerate(kept) if a.keyword is not None and a.keyword.value == "prefix"), len(kept))
    if skip:
        value = cst.Name("True" if skip is True else "skip_sequence_parallel")
        kept.insert(position, tree.keyword_argument("skip_sequence_parallel", value))
    new = call.with_changes(args=kept)
    if not tree.same(new, call):
        edits.append(replaced(call, new))
    plan = sequence_plan(unit)
    if skip is not True and isinstance(plan, SequencePlan):
        uses = {id(u.call): u for u in plan.attention if u.owner == site.definition.name and u.key is not None}
        edits += [replaced(u.call, _over_tokens(u)) for u in uses.values()]
    return edits


def _over_tokens(use: AttentionUse) -> cst.Call:
    assert use.key is not None
    kept = [a for a in use.call.args if a.keyword is None or a.keyword.value != "attn_metadata"]
    given = next((a.value for a in use.call.args if a.keyword is not None and a.keyword.value == "attn_metadata"), None)
    mask: cst.BaseExpression = cst.Name("None")
    if given is not None:
        made = next((c for c in tree.find(given, cst.Call) if tree.call_name(c) == absolute(METADATA)), None)
        assert made is not None
        mask = made.args[0].value
    streams = ", ".join(f'"{p}"' for p in use.key)
    query = next(a.value for a in kept)
    value = tree.expression(f"{SEQUENCE_METADATA}(query, mask, {streams})", query=query, mask=mask)
    return use.call.with_changes(args=[*kept, tree.keyword_argument("attn_metadata", value)])
