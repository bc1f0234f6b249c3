"""Templates to absolute trees: Jinja prints the shell, statements from the source are spliced in as trees.

Source statements never pass through text indentation, so multi-line strings in them stay what they are. A line
`__name__` in a template is a slot for statements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jinja2
import libcst as cst

from porter.resources import TEMPLATES, table
from porter.source.names import absolute, dotted
from porter.source.tree import find, replace_nodes


@lru_cache(maxsize=4)
def _environment(root: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(root),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


@lru_cache(maxsize=4)
def _symbols(root: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    symbols = table(root / "pipeline" / "symbols.yaml", "modules", "names")
    return frozenset(symbols["modules"]), symbols["names"]


def render_text(template: str, root: Path = TEMPLATES, **values: Any) -> str:
    """A template as text."""
    return _environment(root).get_template(template).render(**values)


def render(
    template: str, slots: Mapping[str, Sequence[cst.CSTNode]], root: Path = TEMPLATES, **values: Any
) -> list[cst.BaseStatement]:
    """The statements of a rendered template, absolute, with the slots filled."""
    text = render_text(template, root, **values)
    module = _absolutise(cst.parse_module(text), root)
    edits: list[tuple[cst.CSTNode, object]] = []
    for line in find(module, cst.SimpleStatementLine):
        name = _slot(line)
        if name is not None:
            nodes = list(slots[name])
            edits.append((line, cst.FlattenSentinel(nodes) if nodes else cst.RemoveFromParent()))
    return [s for s in replace_nodes(module, edits).body if isinstance(s, cst.BaseStatement)]


def _absolutise(module: cst.Module, root: Path) -> cst.Module:
    """Names of the template's symbol table as absolute names; template locals never share their spelling."""
    modules, names = _symbols(root)
    edits: list[tuple[cst.CSTNode, object]] = []
    stack: list[cst.CSTNode] = [module]
    keywords = {id(a.keyword) for a in find(module, cst.Arg) if a.keyword is not None}
    for node in _references(stack, keywords):
        path = dotted(node) if isinstance(node, (cst.Name, cst.Attribute)) else None
        if path is None:
            continue
        first, *rest = path.split(".")
        if first in names and not rest:
            edits.append((node, cst.Name(absolute(names[first]))))
        elif first in names and first == "nn":
            edits.append((node, cst.Name(absolute(".".join([names[first], *rest])))))
        elif first in ("np", *modules) and rest:
            module_name = "numpy" if first == "np" else first
            head = cst.Name(absolute(f"{module_name}.{rest[0]}"))
            value: cst.BaseExpression = head
            for part in rest[1:]:
                value = cst.Attribute(value, cst.Name(part))
            edits.append((node, value))
    return replace_nodes(module, edits)


def _references(stack: list[cst.CSTNode], keywords: set[int]):  # noqa: ANN202 - iterator of names and chains
    from porter.source.tree import children

    while stack:
        node = stack.pop()
        kind = type(node)  # LibCST's classes are slow to ask with `isinstance`
        if id(node) in keywords or kind is cst.Param:
            if isinstance(node, cst.Param):
                stack += [n for n in (node.annotation, node.default) if n is not None]
            continue
        if kind is cst.Attribute:
            node = cast(cst.Attribute, node)
            path = dotted(node)
            if path is not None and path.split(".")[0] != "self":
                yield node
                if not _is_module_path(path):
                    stack.append(node.value)
                continue
            stack.append(node.value)
            continue
        if kind is cst.Name:
            yield node
            continue
        stack += children(node)


def _is_module_path(path: str) -> bool:
    modules, _ = _symbols(TEMPLATES)
    return path.split(".")[0] in modules | {"np", "nn"}


def _slot(line: cst.SimpleStatementLine) -> str | None:
    """The name of the slot that a line `__name__` of a template is."""
    only = line.body[0]
    if not isinstance(only, cst.Expr) or not isinstance(only.value, cst.Name):
        return None
    name = only.value.value
    return name.strip("_") if name.startswith("__") and name.endswith("__") else None
