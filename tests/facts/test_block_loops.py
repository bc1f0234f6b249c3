"""A list of blocks may be taken for one call only where the loop does nothing but call them."""

import libcst as cst

from porter.facts.block_loops import plain_loops
from porter.source import tree


def loops(body: str, arguments: str = "x, residuals=None, hints=()") -> set[str]:
    text = f"def forward(self, {arguments}):\n" + "".join(f"    {line}\n" for line in body.split("\n"))
    function = tree.statement(text)
    assert isinstance(function, cst.FunctionDef)
    return plain_loops(function)


def test_blocks_called_one_after_the_other_are_one_call():
    assert loops("for block in self.blocks:\n    x = block(x, y)\nreturn x") == {"blocks"}
    assert loops("for i, block in enumerate(self.blocks):\n    x = block(x, y)") == {"blocks"}


def test_residuals_that_are_optional_do_not_count():
    added = "    if residuals is not None:\n        x = x + residuals[i]"
    assert loops("for i, block in enumerate(self.blocks):\n    x = block(x)\n" + added) == {"blocks"}


def test_blocks_skipped_only_on_demand_are_one_call():
    skip = (
        "    skip = True if residuals is not None and i in residuals else False\n    if not skip:\n        x = block(x)"
    )
    assert loops("for i, block in enumerate(self.blocks):\n" + skip) == {"blocks"}
    assert loops("for i, block in enumerate(self.blocks):\n" + skip.replace("residuals is not None", "hints")) == set()


def test_a_step_between_blocks_is_not_part_of_a_call():
    assert loops("for i, block in enumerate(self.blocks):\n    x = block(x)\n    x = x + hints[i]") == set()
    body = (
        "for i, block in enumerate(self.blocks):\n    x = block(x)\n    if hints is not None:\n        x = x + hints[i]"
    )
    assert loops(body) == set()


def test_blocks_with_arguments_of_their_own_are_not_one_call():
    assert loops("for i, block in enumerate(self.blocks):\n    x = block(x, masks[i])") == set()
    assert loops("for block, mask in zip(self.blocks, masks):\n    x = block(x, mask)") == set()


def test_two_lists_in_turn_are_not_two_calls():
    assert loops("for a, b in zip(self.first, self.second):\n    x = a(x)\n    x = b(x)") == set()


def test_a_list_run_through_twice_is_not_one_call():
    assert loops("for b in self.blocks:\n    x = b(x)\nfor b in self.blocks:\n    y = b(y)") == set()
