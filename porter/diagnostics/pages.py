"""docs/diagnostics: one page per family, generated from the catalogue and never edited by hand."""

from __future__ import annotations

from porter.diagnostics.catalogue import FAMILIES, Entry, catalogue

_EFFORT = {
    "none": "none, for information",
    "low": "low: minutes",
    "medium": "medium: hours",
    "high": "high: there is no equivalent yet",
}


def pages() -> dict[str, str]:
    """File name (below docs/diagnostics) -> text."""
    entries = list(catalogue().values())
    result = {"README.md": _overview(entries)}
    for digit, title in FAMILIES.items():
        mine = [e for e in entries if e.code[4] == digit]
        if mine:
            body = "\n".join(_section(e) for e in mine)
            result[f"PORT{digit}xx.md"] = f"# PORT{digit}xx: {title}\n\nGenerated from the catalogue.\n\n{body}"
    return result


def _overview(entries: list[Entry]) -> str:
    rows = [f"| [{e.code}](PORT{e.code[4]}xx.md#{e.code.lower()}) | {e.name} | {e.effort} |" for e in entries]
    head = (
        "# Diagnostics\n\nGenerated from porter/diagnostics/catalogue.yaml; `porter explain CODE` prints one entry.\n\n"
    )
    return head + "\n".join(["| code | name | effort |", "|---|---|---|", *rows]) + "\n"


def _section(entry: Entry) -> str:
    parts = [f"## {entry.code}", f"**{entry.name}** (effort {_EFFORT[entry.effort]})", entry.meaning]
    parts.append(f"What to do: {entry.advice}")
    if entry.example:
        parts.append(f"```\n{entry.example}\n```")
    return "\n\n".join(parts) + "\n"
