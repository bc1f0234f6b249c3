"""`porter explain`: a diagnostic code, a rule, or a line of a generated file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from porter.model import Diagnostic, PorterError

_CODE = re.compile(r"^(?:PORT)?(\d+)$", re.IGNORECASE)
_PLACE = re.compile(r"^(?P<file>.+):(?P<line>\d+)$")


def explain(subject: str | None, rules: Path | None = None) -> str:
    """Text for a person. Raises PorterError (PORT012) with close matches if there is nothing of that name."""
    if subject is None:
        return codes()
    if found := _CODE.match(subject):
        return code(f"PORT{found[1]}")
    if found := _PLACE.match(subject):
        return line(Path(found["file"]), int(found["line"]), rules)
    from porter.engine.authoring import show

    return show(subject, rules).rstrip("\n")


def codes() -> str:
    """The list of codes."""
    from porter.diagnostics.catalogue import FAMILIES, catalogue

    rows: list[str] = []
    for digit, title in FAMILIES.items():
        rows.append(f"PORT{digit}xx {title}")
        rows += [f"  {e.code}  {e.effort:6}  {e.name}" for e in catalogue().values() if e.code[4] == digit]
    return "\n".join(rows)


def code(name: str) -> str:
    """One entry of the catalogue, with the rules that report it."""
    from porter.diagnostics.catalogue import catalogue

    entry = catalogue().get(name)
    if entry is None:
        close = [c for c in catalogue() if c[:6] == name[:6]]
        hint = f"near it: {', '.join(close)}" if close else None
        raise PorterError(Diagnostic("PORT012", f"there is no diagnostic {name}", advice=hint))
    parts = [
        f"{entry.code} {entry.name}  (effort: {entry.effort}; {entry.family})",
        "",
        entry.meaning,
        "",
        f"What to do: {entry.advice}",
    ]
    if entry.example:
        parts += ["", f"    {entry.example}"]
    reporting = _reporting(name)
    if reporting:
        parts += ["", f"Reported by: {', '.join(reporting)}"]
    return "\n".join(parts)


def _reporting(name: str) -> list[str]:
    """Rules that name a code; found in the text, so that a broken rule file hides nothing."""
    from porter.engine.load import rule_files
    from porter.resources import RULES

    return [p.stem for p in rule_files([RULES]) if name in p.read_text(encoding="utf-8").split("\nexamples:")[0]]


def line(path: Path, number: int, rules: Path | None = None) -> str:
    """The source line and the rules behind a line of a generated file, from the `port.json` beside it."""
    origin = origin_of(path, number)
    text = path.read_text(encoding="utf-8").splitlines()[number - 1]
    parts = [f"{path}:{number}", f"    {text.strip()}"]
    if origin.file is None:
        parts.append(f"printed from {', '.join(r.removeprefix('template:') for r in origin.rules)}")
        return "\n".join(parts)
    shown = _source_line(origin.file, origin.line)
    parts.append(f"comes from diffusers/{origin.file}:{origin.line}")
    if shown is not None:
        parts.append(f"    {shown.strip()}")
    if not origin.rules:
        parts.append("unchanged but for names")
    for rule in origin.rules:
        parts.append(f"changed by {rule}: {_summary(rule, rules)}" if _summary(rule, rules) else f"changed by {rule}")
    return "\n".join(parts)


def origin_of(path: Path, number: int):  # noqa: ANN201 - porter.emit.linemap.Origin, imported lazily
    """The origin of a generated line. Raises PorterError (PORT012) if there is no line map or no such line."""
    from porter.emit.linemap import LineMap

    record = path.parent / "port.json"
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PorterError(
            Diagnostic("PORT012", f"there is no readable {record}", advice="name a file of generated/, as FILE:LINE")
        ) from None
    lines = data.get("lines", {})
    if path.name not in lines:
        known = ", ".join(sorted(lines)) or "no file"
        raise PorterError(Diagnostic("PORT012", f"{record} has no line map of {path.name}", advice=f"it has {known}"))
    found = LineMap.from_json(lines[path.name]).at(number)
    if found is None or not path.is_file():
        raise PorterError(Diagnostic("PORT012", f"{path} has no line {number}"))
    return found


def _source_line(file: str, number: int) -> str | None:
    from porter.diagnostics.render import lines_of
    from porter.source.library import open_library

    try:
        return lines_of(open_library().root)(file, number)
    except PorterError:
        return None


def _summary(rule: str, rules: Path | None) -> str:
    from porter.engine.load import load_rule, rule_files
    from porter.resources import RULES

    path = next((p for p in rule_files([rules or RULES]) if p.stem == rule), None)
    try:
        return load_rule(path, examples=False).summary if path else ""
    except PorterError:
        return ""
