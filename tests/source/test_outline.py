"""A file is cut where its top-level statements begin, and nowhere else."""

import ast
from textwrap import dedent

import pytest

from porter.source.outline import chunks, defined, is_block, is_import, method, only_imports, statements


def cut(text):
    lines = dedent(text).lstrip("\n").splitlines(keepends=True)
    return ["".join(lines[c.first - 1 : c.last]) for c in chunks(lines)]


def starts(text):
    lines = dedent(text).lstrip("\n").splitlines(keepends=True)
    return [lines[c.start - 1].strip() for c in chunks(lines)]


def test_each_statement_is_one_chunk_without_the_blank_lines_after_it():
    assert cut("import a\n\nx = 1\n\n\ndef f():\n    return 1\n\n") == [
        "import a\n",
        "x = 1\n",
        "def f():\n    return 1\n",
    ]


def test_text_in_the_first_column_of_a_string_does_not_end_a_definition():
    source = 'def f():\n    """Doc.\n\nclass Fake:\nx = 1\n    """\n    return 1\n\ny = 2\n'
    assert cut(source) == [source[: source.index("\ny = 2")], "y = 2\n"]


def test_a_string_that_ends_in_its_own_line_does_not_swallow_what_follows():
    assert starts('X = """one"""\n\ndef f():\n    pass\n') == ['X = """one"""', "def f():"]


def test_quotes_in_a_comment_do_not_open_a_string():
    assert starts('x = 1  # says """\n\ny = 2\n') == ['x = 1  # says """', "y = 2"]


def test_decorators_belong_to_what_they_decorate_and_not_to_what_stands_above():
    source = "x = 1\n\n@one\n@two(3)\ndef f():\n    pass\n"
    assert cut(source) == ["x = 1\n", "@one\n@two(3)\ndef f():\n    pass\n"]


def test_a_comment_belongs_to_the_statement_right_below_it():
    assert cut("x = 1\n\n# about f\ndef f():\n    pass\n")[1] == "# about f\ndef f():\n    pass\n"


def test_a_comment_that_stands_alone_belongs_to_nothing():
    assert cut("# a heading\n\ndef f():\n    pass\n") == ["def f():\n    pass\n"]


def test_a_chunk_starts_at_its_statement_and_not_at_the_comment_or_decorator():
    assert starts("# about f\n@one\ndef f():\n    pass\n") == ["def f():"]


def test_else_and_except_do_not_begin_a_statement():
    assert len(cut("if a:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n")) == 1
    assert len(cut("try:\n    import a\nexcept ImportError:\n    a = None\nfinally:\n    b = 1\n")) == 1


def test_a_closing_bracket_in_the_first_column_does_not_begin_a_statement():
    assert cut("X = [\n    1,\n]\ndef f(\n    a,\n):\n    pass\n") == [
        "X = [\n    1,\n]\n",
        "def f(\n    a,\n):\n    pass\n",
    ]


def test_a_comparison_or_a_call_defines_no_name():
    assert defined("x == 1\n") is None
    assert defined("register(x=1)\n") is None


def test_classes_functions_and_annotated_assignments_define_names():
    lines = ["class A(B):", "def f(x):", "async def g():", "X = 1", "Y: dict[str, int] = {}"]
    assert [defined(line) for line in lines] == ["A", "f", "g", "X", "Y"]


def test_a_name_that_begins_like_a_keyword_is_neither_block_nor_import():
    assert not is_block("iffy = 1\n")
    assert not is_import("importer = 1\n")


def test_statements_of_a_chunk_keep_the_line_numbers_of_the_file():
    lines = ["x = 1\n", "\n", "def f():\n", "    return 1\n"]
    (function,) = statements(lines, chunks(lines)[1])
    assert (function.lineno, function.body[0].lineno) == (3, 4)


def imports(text):
    found = only_imports(dedent(text))
    return None if found is None else [ast.unparse(node) for node in found]


def test_imports_of_a_text_that_does_nothing_else_are_those_that_python_reads():
    text = """
        from typing import TYPE_CHECKING
        from ..utils import (  # one (two)
            One,
            Two as Deux,
        )
        if TYPE_CHECKING:
            try:
                raise Missing()
            except Missing:
                from .dummies import *  # noqa: F403
            else:
                from . import three
                import four.five as six, seven
        """
    read = [n for n in ast.walk(ast.parse(dedent(text))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert imports(text) == [ast.unparse(n) for n in sorted(read, key=lambda n: n.lineno)]


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    from a import x\nexcept ImportError:\n    x = None\n",
        "try:\n    from a import x\nexcept ImportError:\n    from b import x\n",
        "if a:\n    def f():\n        import b\n",
        "from a import x, \\\n    y\n",
        "import a; import b\n",
        'if a:\n    """\n    import b\n    """\n',
    ],
)
def test_a_text_that_defines_or_chooses_something_is_left_to_python(text):
    assert imports(text) is None


def test_a_method_is_read_alone_and_the_first_of_its_name_counts():
    source = dedent("""
        class A:
            def f(
                self, a
            ):
                return a

            # about g
            def g(self):
                pass

            def f(self):
                pass
        """).lstrip("\n")
    lines = source.splitlines(keepends=True)
    (only,) = chunks(lines)
    assert ast.unparse(method(lines, only, "f")) == "def f(self, a):\n    return a"
    assert ast.unparse(method(lines, only, "g")) == "def g(self):\n    pass"
    assert method(lines, only, "h") is None
