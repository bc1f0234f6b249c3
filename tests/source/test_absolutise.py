"""Every reference to a global says where it comes from; nothing else is renamed."""

from porter.source.marks import Mark, mark_of

HEAD = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\nfrom .other import Thing\n"


def test_an_imported_class_is_written_by_its_full_name_whatever_the_alias(shelf):
    assert "x = torch·nn·Linear(1)" in shelf.absolute(HEAD + "def f():\n    x = nn.Linear(1)\n")
    assert "x = torch·nn·Linear(1)" in shelf.absolute(HEAD + "def f():\n    x = torch.nn.Linear(1)\n")


def test_a_name_of_the_same_file_is_absolute_too(shelf):
    assert "return diffusers·m·g()" in shelf.absolute("def g():\n    pass\n\ndef f():\n    return g()\n")


def test_an_attribute_of_an_object_is_no_part_of_the_name(shelf):
    assert "diffusers·other·Thing.size.width" in shelf.absolute(HEAD + "def f():\n    return Thing.size.width\n")


def test_a_parameter_is_not_taken_for_the_global_of_its_name(shelf):
    assert "return Thing(1)" in shelf.absolute(HEAD + "def f(Thing):\n    return Thing(1)\n")


def test_a_local_is_not_taken_for_the_global_of_its_name_even_before_it_is_assigned(shelf):
    text = shelf.absolute(HEAD + "def f(x):\n    print(F)\n    F = x\n    return F.y\n")
    assert "print(F)" in text and "F.y" in text and "·" not in text


def test_loop_and_comprehension_variables_are_locals(shelf):
    text = shelf.absolute(HEAD + "def f(xs):\n    for F in xs: pass\n    return F, [nn for nn in xs]\n")
    assert "·" not in text


def test_a_lambda_shadows_only_inside_itself(shelf):
    text = shelf.absolute(HEAD + "def f(x):\n    g = lambda Thing: Thing.a\n    return Thing\n")
    assert "lambda Thing: Thing.a" in text and "return diffusers·other·Thing" in text


def test_a_local_of_one_method_does_not_hide_a_global_in_another(shelf):
    text = shelf.absolute(
        HEAD + "class A:\n    def f(self, F):\n        return F\n    def g(self):\n        return F.relu\n", "A"
    )
    assert "return F\n" in text and "return torch·nn·functional·relu" in text


def test_a_nested_function_sees_the_locals_around_it(shelf):
    text = shelf.absolute(HEAD + "def f(Thing):\n    def g():\n        return Thing\n    return g\n")
    assert "·" not in text


def test_keywords_and_attribute_names_are_left_alone(shelf):
    text = shelf.absolute(HEAD + "def f(x):\n    return x.Thing(Thing=1)\n")
    assert "x.Thing(Thing=1)" in text


def test_a_builtin_is_left_alone(shelf):
    assert "return len(x)" in shelf.absolute("def f(x):\n    return len(x)\n")


def test_text_in_a_string_is_not_a_reference(shelf):
    assert 'return "Thing"' in shelf.absolute(HEAD + 'def f():\n    return "Thing"\n')


def test_a_default_is_read_outside_the_function(shelf):
    assert "Thing=diffusers·other·Thing" in shelf.absolute(HEAD + "def f(Thing=Thing):\n    return Thing\n")


def test_decorators_and_bases_are_references(shelf):
    text = shelf.absolute(HEAD + "@torch.no_grad()\nclass A(nn.Module):\n    pass\n", "A")
    assert "@torch·no_grad()" in text and "class A(torch·nn·Module):" in text


def test_a_quoted_annotation_is_a_reference(shelf):
    assert "x: diffusers·other·Thing" in shelf.absolute(HEAD + 'def f(x: "Thing"):\n    pass\n')


def test_a_quoted_annotation_of_an_unknown_name_stays_as_it_is(shelf):
    assert 'x: "Elsewhere"' in shelf.absolute(HEAD + 'def f(x: "Elsewhere"):\n    pass\n')


def test_a_hole_of_a_format_string_is_a_reference(shelf):
    text = shelf.absolute(HEAD + 'def f():\n    return f"{Thing.size} and {len(Thing)} Thing"\n')
    assert 'f"{diffusers·other·Thing.size} and {len(diffusers·other·Thing)} Thing"' in text


def test_a_local_in_a_format_string_is_left_alone(shelf):
    assert 'f"{Thing} {x}"' in shelf.absolute(HEAD + 'def f(Thing, x):\n    return f"{Thing} {x}"\n')


def test_a_local_import_names_a_global_and_goes(shelf):
    text = shelf.absolute("def f(x):\n    from ..a import b as c\n    return c(x)\n")
    assert "import" not in text and "pass" in text and "a·b(x)" in text and "c(x)" not in text


def test_a_relative_import_is_resolved_against_the_package(shelf):
    shelf.write({"p/__init__.py": "", "p/q.py": "from ..r import S\n\ndef f():\n    return S\n", "r.py": "S = 1\n"})
    node = shelf.library.definition("diffusers.p.q.f").node
    assert node.body.body[0].body[0].value.value == "diffusers·r·S"


def test_wide_characters_before_a_name_do_not_shift_the_replacement(shelf):
    assert 'return "größe — 幅", diffusers·other·Thing' in shelf.absolute(
        HEAD + 'def f():\n    return "größe — 幅", Thing\n'
    )


def test_each_statement_is_marked_with_its_own_line(shelf):
    node = shelf.definition("import a\n\n\ndef f(x):\n    y = (\n        x\n    )\n    if y:\n        return 1\n").node
    assign, test = node.body.body
    assert mark_of(node) == Mark("m.py", 4)
    assert mark_of(assign) == Mark("m.py", 5)
    assert mark_of(test) == Mark("m.py", 8) and mark_of(test.body.body[0]) == Mark("m.py", 9)


def test_a_mark_does_not_land_in_a_string_of_many_lines(shelf):
    node = shelf.definition('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n').node
    assert "§" not in node.body.body[0].body[0].value.value
    assert mark_of(node.body.body[0]) == Mark("m.py", 2)


def test_the_comment_above_a_definition_stays(shelf):
    assert shelf.absolute("import a\n\n# about f\ndef f():\n    pass\n").startswith("# about f\ndef f():")


def test_a_statement_behind_a_local_import_stays(shelf):
    assert "pass; y = 1" in shelf.absolute(HEAD + "def f():\n    import os; y = 1\n    return y\n")


def test_names_in_the_cases_of_a_match_are_absolute(shelf):
    text = shelf.absolute(HEAD + "def f(x):\n    match x:\n        case 1 if F.a:\n            return nn.Linear(1)\n")
    assert "case 1 if torch·nn·functional·a:" in text and "return torch·nn·Linear(1)" in text
