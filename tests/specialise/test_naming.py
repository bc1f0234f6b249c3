"""Names of classes, files and folders."""

import pytest

from porter.specialise.naming import snake, stem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FooTransformer2DModel", "Foo"),
        ("FooTransformer3DModel", "Foo"),
        ("FooTransformer", "Foo"),
        ("FooDiTModel", "Foo"),
        ("FooModel", "Foo"),
        ("FooNet", "FooNet"),
    ],
)
def test_the_stem_of_a_class_is_what_is_its_own(name, expected):
    assert stem(name) == expected


def test_a_name_that_is_all_suffix_does_not_become_empty():
    assert stem("Transformer2DModel") == "Transformer2DModel"


def test_a_suffix_in_the_middle_stays():
    assert stem("FooTransformerBlock") == "FooTransformerBlock"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("QwenImage", "qwen_image"), ("DiTBlock", "di_t_block"), ("VAEFoo", "vae_foo")],
)
def test_words_are_separated_and_not_single_capitals(name, expected):
    assert snake(name) == expected


SHARED = """
class FooBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn = Attention(dim)
        self.ff = FeedForward(dim)

    def forward(self, x):
        return self.ff(self.attn(x))


class FooTransformer2DModel(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.block = FooBlock(dim)

    def forward(self, hidden_states):
        return self.block(hidden_states)
"""


def test_a_shared_class_takes_the_models_stem_and_an_own_one_does_not(specialise):
    assert set(specialise(SHARED).names) == {"FooAttention", "FooFeedForward", "FooBlock", "FooTransformer2DModel"}


def test_two_uses_of_one_class_do_not_share_a_name(specialise):
    text = SHARED.replace("FeedForward(dim)", 'nn.ModuleList([FeedForward(dim), FeedForward(dim, activation="silu")])')
    names = specialise(text.replace("self.ff(self.attn(x))", "self.ff[0](self.attn(x))")).names
    assert len(names) == len(set(names)) == 5


def test_classes_are_named_in_order_of_use(specialise):
    names = specialise(SHARED).names
    assert names[-1] == "FooTransformer2DModel"
    assert names.index("FooAttention") < names.index("FooBlock")
