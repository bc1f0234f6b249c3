"""A role is inferred only where every step between acts on each shard alone."""

import pytest

from tests.facts.conftest import build, linears

SPLIT = ".unflatten(-1, (heads, -1))\n"
QKV = f"q = self.q(x){SPLIT}k = self.k(x){SPLIT}v = self.v(x){SPLIT}"
ATTEND = "o = dispatch_attention_fn(q, k, v)\n"
OUT = "return self.out(o.flatten(2, 3))"
LAYERS = linears("q", "k", "v", "out")
COLUMN, ROW = {"q", "k", "v"}, {"out"}


def roles(facts, *lines, forward, **more):
    """(column, row) paths of the class."""
    found = facts(build(*lines, forward=forward, **more)).roles
    return {p for _, p in found.column}, {p for _, p in found.row}


def attention(facts, forward, *lines):
    return roles(facts, *LAYERS, *lines, forward=forward, arguments="x, y, heads")


def pair(facts, forward, *lines):
    return roles(facts, *linears("up", "down"), *lines, forward=forward, arguments="x, y")


# ---- attention


def test_query_key_and_value_are_columns_and_the_output_is_a_row(facts):
    assert attention(facts, QKV + ATTEND + OUT) == (COLUMN, ROW)


def test_keywords_name_query_key_and_value_too(facts):
    assert attention(facts, QKV + "o = dispatch_attention_fn(value=v, key=k, query=q)\n" + OUT) == (COLUMN, ROW)


def test_torch_attention_counts_as_attention(facts):
    assert attention(facts, QKV + "o = F.scaled_dot_product_attention(q, k, v)\n" + OUT) == (COLUMN, ROW)


def test_a_function_that_only_looks_like_attention_shards_nothing(facts):
    assert attention(facts, QKV + "o = torch.lerp(q, k, v)\n" + OUT) == (set(), set())


def test_attention_that_leaves_the_model_is_not_sharded(facts):
    assert attention(facts, QKV + ATTEND + "return o") == (set(), set())


def test_a_whole_tensor_added_to_attention_vetoes(facts):
    assert attention(facts, QKV + ATTEND + "return self.out(o.flatten(2, 3) + y)") == (set(), set())


def test_a_number_vetoes_nothing(facts):
    assert attention(facts, QKV + ATTEND + "return self.out(o.flatten(2, 3) * 2.0)") == (COLUMN, ROW)


def test_a_parameter_used_on_heads_vetoes(facts):
    line = "self.gate = nn.Parameter(torch.ones(dim))"
    assert attention(facts, QKV + "q = q * self.gate\n" + ATTEND + OUT, line) == (set(), set())


def test_attention_added_on_one_path_only_vetoes(facts):
    forward = QKV + ATTEND + "if y is not None:\n    o = y\n" + OUT
    assert attention(facts, forward) == (set(), set())


def test_none_on_one_path_vetoes_nothing(facts):
    forward = QKV + "o = None\nif y is not None:\n    o = dispatch_attention_fn(q, k, v)\n" + OUT
    assert attention(facts, forward) == (COLUMN, ROW)


# ---- pairs


def test_linears_with_an_activation_between_are_a_pair(facts):
    assert pair(facts, "return self.down(F.gelu(self.up(x)))") == ({"up"}, {"down"})


def test_an_activation_module_is_elementwise(facts):
    assert pair(facts, "return self.down(self.act(self.up(x)))", "self.act = nn.SiLU()") == ({"up"}, {"down"})


@pytest.mark.parametrize(
    "forward",
    [
        "return self.down(self.up(x) + x)",
        "return self.down(self.up(x) * y)",
        "h = self.up(x)\nh += x\nreturn self.down(h)",
        "return self.down(torch.softmax(self.up(x), dim=-1))",
        "return self.down(self.up(x).mean(-1))",
        "return self.down(self.up(x).reshape(2, -1))",
        "h = self.up(x)\nreturn self.down(h), h",
        "h = self.up(x)\nif y is None:\n    h = x\nreturn self.down(h)",
        "return self.down(self.norm(self.up(x)))",
        "return self.down(self.up(x) * self.gate)",
        "return self.up(x)",
    ],
)
def test_whatever_meets_a_whole_tensor_stays_replicated(facts, forward):
    lines = ["self.norm = nn.LayerNorm(dim)", "self.gate = nn.Parameter(torch.ones(dim))"]
    assert pair(facts, forward, *lines) == (set(), set())


