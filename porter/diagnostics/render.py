"""Print diagnostics: for people, and as json, sarif or github annotations. Each printer is a function to text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from porter.diagnostics.catalogue import catalogue, effort_of, find
from porter.model import Diagnostic

FORMATS = ("rich", "json", "sarif", "github")
_LEVELS = {"none": "note", "low": "warning", "medium": "warning", "high": "error"}
_GITHUB = {"note": "notice", "warning": "warning", "error": "error"}
_WIDTH = 100

SourceLine = Callable[[str, int], str | None]


def render(diagnostics: Iterable[Diagnostic], fmt: str = "rich", source: SourceLine | None = None) -> str:
    """The diagnostics as text of a format. `source` gives a line of a file, to be shown; None where there is none."""
    found = list(diagnostics)
    if fmt == "json":
        return render_json(found)
    if fmt == "sarif":
        return render_sarif(found)
    if fmt == "github":
        return render_github(found)
    return "\n".join(person(d, source) for d in found)


def lines_of(*roots: Path) -> SourceLine:
    """Reads source lines of files below one of the roots."""
    texts: dict[str, list[str]] = {}

    def line(file: str, number: int) -> str | None:
        if file not in texts:
            path = next((p for root in roots if (p := root / file).is_file()), None)
            try:
                texts[file] = path.read_text(encoding="utf-8").splitlines() if path else []
            except (OSError, UnicodeDecodeError):
                texts[file] = []
        found = texts[file]
        return found[number - 1] if 1 <= number <= len(found) else None

    return line


def person(found: Diagnostic, source: SourceLine | None = None) -> str:
    """One diagnostic as a person reads it: code and effort, place and source line, what it means, what to do."""
    entry = find(found.code)
    title = f"{found.code} {entry.name if entry else ''}".rstrip()
    effort = f"effort: {effort_of(found.code)}"
    lines = [f"{title}{effort:>{max(len(effort) + 2, _WIDTH - len(title))}}"]
    if found.span is not None:
        place = f"{found.span}"
        shown = source(found.span.file, found.span.line) if source else None
        lines.append(f"  {place}   {shown.strip()}" if shown and shown.strip() else f"  {place}")
    lines += [f"  {line}" for line in found.message.splitlines() or [""]]
    lines += [f"  see also {span}" for span in found.related]
    if found.rule and found.rule not in found.message:
        lines.append(f"  rule {found.rule}")
    advice = found.advice or (entry.advice if entry else "")
    lines.append(f"  {advice.rstrip('.')}; see porter explain {found.code}." if advice else "")
    return "\n".join(line for line in lines if line) + "\n"


def as_dict(found: Diagnostic) -> dict[str, object]:
    """One diagnostic as plain data; the shape of `--format json` and of `port.json`."""
    entry = find(found.code)
    return {
        "code": found.code,
        "name": entry.name if entry else None,
        "effort": effort_of(found.code),
        "message": found.message,
        "file": found.span.file if found.span else None,
        "line": found.span.line if found.span else None,
        "column": found.span.column if found.span else None,
        "rule": found.rule,
        "advice": found.advice or (entry.advice if entry else None),
        "related": [str(span) for span in found.related],
    }


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    return json.dumps([as_dict(d) for d in diagnostics], indent=2, ensure_ascii=False) + "\n"


def render_sarif(diagnostics: Iterable[Diagnostic]) -> str:
    """SARIF 2.1.0, one run."""
    from porter import __version__

    found = list(diagnostics)
    used = sorted({d.code for d in found})
    entries = catalogue()
    rules = [
        {
            "id": code,
            "name": _camel(entries[code].name),
            "shortDescription": {"text": entries[code].name},
            "fullDescription": {"text": entries[code].meaning},
            "help": {"text": entries[code].advice},
            "defaultConfiguration": {"level": _LEVELS[entries[code].effort]},
        }
        for code in used
        if code in entries
    ]
    driver = {"name": "porter", "version": __version__, "rules": rules}
    results = [_sarif_result(d) for d in found]
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}],
    }
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def _sarif_result(found: Diagnostic) -> dict[str, object]:
    result: dict[str, object] = {
        "ruleId": found.code,
        "level": _LEVELS[effort_of(found.code)],
        "message": {"text": f"{found.message}\n{found.advice}" if found.advice else found.message},
    }
    if found.span is not None:
        result["locations"] = [_location(found.span.file, found.span.line, found.span.column)]
    if found.related:
        result["relatedLocations"] = [_location(s.file, s.line, s.column) for s in found.related]
    if found.rule:
        result["properties"] = {"porterRule": found.rule}
    return result


def _location(file: str, line: int, column: int) -> dict[str, object]:
    region = {"startLine": max(1, line), "startColumn": max(1, column)}
    return {"physicalLocation": {"artifactLocation": {"uri": file}, "region": region}}


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.replace("-", " ").split())


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Workflow commands that GitHub shows beside the line."""
    lines = []
    for found in diagnostics:
        entry = find(found.code)
        level = _GITHUB[_LEVELS[effort_of(found.code)]]
        fields = {"title": f"{found.code} {entry.name if entry else ''}".strip()}
        if found.span is not None:
            fields = {"file": found.span.file, "line": str(found.span.line), **fields}
        properties = ",".join(f"{key}={_property(value)}" for key, value in fields.items())
        lines.append(f"::{level} {properties}::{_data(found.message)}")
    return "".join(f"{line}\n" for line in lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def worst(diagnostics: Iterable[Diagnostic]) -> int:
    """Index of the highest effort among diagnostics (see `catalogue.EFFORTS`), -1 if there are none."""
    from porter.diagnostics.catalogue import EFFORTS

    return max((EFFORTS.index(effort_of(d.code)) for d in diagnostics), default=-1)
