"""A mask gives way to None before the layers only if all that they do with it is to mask attention."""

from textwrap import dedent

import pytest

from porter.engine.absolute_text import unit_of
from porter.facts.unpadded_masks import unpadded_masks
from tests.facts.conftest import HEAD, build

IMPORTS = HEAD + "from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata\n"
ATTEND = "return self.attn(x, x, x, attn_metadata=AttentionMetadata(attn_mask={0}) if {0} is not None else None)"
ROOT = "for block in self.blocks:\n    x = block(x, mask=mask)\nreturn x"


def found(*guarded, mask="mask", before="", root=ROOT):
    layer = before + ("if mask is not None:\n" + "".join(f"    {line}\n" for line in guarded) if guarded else "")
    text = build(
        "self.attn = nn.Identity()", forward=layer + ATTEND.format(mask), name="Layer", arguments="x, mask=None"
    )
    text += build(
        "self.blocks = nn.ModuleList([Layer(2) for _ in range(2)])", forward=root, arguments="x, mask=None, other=None"
    )
    return len(list(unpadded_masks(unit_of(IMPORTS + dedent(text)))))


@pytest.mark.parametrize(
    "value",
    [
        "mask.bool()[:, None, None, :]",
        "mask[:, None, None, :] * mask[:, None, :, None]",
        "torch.cat([torch.ones((2, 3), dtype=torch.bool), mask], dim=1)",
        "mask.view(2, 1, 1, -1).expand(-1, 2, 3, -1)",
    ],
)
def test_what_is_true_where_the_mask_is_stays_a_mask(value):
    assert found(f"mask = {value}") == 1
    assert found(f"keys = {value}", mask="keys", before="keys = None\n") == 1


@pytest.mark.parametrize(
    "value",
    [
        "(1 - mask) * -10000.0",
        "mask | mask.flip(0)",
        "~mask",
        "torch.cat([mask, x], dim=1)",
        "F.pad(mask, (3, 0))",
        "x.bool()",
    ],
)
def test_what_may_be_false_where_the_mask_is_true_is_another_mask(value):
    assert found(f"mask = {value}") == 0


def test_a_mask_that_exists_only_if_the_given_one_does_must_be_none_else():
    assert found("keys = mask.bool()", mask="keys") == 0


def test_what_the_guarded_statements_store_is_not_read_behind_them():
    assert found("x = x * mask[..., None]") == 0
    assert found("length = mask.shape[1]") == 1
    assert found("length = mask.shape[1]", before="x = x * length\n") == 0


@pytest.mark.parametrize(
    "root",
    [
        "for block in self.blocks:\n    x = block(x, mask=mask)\nreturn x * mask.sum()",
        "for block in self.blocks:\n    x = block(x, mask=mask)\n    mask = other\nreturn x",
        "mask = (1 - other) * -10000.0\nfor block in self.blocks:\n    x = block(x, mask=mask)\nreturn x",
        "for block in self.blocks:\n    x = block(x, mask=mask if other else None)\nreturn x",
        "x = self.blocks[0](x, mask=mask)\nreturn x",
    ],
)
def test_a_mask_that_the_model_reads_changes_or_makes_a_bias_of_stays(root):
    assert found(root=root) == 0


def test_a_mask_that_the_model_reads_before_the_layers_may_go():
    assert found(root="x = x * mask.sum()\n" + ROOT) == 1
