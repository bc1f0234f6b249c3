"""A mask of keys attends to what the bias that Diffusers makes of it attends to."""

import pytest

from porter.emit.templates import render

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def key_padding_mask():
    names = {}
    exec(render("transformer/key_padding_mask.py.jinja"), names)
    return names["key_padding_mask"]


def attended(mask, scores):
    """What a softmax leaves of `scores` ([B, queries, keys]) under a bias ([B, 1, keys]) or a mask ([B, keys])."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return (scores + mask).softmax(-1)


@pytest.mark.parametrize("dtype", ["bool", "int64", "float32"])
def test_padding_gets_nothing_and_a_row_of_padding_alone_everything(key_padding_mask, dtype):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).to(getattr(torch, dtype))
    scores = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = ((1 - mask.to(scores.dtype)) * -10000.0).unsqueeze(1)
    torch.testing.assert_close(attended(key_padding_mask(mask), scores), attended(bias, scores), rtol=0, atol=1e-9)


def test_nothing_is_asked_of_the_device(key_padding_mask):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        mask = torch.ones(2, 3, dtype=torch.int64)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(mask.all())  # what this is about
        keys = key_padding_mask(mask)
    assert keys.dtype == torch.bool and keys.shape == (2, 3)
    assert key_padding_mask(None) is None


def test_a_bias_is_the_same_for_all_heads(key_padding_mask):
    bias = torch.randn(2, 1, 3)
    assert torch.equal(key_padding_mask(bias), bias[:, None])
