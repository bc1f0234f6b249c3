"""The pinned Diffusers source as a library of definitions, read as text and never imported.

A file is indexed with Python's own parser (fast, whole file); only the definitions a port needs are parsed with
LibCST, rewritten to absolute names and marked with their lines.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from msgspec import Struct

from porter.model import Definition, Diagnostic, PorterError, Span, Unknown
from porter.pins import DIFFUSERS
from porter.source import outline
from porter.source.absolutise import Resolver, absolutise
from porter.source.names import DOT, ESCAPED_DOT

PACKAGE = "diffusers"
_VERSION = re.compile(r"""^__version__ *= *(["'])(?P<version>[^"']+)\1""", re.MULTILINE)


class TopLevel(Struct, frozen=True):
    """One top-level class, function or assignment of a file; lines count from 1, decorators and comments included."""

    name: str
    kind: str
    first_line: int
    line: int
    last_line: int


class ModuleSource:
    """One source file: text, what it defines and what it imports."""

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name = name
        self.path = path
        self.file = path.relative_to(root).as_posix()
        self.is_package = path.name == "__init__.py"
        self.text = _text(path, self.file).replace(DOT, ESCAPED_DOT)
        self._nodes: dict[str, ast.stmt | None] = {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, as recorded in `port.json`."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines(keepends=True)

    @cached_property
    def _chunks(self) -> list[outline.Chunk]:
        return outline.chunks(self.lines)

    @cached_property
    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self.text)
        except SyntaxError as error:
            raise PorterError(
                Diagnostic("PORT101", f"the source does not parse: {error.msg}", Span(self.file, error.lineno or 1))
            ) from None

    @cached_property
    def blocks(self) -> list[ast.stmt]:
        """Import statements and module-level blocks; of a package's block that does nothing but import, its imports."""
        found: list[ast.stmt] = []
        for chunk in self._chunks:
            line = self.lines[chunk.start - 1]
            if not outline.is_import(line) and not outline.is_block(line):
                continue
            whole = self.is_package or outline.is_import(line)  # elsewhere it matters under which condition one imports
            quick = outline.only_imports("".join(self.lines[chunk.start - 1 : chunk.last])) if whole else None
            try:
                found += quick if quick is not None else outline.statements(self.lines, chunk)
            except SyntaxError:
                return [n for n in self._tree.body if not isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        return found

    @cached_property
    def definitions(self) -> dict[str, TopLevel]:
        """Top-level names; definitions inside module-level `if`/`try` count, the first one wins.

        A definition that only stands in for an import which may fail does not count: the import is what is meant.
        """
        found: dict[str, TopLevel] = {}
        for chunk in self._chunks:
            line = self.lines[chunk.start - 1]
            name = outline.defined(line)
            if name is not None and not outline.is_import(line) and not outline.is_block(line):
                found.setdefault(name, TopLevel(name, outline.kind(line), chunk.first, chunk.start, chunk.last))
        stand_ins = {id(n) for block in self.blocks for n in _stand_ins(block)}
        for node in _module_level(self.blocks):
            if id(node) in stand_ins:
                continue
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)):
                for name in _names(node):
                    found.setdefault(name, _top_level(name, node))
        return found

    def node(self, name: str) -> ast.stmt | None:
        """Python's own tree of one top-level definition."""
        if name not in self._nodes:
            self._nodes[name] = self._parsed(name)
        return self._nodes[name]

    def method(self, owner: str, name: str) -> ast.stmt | None:
        """Python's own tree of a method of a top-level class; of a large class only the method is parsed."""
        entry = self.definitions.get(owner)
        if entry is None or entry.kind != "ClassDef":
            return None
        if owner not in self._nodes:
            try:
                return outline.method(self.lines, outline.Chunk(entry.first_line, entry.last_line, entry.line), name)
            except (SyntaxError, ValueError):
                pass  # text in a column where code would end it
        body = getattr(self.node(owner), "body", ())
        return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)

    def bases(self, name: str) -> list[ast.expr]:
        """Base expressions of a top-level class; of large classes only the header is parsed."""
        entry = self.definitions.get(name)
        if entry is None or entry.kind != "ClassDef":
            return []
        node = self._nodes.get(name) or outline.header(self.lines, entry.line) or self.node(name)
        return node.bases if isinstance(node, ast.ClassDef) else []

    def _parsed(self, name: str) -> ast.stmt | None:
        entry = self.definitions.get(name)
        if entry is None:
            return None
        chunk = outline.Chunk(entry.first_line, entry.last_line, entry.line)
        try:
            (node,) = outline.statements(self.lines, chunk)
        except (SyntaxError, ValueError):
            return self._in_whole_parse(name)
        return node

    def _in_whole_parse(self, name: str) -> ast.stmt | None:
        """A definition inside a block, or one whose lines the outline misjudged (code in the first column of a bracket):
        they are set right."""
        inside = next((n for n in _module_level(self.blocks) if name in _names(n)), None)
        found = inside or next((n for n in _module_level(self._tree.body) if name in _names(n)), None)
        if found is not None:
            self.definitions[name] = _top_level(name, found)
        return found

    @cached_property
    def imports(self) -> Mapping[str, str]:
        """Local name -> qualified name, for module-level imports (also under TYPE_CHECKING and availability guards)."""
        found: dict[str, str] = {}
        for node in _module_level(self.blocks):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                base = self.base(node)
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name, f"{base}.{alias.name}" if base else alias.name)
        return found

    def base(self, node: ast.ImportFrom) -> str:
        """Absolute module name of a `from ... import`."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*parts, *([node.module] if node.module else [])])


def _text(path: Path, file: str) -> str:
    """Text of a source file. Raises PorterError (PORT101) if it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PorterError(Diagnostic("PORT101", "the source is not UTF-8", Span(file, line))) from None
    except OSError as error:
        raise PorterError(Diagnostic("PORT101", f"can't read {path}: {error.strerror}", Span(file, 1))) from None


