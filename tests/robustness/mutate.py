"""Small changes to a source file, as people and time make them. Deterministic: same text, same generator, same result.

Each kind finds its place in Python's own tree and changes the text there, so that the rest of the file stays as it is.
A kind returns None where the file has no place for it.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Place = tuple[int, int]
"""First and last character of a piece of text, the last one excluded."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed text; `line` is where it was changed. `same` says that the change has no meaning."""

    kind: str
    text: str
    line: int
    same: bool = False


class Source:
    """A text with its tree and the places of its nodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.lines = text.splitlines(keepends=True)
        self.scopes = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]

    def place(self, node: ast.AST) -> Place:
        """Where a node stands; offsets of `ast` count bytes."""
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def of(self, node: ast.AST) -> str:
        first, last = self.place(node)
        return self.text[first:last]

    def statements(self) -> Iterator[tuple[list[ast.stmt], int]]:
        """Every statement inside a function or class, as the block that holds it and its place in the block."""
        for node in ast.walk(self.tree):
            for block in ("body", "orelse", "finalbody"):
                body = getattr(node, block, None)
                if isinstance(body, list) and not isinstance(node, ast.Module):
                    yield from ((body, i) for i in range(len(body)) if not _is_docstring(body[i]))

    def whole_lines(self, node: ast.stmt) -> Place:
        """Lines of a statement, decorators included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return self._starts[first - 1], self._starts[node.end_lineno or first]

    def with_text(self, place: Place, new: str) -> str:
        return self.text[: place[0]] + new + self.text[place[1] :]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _indent(source: Source, node: ast.stmt) -> str:
    return " " * (len(source.lines[node.lineno - 1]) - len(source.lines[node.lineno - 1].lstrip()))


Kind = Callable[[Source, random.Random], "Mutant | None"]


# ------------------------------------------------------------------------------------------------ statements
def delete_statement(source: Source, rng: random.Random) -> Mutant | None:
    found = list(source.statements())
    if not found:
        return None
    body, index = rng.choice(found)
    node = body[index]
    new = f"{_indent(source, node)}pass\n" if len(body) == 1 else ""
    return Mutant("delete statement", source.with_text(source.whole_lines(node), new), node.lineno)


def duplicate_statement(source: Source, rng: random.Random) -> Mutant | None:
    found = [(b, i) for b, i in source.statements() if isinstance(b[i], (ast.Assign, ast.AugAssign, ast.Expr, ast.If))]
    if not found:
        return None
    body, index = rng.choice(found)
    place = source.whole_lines(body[index])
    text = source.text[place[0] : place[1]]
    return Mutant("duplicate statement", source.with_text(place, text + text), body[index].lineno)


def swap_statements(source: Source, rng: random.Random) -> Mutant | None:
    found = [(b, i) for b, i in source.statements() if i + 1 < len(b)]
    if not found:
        return None
    body, index = rng.choice(found)
    one, two = source.whole_lines(body[index]), source.whole_lines(body[index + 1])
    between = source.text[one[1] : two[0]]
    text = source.text[two[0] : two[1]] + between + source.text[one[0] : one[1]]
    return Mutant("swap statements", source.with_text((one[0], two[1]), text), body[index].lineno)


# ------------------------------------------------------------------------------------------------ names
def rename_local(source: Source, rng: random.Random) -> Mutant | None:
    """A local variable gets another name, everywhere in its function."""
    scopes = [(f, sorted(_locals(f))) for f in source.scopes]
    scopes = [(f, names) for f, names in scopes if names]
    if not scopes:
        return None
    function, names = rng.choice(scopes)
    old = rng.choice(names)
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == old]
    text = source.text
    for place in sorted((source.place(n) for n in nodes), reverse=True):
        text = text[: place[0]] + f"{old}_renamed" + text[place[1] :]
    return Mutant("rename local", text, function.lineno, same=True)


def _locals(function: ast.FunctionDef) -> set[str]:
    """Names that are only ever variables of this one function."""
    inner = [
        n
        for n in ast.walk(function)
        if isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)) and n is not function
    ]
    if inner:
        return set()
    arguments = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    declared = {name for n in ast.walk(function) if isinstance(n, (ast.Global, ast.Nonlocal)) for name in n.names}
    return stored - arguments - declared


