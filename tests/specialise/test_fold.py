"""What has one outcome is folded; what has two, or is not understood, stays with both."""

import pytest

from porter.model import PorterError

ROOT = """
class FooTransformer2DModel(nn.Module):
    def __init__(self, dim: int = 8{parameters}):
        super().__init__()
        {init}

    def forward(self, hidden_states{arguments}, attention_kwargs=None):
        {forward}
        return hidden_states
"""


def root(init, forward="pass", parameters="", arguments=""):
    return ROOT.format(
        init=init.replace("\n", "\n        "),
        forward=forward.replace("\n", "\n        "),
        parameters=parameters,
        arguments=arguments,
    )


# ---- options


def test_an_option_that_nobody_sets_is_folded_away(specialise):
    text = specialise(root("self.ff = FeedForward(dim)", "hidden_states = self.ff(hidden_states)"))["FooFeedForward"]
    assert "nn.GELU()" in text
    assert "SiLU" not in text and "activation ==" not in text


def test_an_option_that_the_configuration_decides_is_not_folded(specialise):
    found = specialise(
        root(
            "self.ff = FeedForward(dim, activation=act)",
            "hidden_states = self.ff(hidden_states)",
            ', act: str = "gelu"',
        )
    )
    assert "GELU" in found["FooFeedForward"] and "SiLU" in found["FooFeedForward"]
    assert "activation" in found.signature("FooFeedForward", "__init__")


def test_a_default_of_the_root_is_no_constant(specialise):
    found = specialise(
        root("self.flag = flag", "if self.flag:\n    hidden_states = hidden_states * 2", ", flag: bool = False")
    )
    assert "* 2" in found["FooTransformer2DModel"]


def test_a_call_with_a_known_outcome_decides_the_branch(specialise):
    found = specialise(root("pass", "if is_available():\n    hidden_states = hidden_states * 2"))
    assert "* 2" not in found["FooTransformer2DModel"]


def test_a_test_that_is_not_understood_keeps_both_branches(specialise):
    forward = "if hidden_states.shape[0] > 1:\n    x = 1\nelse:\n    x = 2\nhidden_states = hidden_states * x"
    text = specialise(root("pass", forward))["FooTransformer2DModel"]
    assert "x = 1" in text and "x = 2" in text


def test_the_guards_of_gradient_checkpointing_are_left_to_their_rule(specialise):
    """One mechanism decides them: the rule, which reports what it does not understand."""
    guard = "if torch.is_grad_enabled() and self.gradient_checkpointing:\n    hidden_states = hidden_states * 2"
    assert "* 2" in specialise(root("pass", guard))["FooTransformer2DModel"]


def test_a_test_on_none_that_the_source_asks_for_is_not_folded_by_an_annotation(specialise):
    forward = "if mask is None:\n    mask = 1\nhidden_states = hidden_states * mask"
    found = specialise(root("pass", forward, arguments=", mask: torch.Tensor"))
    assert "if mask is None:" in found["FooTransformer2DModel"]


def test_a_configuration_parameter_tested_for_none_is_not_folded_by_its_annotation(specialise):
    init = "if width is None:\n    width = dim\nself.proj = nn.Linear(dim, width)"
    found = specialise(root(init, "hidden_states = self.proj(hidden_states)", ", width: int = 4"))
    assert "if width is None:" in found["FooTransformer2DModel"]


# ---- parameters

BLOCK = """
class FooBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states, mask=None, scale=1.0):
        if mask is not None:
            hidden_states = hidden_states * mask
        return self.proj(hidden_states)


"""
BUILD = "self.a = FooBlock(dim)\nself.b = FooBlock(dim)"


def test_a_parameter_that_is_none_everywhere_is_gone_from_signature_and_calls(specialise):
    forward = "hidden_states = self.a(hidden_states, None)\nhidden_states = self.b(hidden_states, mask=None)"
    found = specialise(BLOCK + root(BUILD, forward))
    assert found.signature("FooBlock") == ["hidden_states"]
    assert "mask" not in found["FooBlock"] + found["FooTransformer2DModel"]
    assert "self.a(hidden_states)" in found["FooTransformer2DModel"]
    assert "self.b(hidden_states)" in found["FooTransformer2DModel"]


def test_a_parameter_that_is_none_in_one_call_and_given_in_another_stays(specialise):
    forward = "hidden_states = self.a(hidden_states)\nhidden_states = self.b(hidden_states, mask=hidden_states)"
    found = specialise(BLOCK + root(BUILD, forward))
    assert found.signature("FooBlock") == ["hidden_states", "mask"]
    assert "if mask is not None:" in found["FooBlock"]