def _top_level(name: str, node: ast.stmt) -> TopLevel:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return TopLevel(name, type(node).__name__, first, node.lineno, node.end_lineno or first)


def _names(node: ast.stmt) -> list[str]:
    """Names a statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [t.id for t in targets if isinstance(t, ast.Name)]
    return []


def _stand_ins(block: ast.stmt) -> list[ast.stmt]:
    """Classes and functions of an `else` or `except` whose name the guarded block imports from elsewhere."""
    if not isinstance(block, (ast.If, ast.Try)):
        return []
    imported = {
        a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) and not n.level for a in n.names
    }
    others = [*block.orelse, *(n for h in getattr(block, "handlers", ()) for n in h.body)]
    return [n for n in others if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name in imported]


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from _module_level(getattr(node, block, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _module_level(handler.body)


@dataclass
class Library:
    """Diffusers source under `root` (the folder that holds `__init__.py`). Caches what it read."""

    root: Path
    version: str
    _modules: dict[str, ModuleSource | None] = field(default_factory=dict)
    _canonical: dict[str, str] = field(default_factory=dict)
    _definitions: dict[str, Definition] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _bases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _ancestors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given: Callable[[str], Definition | None] = lambda name: None
    """A definition by canonical name that was read from this source elsewhere; None if this library has to read it."""

    def module(self, name: str) -> ModuleSource | None:
        """The module of that qualified name, or None if the library has no such file."""
        if name not in self._modules:
            relative = Path(*name.split(".")[1:])
            package, file = self.root / relative / "__init__.py", self.root / f"{relative}.py"
            path = package if package.is_file() else file if file.is_file() else None
            known = name == PACKAGE or name.startswith(PACKAGE + ".")
            self._modules[name] = ModuleSource(name, path, self.root) if known and path else None
        return self._modules[name]

    def canonical(self, name: str) -> str:
        """Follow re-exports to the module that defines `name`; a name from elsewhere is returned as it is."""
        if not name.startswith(PACKAGE + "."):
            return name
        if name not in self._canonical:
            self._canonical[name] = name  # a cycle of re-exports ends here
            self._canonical[name] = self._follow(name)
        return self._canonical[name]

    def _follow(self, name: str) -> str:
        if self.module(name) is not None:
            return name
        parent, _, last = name.rpartition(".")
        module = self.module(parent)
        if module is None:
            owner = self.canonical(parent) if "." in parent else parent
            return f"{owner}.{last}" if owner != parent else name
        if last in module.definitions and not (module.is_package and last in module.imports):
            return name
        target = module.imports.get(last)
        return self.canonical(target) if target and target != name else name

    def entry(self, name: str) -> TopLevel | None:
        """Index entry of a canonical qualified name."""
        parent, _, last = name.rpartition(".")
        module = self.module(parent) if parent else None
        return module.definitions.get(last) if module else None

    def definition(self, name: str) -> Definition | Unknown:
        """The absolute, line-marked tree of a top-level definition."""
        name = self.canonical(name)
        if name not in self._definitions and (given := self.given(name)) is not None:
            self._definitions[name] = given
        if name not in self._definitions:
            parent, _, last = name.rpartition(".")
            module = self.module(parent)
            source = module.node(last) if module is not None else None
            entry = self.entry(name)  # after `node`, which may set its lines right
            if entry is None or module is None or source is None:
                return Unknown(f"{name} is not defined in this Diffusers source")
            node = absolutise(source, entry, module, self)
            self._definitions[name] = Definition(last, node, module.name, module.file)
        return self._definitions[name]

    def syntax(self, name: str) -> ast.stmt | None:
        """Python's own tree of a top-level definition: enough for a question, and far cheaper than `definition`."""
        parent, _, last = self.canonical(name).rpartition(".")
        module = self.module(parent)
        node = module.node(last) if module is not None else None
        if node is not None:
            self._asked.add(parent)
        return node

    def method_syntax(self, name: str, method: str) -> ast.stmt | None:
        """Python's own tree of a class's own method: enough for a question, and far cheaper than `definition`."""
        parent, _, last = self.canonical(name).rpartition(".")
        module = self.module(parent)
        if module is None or last not in module.definitions:
            return None
        self._asked.add(parent)
        return module.method(last, method)

    def bases(self, name: str) -> tuple[str, ...]:
        """Qualified names of a class's bases; of another package as they are imported."""
        name = self.canonical(name)
        if name not in self._bases:
            parent, _, last = name.rpartition(".")
            module = self.module(parent)
            resolver = Resolver(module, self) if module else None
            found = (resolver.chain(ast.unparse(base)) for base in module.bases(last)) if module and resolver else ()
            self._bases[name] = tuple(self.canonical(f.replace(DOT, ".")) for f in found if f)
        return self._bases[name]

    def ancestors(self, name: str) -> tuple[str, ...]:
        """All base classes, nearest first."""
        name = self.canonical(name)
        if name not in self._ancestors:
            self._ancestors[name] = self._collected(name)
        return self._ancestors[name]

    def _collected(self, name: str) -> tuple[str, ...]:
        seen: dict[str, None] = {}
        pending = list(self.bases(name))
        while pending:
            base = pending.pop(0)
            if base not in seen:
                seen[base] = None
                pending += self.bases(base)
        return tuple(seen)

    def is_class(self, name: str) -> bool:
        entry = self.entry(self.canonical(name))
        return entry is not None and entry.kind == "ClassDef"

    def is_torch_module(self, name: str) -> bool:
        """Whether instances are torch modules."""
        return self.is_class(name) and "torch.nn.Module" in self.ancestors(name)

    def span(self, name: str) -> Span | None:
        """Where a qualified name is defined."""
        entry = self.entry(self.canonical(name))
        module = self.module(self.canonical(name).rpartition(".")[0])
        return Span(module.file, entry.line) if entry and module else None

    def digests(self) -> dict[str, str]:
        """Digest of every file from which a definition was taken or asked, by relative path."""
        used = {d.module for d in self._definitions.values()} | self._asked
        return {m.file: m.digest for n in sorted(used) if (m := self.module(n)) is not None}


