"""Rewrite one definition to absolute names (see `porter.source.names`) and mark its statements, before LibCST parses it.

The work is done on the text, at the positions Python's own parser reports: one native parse by LibCST follows, where a
transformer over LibCST's tree would cost ten times as much. Positions inside f-strings are wrong before Python 3.12, so
those are rewritten in the LibCST tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING

import libcst as cst

from porter.source.marks import Mark
from porter.source.names import BUILTINS, DOT, absolute, dotted
from porter.source.syntax import children, walk
from porter.source.tree import find, replace_nodes

if TYPE_CHECKING:
    from porter.source.library import Library, ModuleSource, TopLevel

MODULES = frozenset({"torch", "torch.nn", "torch.nn.functional", "torch.utils", "torch.utils.checkpoint", "torch.backends",
                     "torch.backends.mps", "torch.backends.cuda", "torch.amp", "torch.cuda", "torch.fft", "torch.special",
                     "torch.linalg", "torch.nn.utils", "torch.nn.utils.rnn", "torch.nn.attention", "torch.compiler",
                     "torch.nn.init", "torch.nn.attention.flex_attention", "torch.onnx", "torch.xpu", "torch.mps",
                     "torch.distributed", "numpy.random", "torch_xla.core", "torch_xla.core.xla_model"})  # fmt: skip
"""Modules of other packages through which a dotted name is followed; anything below is an object's attribute."""


def absolutise(node: ast.stmt, entry: TopLevel, module: ModuleSource, library: Library):  # noqa: ANN201
    """The definition as a LibCST node, absolute and marked. `node` is its tree in the module's own parse."""
    scanner = _Scanner(module, library)
    scanner.statement(node, ())
    lines = [line.encode() for line in module.lines[entry.first_line - 1 : entry.last_line]]
    for line, start, end, text in sorted(scanner.changes, reverse=True):
        row = line - entry.first_line
        lines[row] = lines[row][:start] + text.encode() + lines[row][end:]
    for line, (origin, _) in scanner.marks.items():
        row = line - entry.first_line
        bare = lines[row].rstrip(b"\n")
        lines[row] = bare + f"  {Mark(module.file, origin).text()}\n".encode()
    indent = node.col_offset  # a definition inside a module-level block
    tree = cst.parse_module(
        b"".join(line[min(indent, len(line) - len(line.lstrip(b" "))) :] for line in lines).decode()
    )
    result = tree.body[0]
    if tree.header:
        result = result.with_changes(leading_lines=[*tree.header, *result.leading_lines])
    return _format_strings(result, scanner) if scanner.format_strings else result


class Resolver:
    """What a global name or dotted chain of a module refers to."""

    def __init__(self, module: ModuleSource, library: Library) -> None:
        self.module = module
        self.library = library
        self.local: dict[str, str] = {}
        self._chains: dict[str, str | None] = {}

    def chain(self, path: str) -> str | None:
        """Absolute text for `a.b.c` read at module scope (`torch·nn·Linear.weight`), or None if it is not global."""
        if path not in self._chains:
            self._chains[path] = self._resolve(path)
        return self._chains[path]

    def _resolve(self, path: str) -> str | None:
        root, *rest = path.split(".")
        if root in self.module.definitions:
            return ".".join([absolute(f"{self.module.name}.{root}"), *rest])
        bound = self.local.get(root) or self.module.imports.get(root)
        if bound is None:
            return None
        target = self.library.canonical(bound)
        taken = 0
        while taken < len(rest) and self._is_module(target):
            target = self.library.canonical(f"{target}.{rest[taken]}")
            taken += 1
        if "." not in target:
            if target in BUILTINS:
                return None
            return ".".join([target + DOT, *rest[taken:]])
        return ".".join([absolute(target), *rest[taken:]])

    def _is_module(self, name: str) -> bool:
        if name.startswith("diffusers"):
            return self.library.module(name) is not None
        return name in MODULES or "." not in name


