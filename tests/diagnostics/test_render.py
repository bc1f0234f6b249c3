"""One finding, four printers."""

import json

import pytest

from porter.diagnostics.catalogue import catalogue
from porter.diagnostics.render import lines_of, render, worst
from porter.model import Diagnostic, Span

FOUND = Diagnostic(
    "PORT302",
    "`kwargs=self.extra`: no option takes it",
    Span("models/net.py", 2, 5),
    "attention-dispatch",
    (Span("models/other.py", 7),),
    "list it under options",
)
BARE = Diagnostic("PORT501", "no loop: 100%\nat all, here")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.py").write_text("x = 1\n    out = call(q)\n")
    return lines_of(tmp_path)


def test_a_person_sees_code_effort_place_line_message_rule_and_advice(source):
    lines = render([FOUND], "rich", source).splitlines()
    assert lines[0].startswith("PORT302 keyword not accounted for") and lines[0].endswith("effort: low")
    assert lines[1] == "  models/net.py:2   out = call(q)"
    assert lines[2:] == [
        "  `kwargs=self.extra`: no option takes it",
        "  see also models/other.py:7",
        "  rule attention-dispatch",
        "  list it under options; see porter explain PORT302.",
    ]


def test_a_finding_without_a_place_or_advice_falls_back_to_the_catalogue(source):
    text = render([BARE], "rich", source)
    assert catalogue()["PORT501"].advice.rstrip(".") in text and "None" not in text


def test_a_source_that_is_not_there_is_no_failure(tmp_path):
    assert "models/net.py:2\n" in render([FOUND], "rich", lines_of(tmp_path))


def test_json_holds_everything():
    (row,) = json.loads(render([FOUND], "json"))
    assert (row["code"], row["file"], row["line"], row["column"]) == ("PORT302", "models/net.py", 2, 5)
    assert (row["effort"], row["rule"], row["related"]) == ("low", "attention-dispatch", ["models/other.py:7"])


def test_sarif_is_what_code_scanning_reads():
    log = json.loads(render([FOUND, BARE, FOUND], "sarif"))
    (run,) = log["runs"]
    assert log["version"] == "2.1.0" and run["tool"]["driver"]["name"] == "porter"
    described = {r["id"] for r in run["tool"]["driver"]["rules"]}
    assert {r["ruleId"] for r in run["results"]} == described == {"PORT302", "PORT501"}
    first, second, _ = run["results"]
    assert first["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "models/net.py"},
        "region": {"startLine": 2, "startColumn": 5},
    }
    assert (first["level"], second["level"]) == ("warning", "error") and "locations" not in second


def test_github_annotations_are_escaped():
    first, second = render([FOUND, BARE], "github").splitlines()
    assert first.startswith("::warning file=models/net.py,line=2,title=PORT302 keyword not accounted for::`kwargs")
    assert second == "::error title=PORT501 denoising loop not found::no loop: 100%25%0Aat all, here"


@pytest.mark.parametrize("fmt", ["rich", "github"])
def test_nothing_found_prints_nothing(fmt):
    assert render([], fmt) == ""


def test_no_findings_are_still_valid_documents():
    assert json.loads(render([], "json")) == []
    assert json.loads(render([], "sarif"))["runs"][0]["results"] == []


def test_the_worst_effort_counts():
    assert worst([]) == -1
    assert worst([FOUND]) < worst([FOUND, BARE])
