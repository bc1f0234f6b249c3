"""A template is filled completely or not at all."""

import pytest

from porter.emit import templates
from porter.emit.source_file import file_header
from porter.model import PorterError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATES", tmp_path)
    return tmp_path


def code_of(name, **values):
    with pytest.raises(PorterError) as error:
        templates.render(name, **values)
    (found,) = error.value.diagnostics
    return found.code


def test_a_missing_variable_is_an_error_and_not_an_empty_place(folder):
    (folder / "a.jinja").write_text("x = {{ value }}\n")
    assert code_of("a.jinja") == "PORT602"


def test_a_missing_variable_in_a_condition_is_an_error_too(folder):
    (folder / "a.jinja").write_text("{% if flag %}x{% endif %}\n")
    assert code_of("a.jinja") == "PORT602"


def test_a_missing_template_is_named(folder):
    with pytest.raises(PorterError, match=r"absent\.jinja"):
        templates.render("absent.jinja")
    assert code_of("absent.jinja") == "PORT602"


def test_code_is_not_escaped_as_if_it_were_html(folder):
    (folder / "a.jinja").write_text("{{ code }}\n")
    assert templates.render("a.jinja", code='x < "1" & y') == 'x < "1" & y\n'


def test_the_header_names_source_file_version_and_rules_but_neither_date_nor_path():
    text = file_header("diffusers.Foo", "models/foo.py", "1.2.3", "abc123")
    assert all(
        part in text for part in ("SPDX-License-Identifier", "diffusers.Foo", "models/foo.py", "1.2.3", "abc123")
    )
    assert all(line.startswith("#") for line in text.splitlines())
    assert text == file_header("diffusers.Foo", "models/foo.py", "1.2.3", "abc123")