class _Scanner:
    """Collects text changes (line, start byte, end byte, text) and marks (line -> origin line)."""

    def __init__(self, module: ModuleSource, library: Library) -> None:
        self.module = module
        self.library = library
        self.resolver = Resolver(module, library)
        self.changes: list[tuple[int, int, int, str]] = []
        self.marks: dict[int, tuple[int, str]] = {}
        self.format_strings: list[frozenset[str]] = []
        self.quoted: set[ast.AST] = set()

    def statement(self, node: ast.stmt, scopes: tuple[frozenset[str], ...]) -> None:
        self._mark(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for annotation in [node.returns, *(a.annotation for a in _all_args(node.args))]:
                self.quoted |= {n for n in walk(annotation) if isinstance(n, ast.Constant)} if annotation else set()
            for each in [*node.decorator_list, node.returns, *_defaults(node.args)]:
                self.expression(each, scopes)
            inner = (*scopes, bound_names(node))
            for stmt in node.body:
                self.statement(stmt, inner)
        elif isinstance(node, ast.ClassDef):
            for each in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
                self.expression(each, scopes)
            for stmt in node.body:
                self.statement(stmt, scopes)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self._local_import(node, bool(scopes))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            return
        else:
            for child in children(node):
                self._any(child, scopes)

    def _local_import(self, node: ast.Import | ast.ImportFrom, inside: bool) -> None:
        """An import inside a function names globals like any other; the statement itself goes."""
        if not inside or node.lineno != node.end_lineno:
            return
        for alias in node.names:
            base = self.module.base(node) if isinstance(node, ast.ImportFrom) else ""
            target = f"{base}.{alias.name}" if base else alias.name
            self.resolver.local[alias.asname or alias.name] = self.library.canonical(target)
        assert node.end_col_offset is not None
        self.changes.append((node.lineno, node.col_offset, node.end_col_offset, "pass"))

    def _any(self, node: ast.AST, scopes: tuple[frozenset[str], ...]) -> None:
        if isinstance(node, ast.stmt):
            self.statement(node, scopes)
        elif isinstance(node, ast.ExceptHandler):
            self.expression(node.type, scopes)
            for stmt in node.body:
                self.statement(stmt, scopes)
        elif isinstance(node, ast.match_case):
            self.expression(node.guard, scopes)
            for stmt in node.body:
                self.statement(stmt, scopes)
        elif isinstance(node, ast.withitem):
            self.expression(node.context_expr, scopes)
        elif isinstance(node, ast.expr):
            self.expression(node, scopes)

    def expression(self, node: ast.AST | None, scopes: tuple[frozenset[str], ...]) -> None:
        stack: list[tuple[ast.AST, tuple[frozenset[str], ...]]] = [(node, scopes)] if node is not None else []
        while stack:
            top, here = stack.pop()
            if isinstance(top, ast.JoinedStr):
                self.format_strings.append(frozenset().union(*here) if here else frozenset())
                continue
            if isinstance(top, ast.Constant) and isinstance(top.value, str) and top in self.quoted:
                self._quoted(top, here)
                continue
            if isinstance(top, (ast.Name, ast.Attribute)):
                path = _path(top)
                if path is not None:
                    self._reference(top, path, here)
                    continue
            if isinstance(top, ast.Lambda):
                here = (*here, frozenset(a.arg for a in _all_args(top.args)))
            stack += [(child, here) for child in children(top)]

    def _quoted(self, node: ast.Constant, scopes: tuple[frozenset[str], ...]) -> None:
        """A forward reference in an annotation is a reference; the definitions of a port are in order of use."""
        quoted = str(node.value)
        text = self.resolver.chain(quoted) if quoted.replace(".", "").isidentifier() else None
        if text is not None and node.lineno == node.end_lineno:
            self.changes.append((node.lineno, node.col_offset, node.end_col_offset or 0, text))

    def _reference(self, node: ast.expr, path: str, scopes: tuple[frozenset[str], ...]) -> None:
        root = path.split(".", 1)[0]
        if any(root in scope for scope in scopes) or node.lineno != node.end_lineno:
            return
        text = self.resolver.chain(path)
        if text is not None:
            self.changes.append((node.lineno, node.col_offset, node.end_col_offset or 0, text))

    def _mark(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.With)):
            if node.body[0].lineno == node.lineno:
                return
            last = self._header_end(node)
        elif isinstance(node, ast.Try):
            last = node.lineno
        else:
            last = node.end_lineno or node.lineno
        self.marks.setdefault(last, (node.lineno, ""))

    def _header_end(self, node: ast.stmt) -> int:
        """Line of the colon that ends a compound statement's header."""
        header: list[ast.AST] = []
        for name, value in ast.iter_fields(node):
            if name not in ("body", "orelse", "decorator_list", "handlers", "finalbody"):
                header += value if isinstance(value, list) else [value]
        ends = [e.end_lineno or 0 for h in header for e in _placed(h)]
        line = max([node.lineno, *ends])
        body = node.body[0].lineno  # type: ignore[attr-defined]
        while not self.module.lines[line - 1].split("#")[0].rstrip().endswith(":") and line < body:
            line += 1
        return line


def _placed(part: object) -> list[ast.expr | ast.arg]:
    """The outermost nodes of a part of a header that know their lines; a list of parameters does not."""
    if isinstance(part, (ast.arguments, ast.withitem)):
        return [each for child in children(part) for each in _placed(child)]
    return [part] if isinstance(part, (ast.expr, ast.arg, ast.keyword)) else []  # type: ignore[list-item]


def _path(node: ast.expr) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _all_args(args: ast.arguments) -> list[ast.arg]:
    extra = [a for a in (args.vararg, args.kwarg) if a]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


def _defaults(args: ast.arguments) -> list[ast.AST | None]:
    return [*args.defaults, *args.kw_defaults, *(a.annotation for a in _all_args(args))]


def bound_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str]:
    """Names a function binds: parameters, every stored name (comprehensions too), nested definitions, local imports."""
    bound = {a.arg for a in _all_args(function.args)}
    for node in _walk_body(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno != node.end_lineno:
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return frozenset(bound)


def _walk_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    for stmt in function.body:
        yield from walk(stmt)


def _format_strings(node: cst.CSTNode, scanner: _Scanner) -> cst.CSTNode:
    """Absolute names inside f-strings. Locals of every enclosing function are left alone."""
    local = frozenset().union(*scanner.format_strings)
    edits: list[tuple[cst.CSTNode, object]] = []
    for hole in find(node, cst.FormattedStringExpression):
        stack: list[cst.CSTNode] = [hole.expression]
        while stack:
            top = stack.pop()
            if isinstance(top, (cst.Name, cst.Attribute)) and (path := dotted(top)) is not None:
                text = None if path.split(".", 1)[0] in local else scanner.resolver.chain(path)
                if text is not None:
                    edits.append((top, cst.parse_expression(text)))
            elif isinstance(top, cst.Call):
                stack += [top.func, *(a.value for a in top.args)]
            elif isinstance(top, cst.Attribute):
                stack.append(top.value)
    return replace_nodes(node, edits)