def rename_attribute(source: Source, rng: random.Random) -> Mutant | None:
    """An attribute of self gets another name, everywhere in its class."""
    found = []
    for cls in (n for n in ast.walk(source.tree) if isinstance(n, ast.ClassDef)):
        own = {n.attr for n in ast.walk(cls) if _on_self(n) and isinstance(n.ctx, ast.Store)}  # type: ignore[attr-defined]
        found += [(cls, name) for name in sorted(own)]
    if not found:
        return None
    cls, old = rng.choice(found)
    ends = [source.place(n)[1] for n in ast.walk(cls) if _on_self(n) and n.attr == old]  # type: ignore[attr-defined]
    text = source.text
    for end in sorted(ends, reverse=True):
        text = text[: end - len(old)] + f"{old}_renamed" + text[end:]
    return Mutant("rename attribute", text, cls.lineno)


def _on_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def rename_once(source: Source, rng: random.Random) -> Mutant | None:
    """One use of a name is misspelt."""
    names = [n for f in source.scopes for n in ast.walk(f) if isinstance(n, (ast.Name, ast.Attribute))]
    if not names:
        return None
    node = rng.choice(names)
    end = source.place(node)[1]
    return Mutant("misspell a name", source.with_text((end, end), "_x"), node.lineno)


# ------------------------------------------------------------------------------------------------ calls
def _calls(source: Source) -> list[ast.Call]:
    return [n for f in source.scopes for n in ast.walk(f) if isinstance(n, ast.Call)]


def reorder_keywords(source: Source, rng: random.Random) -> Mutant | None:
    calls = [c for c in _calls(source) if len(c.keywords) > 1 and all(k.arg for k in c.keywords)]
    calls = [c for c in calls if not c.args or source.place(c.args[-1])[1] < source.place(c.keywords[0])[0]]
    if not calls:
        return None
    call = rng.choice(calls)
    words = [source.of(k) for k in call.keywords]
    order = words[1:] + words[:1]
    text = source.text
    for keyword, new in sorted(zip(call.keywords, order, strict=True), key=lambda p: -source.place(p[0])[0]):
        first, last = source.place(keyword)
        text = text[:first] + new + text[last:]
    return Mutant("reorder keywords", text, call.lineno, same=True)


def drop_argument(source: Source, rng: random.Random) -> Mutant | None:
    calls = [c for c in _calls(source) if c.keywords or c.args]
    if not calls:
        return None
    call = rng.choice(calls)
    parts = [*call.args, *call.keywords]
    index = rng.randrange(len(parts))
    kept = [source.of(p) for i, p in enumerate(parts) if i != index]
    text = f"{source.of(call.func)}({', '.join(kept)})"
    return Mutant("drop argument", source.with_text(source.place(call), text), call.lineno)


def swap_arguments(source: Source, rng: random.Random) -> Mutant | None:
    calls = [c for c in _calls(source) if len(c.args) > 1]
    if not calls:
        return None
    call = rng.choice(calls)
    index = rng.randrange(len(call.args) - 1)
    one, two = source.place(call.args[index]), source.place(call.args[index + 1])
    between = source.text[one[1] : two[0]]
    text = source.text[two[0] : two[1]] + between + source.text[one[0] : one[1]]
    return Mutant("swap arguments", source.with_text((one[0], two[1]), text), call.lineno)


# ------------------------------------------------------------------------------------------------ expressions
def change_number(source: Source, rng: random.Random) -> Mutant | None:
    numbers = [
        n for f in source.scopes for n in ast.walk(f)
        if isinstance(n, ast.Constant) and isinstance(n.value, (int, float)) and not isinstance(n.value, bool)
    ]  # fmt: skip
    if not numbers:
        return None
    node = rng.choice(numbers)
    new = {0: "1", 1: "2"}.get(node.value, f"({node.value!r} + 1)")  # type: ignore[arg-type]
    return Mutant("change number", source.with_text(source.place(node), new), node.lineno)


def negate_condition(source: Source, rng: random.Random) -> Mutant | None:
    tests = [n.test for f in source.scopes for n in ast.walk(f) if isinstance(n, (ast.If, ast.IfExp))]
    if not tests:
        return None
    node = rng.choice(tests)
    return Mutant("negate condition", source.with_text(source.place(node), f"not ({source.of(node)})"), node.lineno)


