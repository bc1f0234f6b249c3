"""What the installed engine and Diffusers define, read from their source text: nothing is imported."""

from __future__ import annotations

import ast
import enum
import importlib.util
from functools import cache
from pathlib import Path


class Missing(enum.Enum):
    """What part of an import does not exist."""

    NOTHING = ""
    DISTRIBUTION = "{module} cannot be checked: its distribution is not installed"
    MODULE = "module {module} does not exist"
    NAME = "{module} defines no {name}"

    def text(self, module: str, name: str | None) -> str:
        return self.value.format(module=module, name=name)


class Api:
    """Resolves `from module import name` by reading files. `roots` overrides where a top-level package lies."""

    def __init__(self, roots: dict[str, Path] | None = None) -> None:
        self._roots = roots or {}

    def missing(self, module: str, name: str | None) -> Missing:
        """What does not exist in `import module` (name None) or `from module import name`."""
        root = self._root(module.split(".")[0])
        if root is None:
            return Missing.DISTRIBUTION
        file = _file_of(root, module.split(".")[1:])
        if file is None:
            return Missing.MODULE
        if name is None or name == "*" or name in self.names_in(file):
            return Missing.NOTHING
        if _file_of(root, [*module.split(".")[1:], name]) is not None:
            return Missing.NOTHING
        return Missing.NAME

    def names_in(self, file: Path) -> frozenset[str]:
        """Names that a module's text binds at top level (also under if and try), or lists for lazy import."""
        return _names_in(file)

    def _root(self, package: str) -> Path | None:
        if package not in self._roots:
            spec = importlib.util.find_spec(package)
            places = list(spec.submodule_search_locations or ()) if spec else []
            if not places:
                return None
            self._roots[package] = Path(places[0])
        return self._roots[package]


def _file_of(root: Path, parts: list[str]) -> Path | None:
    path = root.joinpath(*parts)
    if parts and path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    init = path / "__init__.py"
    if init.is_file():
        return init
    return path if path.is_dir() else None


@cache
def _names_in(file: Path) -> frozenset[str]:
    if file.is_dir():
        return frozenset()
    names: set[str] = set()
    tree = ast.parse(file.read_text(), str(file))
    _collect(tree.body, names, file)
    if any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body):
        names |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(names)


def _collect(body: list[ast.stmt], names: set[str], file: Path) -> None:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            case ast.Import():
                names |= {a.asname or a.name.split(".")[0] for a in node.names}
            case ast.ImportFrom():
                names |= {a.asname or a.name for a in node.names if a.name != "*"}
                if any(a.name == "*" for a in node.names) and node.level == 1 and node.module:
                    target = _file_of(file.parent, node.module.split("."))
                    names |= _names_in(target) if target else frozenset()
            case ast.If():
                _collect(node.body, names, file)
                _collect(node.orelse, names, file)
            case ast.Try():
                for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)):
                    _collect(part, names, file)
            case ast.With() | ast.For() | ast.While():
                _collect(node.body, names, file)