def test_a_residual_around_the_pair_vetoes_nothing(facts):
    assert pair(facts, "return x + self.down(F.gelu(self.up(x)))") == ({"up"}, {"down"})


def test_in_a_chain_every_second_linear_sums(facts):
    found = roles(facts, *linears("a", "b", "c"), forward="return self.c(F.silu(self.b(F.silu(self.a(x)))))")
    assert found == ({"a"}, {"b"})


def test_a_linear_never_has_two_roles(facts):
    column, row = roles(
        facts, *linears("a", "b", "c", "d"), forward="return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))"
    )
    assert column == {"a", "c"} and row == {"b", "d"}


def test_the_elements_of_a_list_act_one_after_the_other(facts):
    line = "self.net = nn.ModuleList([nn.Linear(dim, 4), nn.GELU(), nn.Linear(4, dim)])"
    assert roles(facts, line, forward="for m in self.net:\n    x = m(x)\nreturn x") == ({"net.0"}, {"net.2"})


# ---- side by side


def test_what_a_row_reads_side_by_side_is_packed(facts):
    lines = [*LAYERS[:3], *linears("mlp"), "self.out = nn.Linear(dim + dim, dim)"]
    forward = QKV + ATTEND + "return self.out(torch.cat([o.flatten(2, 3), F.gelu(self.mlp(x))], dim=2))"
    found = facts(build(*lines, forward=forward, arguments="x, heads")).roles
    assert {p for _, p in found.column} == {"q", "k", "v", "mlp"}
    assert len(found.packed["Net", "out"]) == 2


def test_a_whole_part_beside_a_shard_vetoes(facts):
    forward = QKV + ATTEND + "return self.out(torch.cat([o.flatten(2, 3), y], dim=-1))"
    assert attention(facts, forward) == (set(), set())


def test_concatenation_along_the_sequence_packs_nothing(facts):
    forward = QKV + ATTEND + "return self.out(torch.cat([o.flatten(2, 3), o.flatten(2, 3)], dim=1))"
    found = facts(build(*LAYERS, forward=forward, arguments="x, heads")).roles
    assert {p for _, p in found.row} == ROW and not found.packed


FUSED = ["self.qkv = nn.Linear(dim, dim * 3)", *linears("out")]


def test_one_linear_for_query_key_and_value_is_sharded_when_it_is_chunked(facts):
    forward = "q, k, v = self.qkv(x).chunk(3, dim=-1)\n" + ATTEND + "return self.out(o)"
    found = facts(build(*FUSED, forward=forward)).roles
    assert dict(found.chunks) == {("Net", "qkv"): frozenset({3})} and {p for _, p in found.column} == {"qkv"}


def test_one_linear_for_query_key_and_value_is_not_sharded_when_a_reshape_mixes_them(facts):
    forward = "q, k, v = self.qkv(x).reshape(1, -1, 3, 4, 8).unbind(2)\n" + ATTEND + "return self.out(o)"
    assert roles(facts, *FUSED, forward=forward) == (set(), set())


def test_one_linear_reshaped_into_outputs_of_all_heads_is_sharded(facts):
    stacked = "x = self.qkv(x).reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4)\nq, k, v = x[0], x[1], x[2]\n"
    assert roles(facts, *FUSED, forward=stacked + ATTEND + "return self.out(o)") == ({"qkv"}, {"out"})
    between = "x = self.qkv(x).reshape(b, n, heads, 3, d).permute(3, 0, 2, 1, 4)\nq, k, v = x[0], x[1], x[2]\n"
    assert roles(facts, *FUSED, forward=between + ATTEND + "return self.out(o)") == (set(), set())


