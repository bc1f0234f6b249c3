"""Top-level structure of a Python file without parsing it whole.

Following a re-export needs only to know what a file defines and imports; porting one class needs the text of that class.
A full parse of the large shared modules costs more than everything else, so the file is cut into top-level chunks at
lines that start in the first column. Strings in such a line position would break the cut; the caller parses what it
uses and falls back to a whole parse if a chunk does not parse.
"""

from __future__ import annotations

import ast
import re

from msgspec import Struct

_DEFINES = re.compile(r"(?:async\s+def|def|class)\s+(\w+)|(\w+)\s*(?::[^=]+)?=(?!=)")
_HEADER_LINES = 40
_INSIDE = " \t\n\r)]}"
"""What a line begins with that belongs to the statement above."""
_BLOCK = re.compile(r"(?:if|else|elif|try|except|finally|for|with)\b")


class Chunk(Struct, frozen=True):
    """Lines `first`..`last` (from 1): one top-level statement with its decorators and the comments above it."""

    first: int
    last: int
    start: int


def chunks(lines: list[str]) -> list[Chunk]:
    """Top-level statements in order. `start` is the first line that is not a comment or decorator."""
    found: list[Chunk] = []
    begin: int | None = None
    start = 0
    depth_text = False
    quote = ""
    # Lines inside a statement say nothing unless they open or close a text: most are passed over at once.
    telling = [n for n, line in enumerate(lines, 1) if line[0] not in _INSIDE or '"""' in line or "'''" in line]
    before = 0
    for number in telling:
        line = lines[number - 1]
        if depth_text:
            depth_text = quote not in line
            before = number
            continue
        top = line[0] not in _INSIDE
        if begin is not None and not start and "\n" in lines[before : number - 1]:
            begin = None  # a comment that stands alone
        before = number
        if top and line[0] == "#":
            if begin is None or start:
                if start:
                    found.append(Chunk(begin or number, _trimmed(lines, number - 1), start))
                begin, start = number, 0
        elif top and line[0] == "@":
            if start or begin is None:
                if start:
                    found.append(Chunk(begin or number, _trimmed(lines, number - 1), start))
                begin, start = number, 0
        elif top:
            if start and not _continues(line):
                found.append(Chunk(begin or start, _trimmed(lines, number - 1), start))
                begin = None
            if begin is None:
                begin = number
            if not (start and _continues(line)):
                start = number
        opened = _opens_text(line)
        if opened:
            depth_text, quote = True, opened
    if start:
        found.append(Chunk(begin or start, _trimmed(lines, len(lines)), start))
    return found


def _continues(line: str) -> bool:
    return line.startswith(("else", "elif ", "except", "finally"))


def _trimmed(lines: list[str], last: int) -> int:
    while last > 0 and not lines[last - 1].strip():
        last -= 1
    return last


def _opens_text(line: str) -> str:
    """The quotes of a triple-quoted string that a line opens and does not close."""
    for quote in ('"""', "'''"):
        if line.count(quote) % 2 and ("#" not in line.split(quote)[0]):
            return quote
    return ""


def defined(line: str) -> str | None:
    """Name that a top-level line defines."""
    found = _DEFINES.match(line)
    return (found[1] or found[2]) if found else None


def kind(line: str) -> str:
    """Class of Python's tree that a top-level line which defines a name begins."""
    if line.startswith("class "):
        return "ClassDef"
    return "FunctionDef" if line.startswith(("def ", "async ")) else "Assign"


def statements(lines: list[str], chunk: Chunk) -> list[ast.stmt]:
    """Statements of a chunk, with line numbers of the file. Raises SyntaxError."""
    above = "\n" * (chunk.first - 1)  # cheaper than counting up the numbers of all nodes
    return ast.parse(above + "".join(lines[chunk.first - 1 : chunk.last])).body


_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<dots>\.*)(?P<module>[\w.]*)[ \t]+import[ \t]*(?:\((?P<listed>[^)]*)\)|(?P<names>[^(\n\\;]+)$)"
    r"|import[ \t]+(?P<modules>[^\n\\;]+)$)",
    re.MULTILINE,
)
_COMMENT = re.compile(r"#[^\n]*")
# Not a keyword argument, which stands in a line with a comma.
_OTHER = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?(?:def|class)[ \t]|@|\w+[ \t]*(?::[^\n]*)?=(?![^\n]*,$))|\"\"\"|'''|[;\\]", re.MULTILINE
)


def only_imports(text: str) -> list[ast.Import | ast.ImportFrom] | None:
    """The import statements of a text that defines nothing; None for a text that needs Python's parser.

    Files that re-export names are long lists of these. A name that is imported twice is chosen by a branch, so that the
    order of the lines does not tell which one counts.
    """
    bare = _COMMENT.sub("", text)
    if _OTHER.search(bare):
        return None
    found: list[ast.Import | ast.ImportFrom] = []
    for each in _IMPORT.finditer(bare):
        if each["modules"] is not None:
            found.append(ast.Import(_aliases(each["modules"])))
        else:
            names = each["listed"] if each["listed"] is not None else each["names"]
            found.append(ast.ImportFrom(each["module"] or None, _aliases(names), len(each["dots"])))
    bound = [a.asname or a.name for node in found for a in node.names if a.name != "*"]
    return found if len(set(bound)) == len(bound) else None


def _aliases(names: str) -> list[ast.alias]:
    words = [name.split() for name in names.split(",")]
    return [ast.alias(w[0], w[2] if len(w) == 3 else None) for w in words if w]


def header(lines: list[str], line: int) -> ast.stmt | None:
    """The class or function that starts on `line` (from 1), without its body; None if its header is not found."""
    text = ""
    for each in lines[line - 1 : line - 1 + _HEADER_LINES]:
        text += each
        if each.rstrip().endswith(":"):
            try:
                return ast.parse(text + " ...").body[0]
            except SyntaxError:
                continue
    return None


def method(lines: list[str], owner: Chunk, name: str) -> ast.stmt | None:
    """A method of a class (the first of that name) without its decorators; None if there is none.

    Raises SyntaxError if the lines below its first one are not cut where it ends.
    """
    first = re.compile(rf"    (?:async\s+)?def\s+{re.escape(name)}\b")
    begin = next((n for n in range(owner.start, owner.last) if first.match(lines[n])), None)
    if begin is None:
        return None
    inner = ("     ", "    )", "    #", "#", "\n")  # a header of several lines ends in the column where it began
    end = next((n for n in range(begin + 1, owner.last) if not lines[n].startswith(inner)), owner.last)
    (body,) = ast.parse("class _:\n" + "".join(lines[begin:end])).body
    assert isinstance(body, ast.ClassDef)
    return body.body[0]


def is_block(line: str) -> bool:
    """Whether a top-level line opens a block that may define or import names (`if`, `try`)."""
    return bool(_BLOCK.match(line))


def is_import(line: str) -> bool:
    return line.startswith(("import ", "from "))