def swap_operands(source: Source, rng: random.Random) -> Mutant | None:
    found = [n for f in source.scopes for n in ast.walk(f) if isinstance(n, ast.BinOp)]
    if not found:
        return None
    node = rng.choice(found)
    one, two = source.place(node.left), source.place(node.right)
    between = source.text[one[1] : two[0]]
    text = source.text[two[0] : two[1]] + between + source.text[one[0] : one[1]]
    return Mutant("swap operands", source.with_text((one[0], two[1]), text), node.lineno)


def nothing_instead(source: Source, rng: random.Random) -> Mutant | None:
    """An assigned value becomes None."""
    found = [n for f in source.scopes for n in ast.walk(f) if isinstance(n, ast.Assign)]
    if not found:
        return None
    node = rng.choice(found)
    return Mutant("None instead", source.with_text(source.place(node.value), "None"), node.lineno)


# ------------------------------------------------------------------------------------------------ layout
def reprint(source: Source, rng: random.Random) -> Mutant | None:
    """A class or function as Python prints it: other quotes, no comments, long lines."""
    found = [n for n in source.tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    if not found:
        return None
    node = rng.choice(found)
    return Mutant(
        "reprint", source.with_text(source.whole_lines(node), ast.unparse(node) + "\n"), node.lineno, same=True
    )


def add_comments(source: Source, rng: random.Random) -> Mutant | None:
    found = [b[i] for b, i in source.statements()]
    if not found:
        return None
    text, lines = source.text, []
    for node in sorted(rng.sample(found, min(5, len(found))), key=lambda n: -source.whole_lines(n)[0]):
        first = source.whole_lines(node)[0]
        text = text[:first] + f"{_indent(source, node)}# a remark {{with}} $signs\n\n" + text[first:]
        lines.append(node.lineno)
    return Mutant("add comments", text, min(lines), same=True)


def parenthesise(source: Source, rng: random.Random) -> Mutant | None:
    found = [n.value for f in source.scopes for n in ast.walk(f) if isinstance(n, ast.Assign)]
    found = [n for n in found if isinstance(n, (ast.Call, ast.BinOp, ast.Attribute))]
    if not found:
        return None
    node = rng.choice(found)
    return Mutant(
        "parenthesise", source.with_text(source.place(node), f"(\n{source.of(node)}\n)"), node.lineno, same=True
    )


# ------------------------------------------------------------------------------------------------ damage
def delete_line(source: Source, rng: random.Random) -> Mutant | None:
    index = rng.randrange(len(source.lines))
    return Mutant("delete line", "".join(source.lines[:index] + source.lines[index + 1 :]), index + 1)


def delete_characters(source: Source, rng: random.Random) -> Mutant | None:
    first = rng.randrange(len(source.text))
    last = min(len(source.text), first + rng.randint(1, 12))
    return Mutant("delete characters", source.with_text((first, last), ""), source.text.count("\n", 0, first) + 1)


def insert_characters(source: Source, rng: random.Random) -> Mutant | None:
    place = rng.randrange(len(source.text))
    junk = "".join(rng.choice("()[]{}:,.=\n \"'#\\*ax0") for _ in range(rng.randint(1, 4)))
    return Mutant("insert characters", source.with_text((place, place), junk), source.text.count("\n", 0, place) + 1)


def cut_short(source: Source, rng: random.Random) -> Mutant | None:
    at = rng.randrange(len(source.text) // 2, len(source.text))
    return Mutant("cut short", source.text[:at], source.text.count("\n", 0, at) + 1)


KINDS: tuple[Kind, ...] = (
    delete_statement, duplicate_statement, swap_statements, rename_local, rename_attribute, rename_once,
    reorder_keywords, drop_argument, swap_arguments, change_number, negate_condition, swap_operands, nothing_instead,
    reprint, add_comments, parenthesise, delete_line, delete_characters, insert_characters, cut_short,
)  # fmt: skip


def mutant_of(text: str, seed: int) -> Mutant:
    """The mutant of a text that belongs to a number. Kinds take turns, so that each occurs equally often."""
    rng = random.Random(seed)
    source = Source(text)
    for offset in range(len(KINDS)):
        made = KINDS[(seed + offset) % len(KINDS)](source, rng)
        if made is not None and made.text != text:
            return made
    raise ValueError("nothing in this text can be changed")


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
