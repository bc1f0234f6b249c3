"""Names are followed to where they are defined, and no further."""

import pytest

from porter.model import PorterError, Span, Unknown
from porter.source.library import open_library

LAZY = """
__version__ = "0.0.0"
from typing import TYPE_CHECKING
_import_structure = {"models": ["Net"]}
if TYPE_CHECKING:
    from .models import Net
else:
    import sys
"""
FILES = {
    "__init__.py": LAZY,
    "models/__init__.py": "try:\n    from .net import Net\nexcept ImportError:\n    pass\n",
    "models/net.py": "import torch.nn as nn\nfrom ..base import Base as Root\n\n\nclass Net(Root):\n    pass\n",
    "base.py": "import torch.nn as nn\n\n\nclass Plain:\n    pass\n\n\nclass Base(nn.Module, Plain):\n    pass\n",
}


@pytest.fixture
def library(shelf):
    return shelf.write(FILES).library


def test_re_exports_are_followed_to_the_definition(library):
    assert library.canonical("diffusers.Net") == "diffusers.models.net.Net"
    assert library.canonical("diffusers.models.Net") == "diffusers.models.net.Net"


def test_an_alias_is_followed_to_the_name_behind_it(library):
    assert library.canonical("diffusers.models.net.Root") == "diffusers.base.Base"


def test_an_attribute_is_followed_through_the_re_export_of_its_class(library):
    assert library.canonical("diffusers.Net.size") == "diffusers.models.net.Net.size"


def test_names_of_other_packages_are_not_followed(library):
    assert library.canonical("torch.nn.Linear") == "torch.nn.Linear"
    assert library.canonical("diffusersx.Net") == "diffusersx.Net"


def test_an_unknown_name_is_returned_and_not_guessed(library):
    assert library.canonical("diffusers.Missing") == "diffusers.Missing"
    assert isinstance(library.definition("diffusers.Missing"), Unknown)


def test_two_modules_that_import_from_each_other_do_not_hang(shelf):
    shelf.write({"a.py": "from .b import X\n", "b.py": "from .a import X\n"})
    assert isinstance(shelf.library.definition("diffusers.a.X"), Unknown)


def test_bases_are_named_where_they_are_defined(library):
    assert library.bases("diffusers.Net") == ("diffusers.base.Base",)
    assert library.ancestors("diffusers.Net") == ("diffusers.base.Base", "torch.nn.Module", "diffusers.base.Plain")


def test_only_descendants_of_torch_modules_are_torch_modules(library):
    assert library.is_torch_module("diffusers.Net")
    assert not library.is_torch_module("diffusers.base.Plain")


def test_a_function_is_no_class(shelf):
    library = shelf.write({"m.py": "def f():\n    pass\n"}).library
    assert not library.is_class("diffusers.m.f")


def test_the_place_of_a_definition_is_the_line_of_its_statement(shelf):
    library = shelf.write({"m.py": "import a\n\n# why\n@a\ndef f():\n    pass\n"}).library
    assert library.span("diffusers.m.f") == Span("m.py", 5)


def test_of_two_definitions_under_a_condition_the_first_counts(shelf):
    shelf.write({"m.py": "if a:\n    def f():\n        return 1\nelse:\n    def f():\n        return 2\n"})
    assert shelf.library.module("diffusers.m").definitions["f"].line == 2


def test_an_import_inside_a_function_is_not_an_import_of_the_module(shelf):
    library = shelf.write({"m.py": "import a\n\ndef f():\n    import b\n"}).library
    assert set(library.module("diffusers.m").imports) == {"a"}


def test_nothing_that_is_read_is_run(shelf):
    library = shelf.write({"m.py": "raise SystemExit\n\ndef f():\n    return 1\n"}).library
    assert library.definition("diffusers.m.f").name == "f"


def test_digests_cover_the_files_that_were_used_and_no_others(library):
    library.definition("diffusers.Net")
    assert set(library.digests()) == {"models/net.py"}


def test_a_checkout_is_found_by_its_source_folder(shelf, tmp_path):
    shelf.write(FILES)
    assert open_library(tmp_path).root == shelf.root
    assert open_library(shelf.root).version == "0.0.0"


def test_a_folder_without_diffusers_is_refused(tmp_path):
    with pytest.raises(PorterError) as error:
        open_library(tmp_path)
    assert error.value.diagnostics[0].code == "PORT002"


def test_source_without_a_version_is_refused(shelf):
    shelf.write({**FILES, "__init__.py": "x = 1\n"})
    with pytest.raises(PorterError) as error:
        open_library(shelf.root)
    assert error.value.diagnostics[0].code == "PORT002"


def test_code_in_the_first_column_of_a_bracket_does_not_cut_a_definition(shelf):
    text = "def f(x):\n    y = (\nx + 1\n)\n    return y\n\n\ndef g():\n    return 2\n"
    library = shelf.write({"m.py": text}).library
    assert len(library.definition("diffusers.m.f").node.body.body) == 2
    assert library.entry("diffusers.m.f").last_line == 5


def test_a_class_that_stands_in_for_a_missing_package_is_not_what_is_meant(shelf):
    text = "if is_extra_available():\n    from extra import Checker\nelse:\n\n    class Checker:\n        pass\n"
    library = shelf.write({"m.py": text}).library
    assert library.canonical("diffusers.m.Checker") == "extra.Checker"
