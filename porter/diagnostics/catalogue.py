"""The catalogue of diagnostics: what each code means and what to do. The data is in `catalogue.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from msgspec import Struct

Effort = Literal["none", "low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("none", "low", "medium", "high")
FILE = Path(__file__).with_name("catalogue.yaml")
_CODE = re.compile(r"^(PORT\d{3}):", re.MULTILINE)

FAMILIES = {
    "0": "usage and environment",
    "1": "source and symbols",
    "2": "rules and conflicts",
    "3": "attention",
    "4": "parallel plans",
    "5": "pipelines",
    "6": "emission",
    "9": "verification",
}


class Entry(Struct, frozen=True):
    """One code. `effort` is what a person must put in before the port can be used: none, minutes, hours, a redesign."""

    code: str
    name: str
    effort: Effort
    meaning: str
    advice: str
    example: str = ""

    @property
    def family(self) -> str:
        return FAMILIES[self.code[4]]


@lru_cache(maxsize=1)
def codes() -> frozenset[str]:
    """Every code there is; read without parsing the catalogue."""
    return frozenset(_CODE.findall(FILE.read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, Entry]:
    """All entries by code."""
    import msgspec

    from porter.engine.yamltext import parse_file

    data = parse_file(FILE, FILE.name).data
    assert isinstance(data, dict)
    return {code: msgspec.convert({"code": code, **fields}, Entry) for code, fields in data.items()}


@lru_cache(maxsize=128)
def find(code: str) -> Entry | None:
    """The entry of a code, or None; only its part of the catalogue is parsed."""
    import msgspec

    from porter.engine.yamltext import parse

    text = FILE.read_text(encoding="utf-8")
    begin = next((m for m in _CODE.finditer(text) if m[1] == code), None)
    if begin is None:
        return None
    following = _CODE.search(text, begin.end())
    data = parse(text[begin.start() : following.start() if following else None], FILE.name).data
    assert isinstance(data, dict)
    return msgspec.convert({"code": code, **data[code]}, Entry)


def entry(code: str) -> Entry:
    """The entry of a code. Raises KeyError with a hint for a code that is not in the catalogue."""
    found = find(code)
    if found is None:
        raise KeyError(f"{code} is no diagnostic; add it to {FILE.name}")
    return found


def effort_of(code: str) -> Effort:
    """The effort of a code; `high` if it is unknown, so that nothing unknown is taken lightly."""
    found = find(code)
    return found.effort if found else "high"
