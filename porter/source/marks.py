"""Line marks: each statement of a loaded tree carries the source line it came from, and later the rules that changed it.

A mark is a trailing comment, because comments are what survives LibCST transformations. `porter.emit.linemap` takes
the marks out again and turns them into the line map of `port.json`; no mark reaches a file.
"""

from __future__ import annotations

import re

import libcst as cst
from msgspec import Struct

SIGN = "\u00a7"
_MARK = re.compile(rf"[ \t]*#{SIGN}(?P<file>[^:{SIGN}\n]*):(?P<line>\d+);(?P<rules>[^{SIGN}\n]*){SIGN}")


class Mark(Struct, frozen=True):
    """Origin of one statement."""

    file: str
    line: int
    rules: tuple[str, ...] = ()

    def text(self) -> str:
        return f"#{SIGN}{self.file}:{self.line};{','.join(self.rules)}{SIGN}"


def read(text: str) -> Mark | None:
    """The mark in a line of code or a comment."""
    found = _MARK.search(text)
    if found is None:
        return None
    rules = tuple(r for r in found["rules"].split(",") if r)
    return Mark(found["file"], int(found["line"]), rules)


def strip(text: str) -> str:
    """Text without its marks; the author's own trailing comments stay."""
    return _MARK.sub("", text)


def _trailing(node: cst.BaseStatement) -> cst.TrailingWhitespace | None:
    if isinstance(node, cst.SimpleStatementLine):
        return node.trailing_whitespace
    suite = getattr(node, "body", None)
    return suite.header if isinstance(suite, cst.IndentedBlock) else None


def mark_of(node: cst.BaseStatement) -> Mark | None:
    """The mark a statement carries."""
    space = _trailing(node)
    return read(space.comment.value) if space is not None and space.comment is not None else None


def with_mark(node, mark: Mark):  # noqa: ANN001, ANN201 - any statement class, same class out
    """The statement with this mark, in place of one it had."""
    space = _trailing(node)
    if space is None:
        return node
    kept = strip(space.comment.value).rstrip() if space.comment else ""
    joined = f"{kept}  {mark.text()}" if kept else mark.text()
    new = space.with_changes(whitespace=cst.SimpleWhitespace("  "), comment=cst.Comment(joined))
    if isinstance(node, cst.SimpleStatementLine):
        return node.with_changes(trailing_whitespace=new)
    return node.with_changes(body=node.body.with_changes(header=new))


def inherit(new, origin: cst.BaseStatement | Mark | None, rule: str):  # noqa: ANN001, ANN201
    """Mark a statement a rule wrote: it stands for the place of `origin`."""
    mark = origin if isinstance(origin, Mark) or origin is None else mark_of(origin)
    if mark is None:
        return new
    rules = mark.rules if rule in mark.rules else (*mark.rules, rule)
    return with_mark(new, Mark(mark.file, mark.line, rules))