BLOCKED = ["self.qkv = nn.Linear(dim, dim * 3 + inner)", "self.out = nn.Linear(dim + inner, dim)"]
PARALLEL = (
    "qkv, up = torch.split(self.qkv(x), [y, z], dim=-1)\nq, k, v = qkv.chunk(3, dim=-1)\n" + ATTEND
    + "return self.out(torch.cat([o.flatten(2, 3), F.gelu(up)], dim=-1))"
)  # fmt: skip


def test_a_split_in_blocks_that_the_model_declares_is_followed(facts):
    note = "self.qkv._tp_packed_col_blocks = [dim] * 3 + [inner]"
    assert roles(facts, *BLOCKED, note, forward=PARALLEL) == ({"qkv"}, {"out"})
    assert roles(facts, *BLOCKED, forward=PARALLEL) == (set(), set())


def test_halves_of_a_tensor_are_two_outputs_side_by_side(facts):
    forward = "u = self.up(x)\nhalf = u.shape[-1] // 2\nreturn self.down(F.silu(u[..., :half]) * u[..., half:])"
    found = facts(build(*linears("up", "down"), forward=forward)).roles
    assert dict(found.chunks) == {("Net", "up"): frozenset({2})} and {p for _, p in found.row} == {"down"}
    assert pair(facts, forward.replace("// 2", "// 3")) == (set(), set())


GATE = """
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()
    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        return self.act(a) * b
"""


def test_a_class_that_acts_on_each_element_is_looked_into(facts):
    net = build(*linears("up", "down"), "self.gate = Gate()", forward="return self.down(self.gate(self.up(x)))")
    found = facts(GATE + net).roles
    assert {p for _, p in found.row} == {"down"} and found.chunks["Net", "up"] == frozenset({2})
    summing = GATE.replace("self.act(a) * b", "self.act(a) * b.sum(-1, keepdim=True)")
    assert not facts(summing + net).roles.row


def test_functions_of_the_forward_are_looked_into(facts):
    local = "def split(t):\n    return t.unflatten(-1, (heads, -1))\nq, k, v = map(split, (self.q(x), self.k(x), self.v(x)))\n"
    norms = ["self.norm = nn.RMSNorm(d)"]
    forward = local + "q = self.norm(q)\n" + ATTEND + OUT
    found = facts(build(*LAYERS, *norms, forward=forward, arguments="x, y, heads")).roles
    assert {p for _, p in found.row} == ROW and not found.across


def test_a_mask_that_is_the_same_for_all_heads_vetoes_nothing(facts):
    assert attention(facts, QKV + ATTEND + "return self.out((o * y[:, :, None, None]).flatten(2, 3))") == (COLUMN, ROW)
    assert attention(facts, QKV + ATTEND + "return self.out((o * y[:, :, None]).flatten(2, 3))") == (set(), set())
    assert attention(facts, QKV + ATTEND + "return self.out(o.flatten(2, 3) * y.unsqueeze(-1))") == (COLUMN, ROW)


def test_a_mask_is_not_the_same_for_all_heads_where_they_stand_first(facts):
    turned = QKV + "o = F.scaled_dot_product_attention(q, k, v)\n"
    assert attention(facts, turned + "return self.out((o * y[:, :, None, None]).flatten(2, 3))") == (set(), set())


def test_unprojected_attention_that_meets_a_whole_tensor_is_not_sharded(facts):
    forward = QKV + ATTEND + "o = o.flatten(2, 3)\nreturn self.out(o[:, :4]), y + o[:, 4:]"
    assert attention(facts, forward) == (set(), set())


def test_attention_projected_where_the_projection_exists_is_sharded_and_remembered(facts):
    forward = QKV + ATTEND + "o = o.flatten(2, 3)\nif self.out is not None:\n    o = self.out(o)\nreturn y + o"
    found = facts(build(*LAYERS, forward=forward, arguments="x, y, heads")).roles
    assert {p for _, p in found.row} == ROW and len(found.optional) == 1


def test_query_and_key_that_leave_a_function_together_stay_apart(facts):
    together = QKV + "q, k = rotate(q, k, y)\n" + ATTEND + OUT
    assert attention(facts, together) == (COLUMN, ROW)
    crossed = QKV + "k, q = rotate(q, k, y)\n" + ATTEND + OUT
    assert attention(facts, crossed) == (set(), set())


