"""What Cache-DiT should give is worked out from blocks alone: checked here on blocks whose sums anybody can add up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from porter.verify.reuse_by_hand import counted, reusing  # noqa: E402


class Block(torch.nn.Module):
    """Adds its number times what the step brings to the states, and as much to the text, if there is one."""

    def __init__(self, number: int, last: bool) -> None:
        super().__init__()
        self.number, self.last = number, last

    def forward(self, states: Any, text: Any, step: float) -> Any:
        states = states + self.number * step
        return (states, None if self.last else text + step) if text is not None else states


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(n, n == 100) for n in (1, 10, 100)])
        self._cache_dit_adapter_config = SimpleNamespace(block_forward_patterns={"blocks": "any"})

    def forward(self, states: Any, text: Any, step: float) -> Any:
        for block in self.blocks:
            if text is None:
                states = block(states, None, step)
            else:
                states, text = block(states, text, step)
        return states


class Timed(Net):
    def forward(self, states: Any, timestep: Any, step: float) -> Any:
        return super().forward(states, None, step)


@pytest.mark.parametrize("text", [None, torch.zeros(1)])
def test_later_steps_add_what_the_branch_added_in_its_last_full_one(text: Any) -> None:
    net, steps, found = Net(), [], []
    with counted([net]) as counts, reusing([net], 2, lambda: len(steps)):
        for step in (1.0, 2.0, 3.0):
            for branch in (0.0, 0.5):  # two calls in a step
                found.append(net(torch.zeros(1), text, step + branch).item())
            steps.append(None)
    # In full: 111 times what the step brings. Reused: the first block anew, and 110 times what the second step brought.
    assert found == [111.0, 166.5, 222.0, 277.5, 3.0 + 220.0, 3.5 + 275.0]
    assert counts == {"first": 6, "others": 8}


def test_a_time_that_comes_again_begins_another_loop() -> None:
    net, steps, found = Timed(), [], []
    with counted([net]) as counts, reusing([net], 1, lambda: len(steps)):
        for brought, times in ((1.0, (9.0, 5.0)), (3.0, (9.0, 5.0))):  # two requests, or two windows
            for t in times:
                found.append(net(torch.zeros(1), torch.tensor([t]), brought).item())
                steps.append(None)
    # The second step of each loop adds what the first step of the same loop brought.
    assert found == [111.0, 111.0, 333.0, 333.0]
    assert counts == {"first": 4, "others": 4}


def test_a_time_that_is_repeated_at_once_is_another_step_of_the_loop() -> None:
    net, steps, found = Timed(), [], []
    with reusing([net], 1, lambda: len(steps)):
        for brought, t in ((1.0, 9.0), (3.0, 5.0), (3.0, 5.0), (3.0, 1.0)):
            found.append(net(torch.zeros(1), torch.tensor([t]), brought).item())
            steps.append(None)
    assert found == [111.0, 113.0, 113.0, 113.0]


def test_afterwards_blocks_are_as_they_were() -> None:
    net = Net()
    with counted([net]), reusing([net], 0, lambda: 0):
        pass
    assert not any("forward" in block.__dict__ for block in net.blocks)
    assert net(torch.zeros(1), None, 1.0).item() == 111.0


def test_a_denoiser_that_offers_no_list_is_left_alone() -> None:
    net = Net()
    del net._cache_dit_adapter_config
    with counted([net]) as counts, reusing([net], 0, lambda: 0):
        assert net(torch.zeros(1), None, 1.0).item() == 111.0
    assert counts == {"first": 0, "others": 0}
