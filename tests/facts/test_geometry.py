"""Head counts and sizes, and projections that may be computed at once."""

import libcst as cst
import pytest

from porter.facts.geometry import Geometry, head_geometry
from porter.facts.projections import merged_name
from porter.model import Unknown
from tests.facts.conftest import build, linears


def geometry(*lines, parameters="dim", forward="return x", widths=()):
    text = build(*lines, parameters=parameters, forward=forward)
    return head_geometry(cst.parse_module(text).body[0], set(widths))


def test_an_attribute_is_preferred_to_a_parameter():
    found = geometry("self.heads = heads", parameters="dim, heads, head_dim")
    assert (found.heads, found.head_size) == ("self.heads", "head_dim")


def test_the_head_size_follows_from_width_and_count():
    assert geometry(parameters="dim, heads", widths=["dim"]).head_size == "dim // heads"


def test_the_count_follows_from_width_and_head_size():
    assert geometry(parameters="dim, head_dim", widths=["dim"]).heads == "dim // head_dim"


def test_nothing_is_guessed_when_neither_is_named():
    assert isinstance(geometry(parameters="dim", widths=["dim"]), Unknown)
    assert isinstance(geometry(parameters="dim, heads"), Unknown)


def test_a_name_that_is_only_a_local_is_no_geometry():
    assert isinstance(geometry("heads = 4", "head_dim = 8"), Unknown)


def test_only_what_is_read_outside_the_constructor_is_counted_per_rank():
    lines = ["self.heads = heads", "self.kv_heads = heads"]
    found = geometry(*lines, parameters="heads, head_dim", forward="return x.unflatten(-1, (self.heads, -1))")
    assert isinstance(found, Geometry) and found.local == ("heads",)


def test_a_width_that_does_not_count_heads_is_left_whole():
    lines = ["self.heads = heads", "self.inner = dim"]
    used = geometry(*lines, parameters="dim, heads", widths=["dim"], forward="return x.view(1, self.inner)")
    unused = geometry(*lines, parameters="dim, heads", widths=["dim"], forward="return self.scale(x, self.inner)")
    assert "inner" in used.local and "inner" not in unused.local


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["to_q", "to_k", "to_v"], "to_qkv"),
        (["to_k", "to_v"], "to_kv"),
        (["add_k_proj", "add_v_proj"], "add_kv_proj"),
        (["query", "key_proj"], "query_key_proj"),
    ],
)
def test_the_name_of_a_merge_says_what_it_merges(sources, name):
    assert merged_name(sources) == name


# ---- groups

HEADS = ["self.heads = heads", *linears("to_q", "to_k", "to_v", "out")]
SPLIT = "q, k, v = q.unflatten(-1, (2, -1)), k.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1))\n"
END = SPLIT + "return self.out(dispatch_attention_fn(q, k, v).flatten(2, 3))"
READ = "q = self.to_q(x)\nk = self.to_k(x)\nv = self.to_v(x)\n"


def merges(facts, forward, lines=HEADS, parameters="dim, heads"):
    found = facts(build(*lines, forward=forward + END, parameters=parameters, arguments="x, y"))
    return [m.sources for m in found.merges()]


def test_three_projections_of_one_tensor_are_merged(facts):
    assert merges(facts, READ) == [(("to_q", "q"), ("to_k", "k"), ("to_v", "v"))]


def test_the_shard_ids_follow_the_parts_and_not_the_order_of_statements(facts):
    assert merges(facts, "v = self.to_v(x)\nq = self.to_q(x)\nk = self.to_k(x)\n") == merges(facts, READ)


def test_key_and_value_of_another_tensor_are_merged_without_the_query(facts):
    found = merges(facts, READ.replace("to_k(x)", "to_k(y)").replace("to_v(x)", "to_v(y)"))
    assert found == [(("to_k", 0), ("to_v", 1))]


@pytest.mark.parametrize(
    "forward",
    [
        "q = self.to_q(x)\nk = self.to_k(y)\nv = self.to_v(x)\n",
        "q = self.to_q(x)\nx = x * 2\nk = self.to_k(x)\nx = x * 2\nv = self.to_v(x)\n",
        "q = self.to_q(x)\nk = self.to_k(x)\nprint(k)\nv = self.to_v(x)\n",
    ],
)
def test_projections_apart_or_of_different_tensors_are_not_merged(facts, forward):
    assert merges(facts, forward) == []


def test_projections_of_different_bias_are_not_merged(facts):
    lines = [line.replace("dim, dim)", "dim, dim, bias=False)") if "to_v" in line else line for line in HEADS]
    assert merges(facts, READ, lines) == []


def test_without_geometry_query_key_and_value_are_not_merged(facts):
    assert merges(facts, READ, HEADS[1:], parameters="dim") == []