def test_a_parameter_that_nobody_reads_goes_and_takes_its_argument_along(specialise):
    forward = "hidden_states = self.a(hidden_states, hidden_states, 2.0)\nhidden_states = self.b(hidden_states)"
    found = specialise(BLOCK + root(BUILD, forward))
    assert "scale" not in found.signature("FooBlock")
    assert "self.a(hidden_states, hidden_states)" in found["FooTransformer2DModel"]


def test_an_argument_behind_a_lost_one_does_not_slip_into_its_place(specialise):
    block = BLOCK.replace("self.proj(hidden_states)", "self.proj(hidden_states) * scale")
    forward = "hidden_states = self.a(hidden_states, None, dim)\nhidden_states = self.b(hidden_states, None, 2.0)"
    found = specialise(block + root(BUILD, forward, arguments=", dim"))
    assert found.signature("FooBlock") == ["hidden_states", "scale"]
    assert "self.a(hidden_states, scale=dim)" in found["FooTransformer2DModel"]


def test_parameters_of_the_root_are_never_lost(specialise):
    found = specialise(root("pass", parameters=", unused: int = 3", arguments=", mask=None"))
    assert found.signature("FooTransformer2DModel", "__init__") == ["dim", "unused"]
    assert found.signature("FooTransformer2DModel")[:2] == ["hidden_states", "mask"]


# ---- attention

CROSS = root(
    "self.one = Attention(dim)\nself.two = Attention(dim, cross_dim=16)",
    "hidden_states = self.one(hidden_states)\nhidden_states = self.two(hidden_states, encoder_hidden_states=text)",
    arguments=", text: torch.Tensor",
)
SELF = root("self.attn = Attention(dim)", "hidden_states = self.attn(hidden_states)")


def test_the_processor_becomes_the_forward_of_its_owner(specialise):
    text = specialise(SELF)["FooAttention"]
    assert "self.to_q(hidden_states)" in text and "F.scaled_dot_product_attention" in text
    assert "attn." not in text and "processor(" not in text and "set_processor" not in text


def test_a_module_that_is_never_built_is_not_asked_for(specialise):
    text = specialise(SELF)["FooAttention"]
    assert "norm" not in text


def test_methods_that_nothing_reaches_are_not_carried(specialise):
    assert "def fuse" not in specialise(SELF)["FooAttention"]


def test_one_class_built_for_self_and_cross_attention_becomes_two(specialise):
    names = specialise(CROSS).names
    assert {"FooSelfAttention", "FooCrossAttention"} <= set(names)
    assert "FooAttention" not in names


def test_what_one_use_passes_does_not_leak_into_the_other(specialise):
    found = specialise(CROSS)
    assert found.signature("FooSelfAttention") == ["hidden_states"]
    assert found.signature("FooCrossAttention") == ["hidden_states", "encoder_hidden_states"]
    assert "cross_dim" not in found["FooSelfAttention"]


def test_each_constructor_call_builds_its_own_class(specialise):
    text = specialise(CROSS)["FooTransformer2DModel"]
    assert "self.one = FooSelfAttention(" in text and "self.two = FooCrossAttention(" in text


def test_a_processor_with_state_of_its_own_is_not_merged(specialise):
    text = SELF.replace("Attention(dim)", "Attention(dim, processor=Stateful())")
    with pytest.raises(PorterError) as error:
        specialise(text)
    assert error.value.diagnostics[0].code == "PORT312"


def test_an_imported_block_is_not_looked_into(specialise):
    found = specialise(root("self.embed = Embedding(dim)", "hidden_states = self.embed(hidden_states)"))
    assert found.names == ["FooTransformer2DModel"]
    assert "self.embed = Embedding(dim)" in found["FooTransformer2DModel"]


def test_a_test_on_an_element_of_a_given_list_is_not_folded(specialise):
    forward = "for each in hidden_states:\n    if each is not None:\n        hidden_states = each + 1"
    assert "if each is not None:" in specialise(root("pass", forward))["FooTransformer2DModel"]


def test_a_constructor_of_stars_takes_the_options_of_its_base(specialise):
    small = (
        "\n\nclass FooAttention(Attention):\n    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
    )
    text = specialise(
        root("self.attn = FooAttention(dim, norm=True)", "hidden_states = self.attn(hidden_states)") + small
    )["FooAttention"]
    assert "self.norm = None" not in text
    assert "query = self.norm(query)" in text