def open_library(source: Path | None = None) -> Library:
    """The Diffusers source to read: `source` (checkout, package folder or wheel unpacked) or the installed package.

    Finding an installed package does not import it. Raises PorterError if there is none.
    """
    if source is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.origin:
            raise PorterError(
                Diagnostic(
                    "PORT001", "diffusers is not installed", advice=f"pip install --no-deps {'=='.join(DIFFUSERS)}"
                )
            )
        root = Path(spec.origin).parent
        if (version := _version(root)) != DIFFUSERS[1]:
            advice = f"install {'=='.join(DIFFUSERS)}, or name a checkout with --source to try its version"
            message = f"diffusers {version} is installed, the rules are written for {DIFFUSERS[1]}"
            raise PorterError(Diagnostic("PORT006", message, advice=advice))
    else:
        options = [source, source / PACKAGE, source / "src" / PACKAGE]
        found = next((p for p in options if (p / "__init__.py").is_file() and (p / "models").is_dir()), None)
        if found is None:
            raise PorterError(Diagnostic("PORT002", f"no Diffusers source in {source}"))
        root = found
    return Library(root, _version(root))


def _version(root: Path) -> str:
    found = _VERSION.search(_text(root / "__init__.py", "__init__.py"))
    if found:
        return found["version"]
    raise PorterError(Diagnostic("PORT002", f"no __version__ in {root / '__init__.py'}"))