# ---- norms, flags, several classes


def test_a_norm_over_all_heads_is_computed_across_ranks(facts):
    forward = "q = self.norm(self.q(x)).unflatten(-1, (heads, -1))\n" + QKV.split("\n", 1)[1] + ATTEND + OUT
    found = facts(build(*LAYERS, "self.norm = nn.RMSNorm(dim)", forward=forward, arguments="x, heads")).roles
    assert {p for _, p in found.across} == {"norm"}


def test_a_norm_of_each_head_is_not(facts):
    forward = QKV + "q = self.norm(q)\n" + ATTEND + OUT
    found = facts(build(*LAYERS, "self.norm = nn.RMSNorm(8)", forward=forward, arguments="x, heads")).roles
    assert not found.across and {p for _, p in found.column} == COLUMN


FLAGGED = "h = self.up(x)\nif self.last:\n    h = x\nif not self.last:\n    x = self.down(F.gelu(h))\nreturn x"


def test_a_flag_of_two_classes_has_one_value_at_a_time(facts):
    part = build(*linears("up", "down"), "self.last = last", name="Part", parameters="dim, last", forward=FLAGGED)
    net = build("self.part = Part(dim, last)", "self.last = last", parameters="dim, last",
                forward="h = self.part(x)\nif self.last:\n    h = h * 2\nreturn h")  # fmt: skip
    found = facts(part + net).roles
    assert (found.column, found.row) == ({("Part", "up")}, {("Part", "down")})


def test_a_test_of_one_class_only_is_not_taken_for_a_shared_flag(facts):
    found = roles(facts, *linears("up", "down"), "self.last = last", parameters="dim, last", forward=FLAGGED)
    assert found == (set(), set())


def test_a_linear_read_whole_under_one_value_of_a_shared_flag_is_no_row(facts):
    part = build(*linears("up", "down"), "self.last = last", name="Part", parameters="dim, last",
                 forward="h = self.up(x)\nif self.last:\n    h = h + x\nreturn self.down(h)")  # fmt: skip
    net = build("self.part = Part(dim, last)", "self.last = last", parameters="dim, last",
                forward="h = self.part(x)\nif self.last:\n    h = h * 2\nreturn h")  # fmt: skip
    assert facts(part + net).roles.row == set()


def test_a_result_handed_to_another_class_is_whole(facts):
    part = build(*linears("down"), name="Part", forward="return self.down(x)")
    net = build(*linears("up"), "self.part = Part(dim)", forward="return self.part(F.gelu(self.up(x)))")
    found = facts(part + net).roles
    assert (found.column, found.row) == (set(), set())


def test_rotary_tables_as_wide_as_all_heads_are_remembered(facts):
    turned = (
        f"q = apply_rotary_emb(self.q(x), y){SPLIT.rstrip()}\nk = self.k(x){SPLIT}v = self.v(x){SPLIT}" + ATTEND + OUT
    )
    found = facts(build(*LAYERS, forward=turned, arguments="x, y, heads")).roles
    assert {p for _, p in found.row} == ROW and len(found.tables) == 1
    named = turned.replace("apply_rotary_emb", "shuffle")
    assert attention(facts, named) == (set(), set())


# ---- calls that lack what they need


FEED_FORWARD = "self.net = nn.ModuleList([nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)])"


def test_layers_of_a_list_that_act_one_after_the_other_are_a_pair(facts):
    found = roles(facts, FEED_FORWARD, forward="for layer in self.net:\n    x = layer(x)\nreturn x")
    assert found == ({"net.0"}, {"net.2"})


@pytest.mark.parametrize("call", ["layer()", "layer(x, x)", "torch.add(layer(x))", "other(x)"])
def test_another_loop_over_a_list_is_no_chain(facts, call):
    found = roles(facts, FEED_FORWARD, forward=f"for layer in self.net:\n    x = {call}\nreturn x")
    assert found == (set(), set())
