"""From marked text to formatted text, without losing where each line came from.

Formatting keeps the statements and their order, so the marks of the unformatted text are handed to the statements of
the formatted one by walking both trees in step. Every line of a file has an origin: a source line with the rules that
changed it, or the template it was printed from.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from porter.model import Diagnostic, PorterError, Span
from porter.source.marks import Mark, read, strip

LINE_LENGTH = 120
TEMPLATE_FILE = "porter_template.py"
"""File of definitions that come from a template and not from Diffusers."""
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


class Origin(Struct, frozen=True):
    """Where a generated line came from. `file` is None for a line that only a template wrote."""

    file: str | None
    line: int
    rules: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return " ".join(p for p in (place, ", ".join(self.rules)) if p)


class LineMap(Struct, frozen=True):
    """Origin of every line of one generated file; `origins[0]` is line 1."""

    origins: tuple[Origin, ...]

    def at(self, line: int) -> Origin | None:
        """The origin of a line, counted from 1; None outside the file."""
        return self.origins[line - 1] if 1 <= line <= len(self.origins) else None

    def to_json(self) -> list[list[object]]:
        """Runs of lines with one origin: [first, last, "file:line" or null, [rules]]."""
        rows: list[list[object]] = []
        for number, origin in enumerate(self.origins, 1):
            place = f"{origin.file}:{origin.line}" if origin.file else None
            if rows and rows[-1][2:] == [place, list(origin.rules)] and rows[-1][1] == number - 1:
                rows[-1][1] = number
            else:
                rows.append([number, number, place, list(origin.rules)])
        return rows

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[object]]) -> LineMap:
        """The inverse of `to_json`."""
        origins: list[Origin] = []
        for first, last, place, rules in rows:
            file, _, line = str(place or "").rpartition(":")
            origin = Origin(file or None, int(line or 0), tuple(str(r) for r in rules))  # type: ignore[attr-defined]
            origins += [origin] * (int(last) - int(first) + 1)  # type: ignore[call-overload]
        return cls(tuple(origins))


class Finished(Struct, frozen=True):
    """A generated file as it is written, its line map, and Python's tree of it (None if another process printed it)."""

    text: str
    lines: LineMap
    tree: ast.Module | None


def finish(marked: Mapping[str, str], templates: Mapping[str, str] | None = None) -> dict[str, Finished]:
    """Strip, format and map many files at once (one run of ruff).

    `marked` maps file names to text with marks; `templates` names the template each file was printed from (default: the
    file's own name). Raises PorterError: PORT601 if a text does not parse, PORT605 if ruff fails, PORT606 if the
    statements of the formatted text are others.
    """
    stripped = {name: strip(text) for name, text in marked.items()}
    with _formatting(stripped) as formatted:  # ruff runs beside the parser
        trees = {name: _parse(name, text) for name, text in marked.items()}
        texts = formatted()
    finished: dict[str, Finished] = {}
    for name, text in texts.items():
        tree = ast.parse(text)
        lines = _line_map(name, marked[name], trees[name], text, tree, (templates or {}).get(name, name))
        finished[name] = Finished(text, lines, tree)
    return finished


