"""Steps of several prompts are compared row by row, whether the requests shared the loop or ran alone."""

from __future__ import annotations

import torch

from porter.verify.compare import difference
from porter.verify.rungs.pipeline import by_branch


def test_rows_of_a_shared_loop_are_compared_branch_by_branch() -> None:
    alone = torch.arange(6.0).reshape(6, 1)  # prompt 0: rows 0, 1 and 2; prompt 1: rows 3, 4 and 5
    joint = torch.tensor([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]])
    assert torch.equal(by_branch(alone, 2, joint), joint)
    assert torch.equal(by_branch(alone, 2, alone), alone)


def test_prompts_in_another_order_stay_wrong() -> None:
    alone = torch.arange(4.0).reshape(4, 1)
    swapped = alone[[2, 3, 0, 1]]
    assert difference(swapped, by_branch(alone, 2, swapped))["rel_l2"] > 0.5


def test_one_row_for_each_prompt_has_one_order() -> None:
    alone = torch.arange(2.0).reshape(2, 1)
    assert torch.equal(by_branch(alone, 2, alone.flip(0)), alone)
    assert torch.equal(by_branch(alone, 1, alone.flip(0)), alone)
