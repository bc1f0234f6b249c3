"""A modulation linear stands in a repeated block, makes several vectors of one, and is paired with nothing."""

from porter.facts.modulation import modulations
from tests.facts.conftest import build

ROOT = build("self.blocks = nn.ModuleList([Net(dim) for _ in range(2)])", name="Root",
             forward="for block in self.blocks:\n    x = block(x)\nreturn x")  # fmt: skip
WIDE = "self.linear = nn.Linear(dim, 6 * dim)"
USE = "return x * m.unsqueeze(1)"


def gathered(facts, *lines, forward, root=ROOT):
    found = facts(build(*lines, forward=forward) + root)
    return {p for _, p in modulations(found.modules, "Root", found.roles)}


def test_a_wide_linear_behind_an_activation_is_modulation(facts):
    lines = ("self.act = nn.SiLU()", WIDE)
    assert gathered(facts, *lines, forward="m = self.linear(self.act(x))\nreturn x * m[:, :1]") == {"linear"}
    assert gathered(facts, WIDE, forward="m = self.linear(F.silu(x).to(x.dtype))\nreturn x * m[:, :1]") == {"linear"}


def test_a_sequence_of_activation_and_linear_is_modulation_whatever_its_width(facts):
    line = "self.net = nn.Sequential(nn.SiLU(), nn.Linear(dim, wide))"
    assert gathered(facts, line, forward="return x * self.net(x)[:, :1]") == {"net.1"}


def test_a_result_that_is_given_a_sequence_axis_is_modulation(facts):
    assert gathered(facts, WIDE, forward="m = self.linear(x)\n" + USE) == {"linear"}
    parts = "m = self.linear(x)\na, b = m.chunk(2, dim=1)\nreturn x * b.unsqueeze(1)"
    assert gathered(facts, WIDE, forward=parts) == {"linear"}


def test_a_wide_linear_over_a_sequence_is_none(facts):
    assert gathered(facts, WIDE, forward="m = self.linear(x)\nreturn x * m.cumsum(1)") == set()


def test_an_activation_before_a_linear_that_keeps_the_width_is_none(facts):
    line = "self.net = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim))"
    assert gathered(facts, line, forward="return x * self.net(x)[:, :1]") == set()


def test_a_linear_that_has_a_role_keeps_it(facts):
    lines = (WIDE, "self.down = nn.Linear(6 * dim, dim)")
    assert gathered(facts, *lines, forward="return self.down(F.gelu(self.linear(F.silu(x))))") == set()


def test_outside_of_blocks_there_is_none(facts):
    root = build("self.one = Net(dim)", name="Root", forward="return self.one(x)")
    assert gathered(facts, WIDE, forward="m = self.linear(F.silu(x))\n" + USE, root=root) == set()
