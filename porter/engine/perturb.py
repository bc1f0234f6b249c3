"""Ways to write the same code differently. A rule that gives another result for them matches spelling, not meaning."""

from __future__ import annotations

import ast
from collections.abc import Callable
from collections.abc import Set as AbstractSet

Perturbation = Callable[[str, AbstractSet[str]], str]


def reflowed(text: str, _: AbstractSet[str] = frozenset()) -> str:
    """Other layout, other quotes, no comments."""
    return ast.unparse(ast.parse(text)) + "\n"


def commented(text: str, _: AbstractSet[str] = frozenset()) -> str:
    """A comment above every statement."""
    lines = text.splitlines()
    starts = {n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt)}
    starts |= {d.lineno for n in ast.walk(ast.parse(text)) for d in getattr(n, "decorator_list", [])}
    result = []
    for number, line in enumerate(lines, 1):
        bare = line.lstrip()
        if number in starts and not bare.startswith("elif"):
            result.append(f"{line[: len(line) - len(bare)]}# a remark")
        result.append(line)
    return "\n".join(result) + "\n"


def permuted(text: str, _: AbstractSet[str] = frozenset()) -> str:
    """Keyword arguments in the opposite order."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and all(k.arg for k in node.keywords):
            node.keywords.reverse()
    return ast.unparse(tree) + "\n"


def renamed(text: str, fixed: AbstractSet[str]) -> str:
    """Local variables of functions under other names; parameters, attributes and `fixed` names stay."""
    tree = ast.parse(text)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            names = locals_of(function) - fixed
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id in names:
                    node.id += "_other"
    return ast.unparse(tree) + "\n"


def locals_of(function: ast.FunctionDef) -> set[str]:
    """Names a function assigns and does not take as parameters."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    taken = {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    return {n for n in stored - taken if n != "_" and not n.endswith("_other")}


def all_locals(text: str) -> set[str]:
    """Locals of every function of a text."""
    return {n for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef) for n in locals_of(f)}


PERTURBATIONS: dict[str, Perturbation] = {
    "layout": reflowed,
    "comments": commented,
    "keyword order": permuted,
    "local names": renamed,
}
