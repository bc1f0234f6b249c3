"""Which modules a class builds, and where they are held."""

from porter.engine.absolute_text import unit_of
from porter.facts.module_tree import module_tree
from tests.facts.conftest import HEAD, build


def tree_of(*lines, **more):
    return module_tree(unit_of(HEAD + build(*lines, forward="return x", **more)))["Net"]


def test_elements_of_a_list_have_an_index():
    found = tree_of("self.net = nn.ModuleList([nn.Linear(dim, 4), nn.GELU(), nn.Linear(4, dim)])")
    assert found.elements("net") == ["net.0", "net.1", "net.2"]
    assert [found.at(p)[0].is_linear for p in found.elements("net")] == [True, False, True]


def test_the_container_itself_is_no_site():
    assert tree_of("self.net = nn.Sequential(nn.Linear(dim, 4), nn.GELU())").at("net") == ()


def test_what_is_appended_counts_on_from_what_is_there():
    found = tree_of(
        "self.net = nn.ModuleList([nn.GELU()])", "self.net.append(nn.Linear(dim, 4))", "self.net.append(nn.Dropout())"
    )
    assert found.elements("net") == ["net.0", "net.1", "net.2"]
    assert found.at("net.1")[0].cls == "torch.nn.Linear"


def test_elements_are_in_order_of_their_numbers_and_not_of_their_digits():
    found = tree_of("self.net = nn.ModuleList([" + ", ".join(["nn.GELU()"] * 11) + "])")
    assert found.elements("net")[1:3] == ["net.1", "net.2"] and found.elements("net")[-1] == "net.10"


def test_a_list_of_unknown_length_has_no_number():
    found = tree_of("self.net = nn.ModuleList([nn.Linear(dim, dim) for _ in range(3)])")
    assert found.elements("net") == ["net.*"]


def test_two_branches_give_two_sites_of_one_path():
    found = tree_of("if dim > 4:", "    self.act = nn.GELU()", "else:", "    self.act = nn.SiLU()")
    assert [s.cls for s in found.at("act")] == ["torch.nn.GELU", "torch.nn.SiLU"]


def test_a_module_held_by_a_local_first_is_found():
    assert tree_of("proj = nn.Linear(dim, dim)", "self.proj = proj").at("proj")[0].is_linear


def test_a_module_that_no_attribute_holds_is_no_site():
    assert dict(tree_of("proj = nn.Linear(dim, dim)").sites) == {}


def test_an_attribute_whose_name_begins_alike_is_not_an_element():
    assert tree_of("self.net = nn.ModuleList([nn.GELU()])", "self.network = nn.GELU()").elements("net") == ["net.0"]


def test_a_class_of_the_unit_is_named_as_the_unit_names_it():
    text = build("pass", forward="return x", name="Part") + build(
        "self.part = Part(dim)", forward="return self.part(x)"
    )
    assert module_tree(unit_of(HEAD + text))["Net"].at("part")[0].cls == "Part"