def _parse(name: str, text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
        mark = read(line)
        touched = f"; last touched by {', '.join(mark.rules)}" if mark and mark.rules else ""
        origin = f" (from {mark.file}:{mark.line}{touched})" if mark else ""
        message = f"{name} does not parse: {error.msg}: `{strip(line).strip()}`{origin}"
        raise PorterError(Diagnostic("PORT601", message, Span(name, error.lineno or 1))) from None


def format_files(files: Mapping[str, str]) -> dict[str, str]:
    """The texts as ruff formats them, whatever configuration is around. Raises PorterError (PORT605)."""
    with _formatting(files) as formatted:
        return formatted()


@contextmanager
def _formatting(files: Mapping[str, str]) -> Iterator[Callable[[], dict[str, str]]]:
    """Starts ruff; the function waits for it and gives the texts. Raises PorterError (PORT605), and so does the function."""
    if not files:  # without a file ruff formats the working folder
        yield dict
        return
    with tempfile.TemporaryDirectory(prefix="porter-") as folder:
        paths = {name: Path(folder, f"{number}.py") for number, name in enumerate(files)}
        for name, path in paths.items():
            path.write_text(files[name], encoding="utf-8")
        options = [
            "--isolated",
            "--no-cache",
            "--quiet",
            "--line-length",
            str(LINE_LENGTH),
            "--target-version",
            "py311",
        ]
        command = [ruff(), "format", *options, *map(str, paths.values())]
        try:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise PorterError(Diagnostic("PORT605", f"ruff can't be run: {error}")) from None

        def formatted() -> dict[str, str]:
            detail = process.communicate()[1]
            if process.returncode:
                for name, path in paths.items():
                    detail = detail.replace(str(path), name)
                raise PorterError(Diagnostic("PORT605", f"ruff could not format: {detail.strip()}"))
            return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}

        with process:  # ends only when ruff has: its files are about to go
            yield formatted


def ruff() -> str:
    """Path of ruff: beside this Python if it is there, else by name."""
    beside = Path(sys.executable).with_name("ruff")
    return str(beside) if beside.exists() else "ruff"


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, ast.stmt | None]]:
    """(statement, enclosing statement) of a tree in preorder."""

    def below(node: ast.AST, parent: ast.stmt | None) -> Iterator[tuple[ast.stmt, ast.stmt | None]]:
        for block in _BLOCKS:
            for child in getattr(node, block, ()) or ():
                if isinstance(child, ast.stmt):
                    yield child, parent
                    yield from below(child, child)
                elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                    yield from below(child, parent)

    yield from below(tree, None)


def first_line(node: ast.stmt) -> int:
    """Line where a statement starts, decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _header(node: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement without its blocks."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
        return first_line(node), max(node.lineno, first_line(body[0]) - 1)
    return first_line(node), node.end_lineno or node.lineno


def marks(text: str, tree: ast.Module) -> list[Mark | None]:
    """The mark of each statement in preorder; a statement without one stands for the statement around it."""
    lines = text.splitlines()
    own: dict[int, Mark | None] = {}
    result: list[Mark | None] = []
    for node, parent in statements(tree):
        start, end = _header(node)
        if isinstance(getattr(node, "body", None), list):
            found = next((m for n in range(start, end + 1) if (m := read(lines[n - 1])) is not None), None)
        else:
            found = read(lines[end - 1])
        own[id(node)] = found or (own[id(parent)] if parent is not None else None)
        result.append(own[id(node)])
    return result


def _line_map(
    name: str, marked: str, tree: ast.Module, formatted: str, formatted_tree: ast.Module, template: str
) -> LineMap:
    old = marks(marked, tree)
    new = list(statements(formatted_tree))
    kinds = [type(n) for n, _ in statements(tree)]
    if kinds != [type(n) for n, _ in new]:
        raise PorterError(Diagnostic("PORT606", f"{name}: formatting changed the statements", Span(name, 1)))
    count = len(formatted.splitlines())
    nothing = Origin(None, 0, (f"template:{template}",))
    origins: list[Origin | None] = [None] * count
    for (node, _), mark in zip(new, old):
        start, end = _header(node)
        origin = Origin(mark.file, mark.line, mark.rules) if mark else nothing
        if mark and mark.file == TEMPLATE_FILE:  # a rule changed what a template printed
            origin = Origin(None, 0, (*nothing.rules, *mark.rules))
        for line in range(start, end + 1):
            origins[line - 1] = origin
    # comments, blank lines and `else:` belong to what follows; at the end of the file to what is above
    following: Origin = next((o for o in reversed(origins) if o is not None), nothing)
    for position in range(count - 1, -1, -1):
        following = origins[position] or following
        origins[position] = following
    return LineMap(tuple(o or nothing for o in origins))
