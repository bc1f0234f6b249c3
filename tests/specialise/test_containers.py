"""Lists, dicts, inheritance and static methods: nothing is taken for empty, missing or constant that is not."""

from tests.specialise.test_fold import BLOCK, root

FORWARD = "hidden_states = self.a(hidden_states)"


def test_a_list_filled_in_a_loop_is_not_empty(specialise):
    init = "blocks = []\nfor i in range(dim):\n    blocks.append(FooBlock(dim))\nself.blocks = nn.ModuleList(blocks)"
    forward = "for block in self.blocks:\n    hidden_states = block(hidden_states)"
    found = specialise(BLOCK + root(init, forward))
    assert "FooBlock" in found.names
    assert "block(hidden_states)" in found["FooTransformer2DModel"]


def test_a_test_on_a_list_filled_in_a_loop_is_not_folded(specialise):
    forward = "kept = []\nfor i in range(3):\n    kept.append(i)\nif kept:\n    hidden_states = hidden_states * 2"
    assert "if kept:" in specialise(root("pass", forward))["FooTransformer2DModel"]


def test_a_list_that_stays_empty_is_empty(specialise):
    forward = "kept = []\nif kept:\n    hidden_states = hidden_states * 2"
    assert "* 2" not in specialise(root("pass", forward))["FooTransformer2DModel"]


def test_a_dict_filled_by_subscript_keeps_its_stars(specialise):
    filled = 'extra = {}\nif hidden_states.ndim == 3:\n    extra["mask"] = hidden_states\n'
    forward = filled + "hidden_states = self.a(hidden_states, **extra)"
    found = specialise(BLOCK + root("self.a = FooBlock(dim)", forward))
    assert "**extra" in found["FooTransformer2DModel"]
    assert "mask" in found.signature("FooBlock")


def test_a_dict_that_stays_empty_is_not_passed_on(specialise):
    forward = "extra = {}\nhidden_states = self.a(hidden_states, **extra)"
    found = specialise(BLOCK + root("self.a = FooBlock(dim)", forward))
    assert "**extra" not in found["FooTransformer2DModel"]


CONTAINER = """
class SmallAttention(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.small = nn.Linear(1, 1)
"""


def test_a_shared_container_that_hands_everything_on_keeps_the_arguments(specialise):
    found = specialise(CONTAINER + root("self.a = SmallAttention(dim)", FORWARD))
    assert "self.a = SmallAttention(dim)" in found["FooTransformer2DModel"]
    found = found["SmallAttention"]
    assert "self.to_q = nn.Linear(dim, dim)" in found and "self.small = nn.Linear(1, 1)" in found
    assert "*args" not in found and "kwargs" not in found


def test_no_base_of_diffusers_is_left_behind(specialise):
    found = specialise(CONTAINER + root("self.a = SmallAttention(dim)", FORWARD))["SmallAttention"]
    assert found.splitlines()[0].strip() == "class SmallAttention(nn.Module):"


STATIC = """
class FooBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    @staticmethod
    def scaled(x, factor, mask=None):
        if mask is not None:
            x = x * mask
        return x * factor

    def forward(self, hidden_states):
        return self.scaled(self.proj(hidden_states), 2.5)


"""


def test_the_first_parameter_of_a_static_method_is_not_a_receiver(specialise):
    found = specialise(STATIC + root("self.a = FooBlock(dim)", FORWARD))
    text = found["FooBlock"]
    assert "self.proj(hidden_states)" in text
    assert "mask" not in text and "self.scaled(x" not in text


def test_a_method_called_in_two_ways_keeps_what_differs(specialise):
    block = STATIC.replace("2.5)", "2.5) + self.scaled(hidden_states, 1.0, mask=hidden_states)")
    found = specialise(block + root("self.a = FooBlock(dim)", FORWARD))
    assert found.signature("FooBlock", "scaled") == ["x", "factor", "mask"]
    assert "if mask is not None:" in found["FooBlock"]


def test_an_attribute_that_is_set_on_one_path_only_is_not_constant(specialise):
    init = "if dim > 4:\n    self.extra = nn.Linear(dim, dim)\nelse:\n    self.extra = None"
    forward = "if self.extra is not None:\n    hidden_states = self.extra(hidden_states)"
    assert "if self.extra is not None:" in specialise(root(init, forward))["FooTransformer2DModel"]


def test_a_block_in_a_comprehension_is_built(specialise):
    init = "self.blocks = nn.ModuleList([FooBlock(dim) for _ in range(2)])"
    forward = "for block in self.blocks:\n    hidden_states = block(hidden_states, mask=None)"
    found = specialise(BLOCK + root(init, forward))
    assert found.signature("FooBlock") == ["hidden_states"]
    assert "block(hidden_states)" in found["FooTransformer2DModel"]
