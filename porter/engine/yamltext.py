"""YAML with positions: a file as plain data, and the line of any place in it.

PyYAML's C parser composes the node tree; the conversion to data is ours, because rule files use a stricter YAML: keys
are unique, anchors and aliases are refused, and only `true` and `false` are booleans (so `on:` is a key, not `True`).
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from msgspec import Struct

from porter.model import Diagnostic, PorterError, Span

_STRING = "tag:yaml.org,2002:str"
_PATH = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+)\]|\[(?:'([^']*)'|\.\.\.)\]")


class _Loader(yaml.CSafeLoader):  # type: ignore[misc]
    """The C loader with a smaller idea of what is implicitly typed."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[-1] in ("int", "float", "null")]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


class Document(Struct, frozen=True):
    """One YAML document: its data, and where each part of it stands."""

    file: str
    data: object
    root: yaml.Node | None
    first_line: int = 0

    def line(self, path: str = "$") -> int:
        """Line (from 1) of a place written as msgspec does: `$.cases[0].edit[1].with`; of its parent if unknown."""
        node, line = self.root, 1
        if node is None:
            return 1
        line = node.start_mark.line + 1
        for key, index, quoted in _PATH.findall(path):
            found = _child(node, key or quoted, int(index) if index else None)
            if found is None:
                break
            line, node = found
        return line + self.first_line

    def code_line(self, path: str, offset: int = 1) -> int:
        """Line of the `offset`-th line of a code text at `path`: a block scalar starts one line below its key."""
        node: yaml.Node | None = self.root
        for key, index, quoted in _PATH.findall(path):
            found = _child(node, key or quoted, int(index) if index else None) if node is not None else None
            node = found[1] if found else None
        if node is None:
            return self.line(path)
        start = node.start_mark.line + 1 + self.first_line
        return start + offset if getattr(node, "style", None) in ("|", ">") else start + offset - 1


def _child(node: yaml.Node, key: str, index: int | None) -> tuple[int, yaml.Node] | None:
    if index is not None:
        if isinstance(node, yaml.SequenceNode) and index < len(node.value):
            item = node.value[index]
            return item.start_mark.line + 1, item
        return None
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return name.start_mark.line + 1, value
    return None


def parse(text: str, file: str, first_line: int = 0) -> Document:
    """Data of a YAML text.

    Raises PorterError (PORT210) with file and line: not YAML, a duplicate key, an anchor.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = (mark.line + 1 if mark else 1) + first_line
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        advice = None
        if "alias" in what or "undefined" in what:
            advice = "text that starts with * or & must be in quotes"
        elif "mapping values" in what or "tab" in what or "token" in what:
            advice = "put code in quotes, or in a block scalar after `|`"
        raise PorterError(Diagnostic("PORT210", f"not a YAML file: {what}", Span(file, line), advice=advice)) from None
    anchors: set[int] = set()
    data = _data(root, file, first_line, anchors) if root is not None else None
    return Document(file, data, root, first_line)


def parse_file(path: Path, shown: str | None = None) -> Document:
    """Data of a YAML file; as `parse`, and PORT211 if it can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PorterError(Diagnostic("PORT211", f"can't read {path}: {error}", Span(shown or str(path), 1))) from None
    return parse(text, shown or str(path))


def _data(node: yaml.Node, file: str, first: int, seen: set[int]) -> object:
    if id(node) in seen and not isinstance(node, yaml.ScalarNode):
        raise _refused("anchors and aliases are not used in rule files", node, file, first)
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_data(item, file, first, seen) for item in node.value]
    result: dict[str, object] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("keys must be plain words", key, file, first)
        if key.value in result:
            raise _refused(f"the key `{key.value}` occurs twice", key, file, first, "keep one of the two")
        result[key.value] = _data(value, file, first, seen)
    return result


def _scalar(node: yaml.ScalarNode) -> object:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if node.tag == _STRING:
        return text
    if kind == "bool":
        return text == "true"
    if kind == "null":
        return None
    try:
        if kind == "int":
            return int(text.replace("_", ""), 0)
        if kind == "float":
            return float(text.replace("_", ""))
    except ValueError:
        return text
    return text


def _refused(message: str, node: yaml.Node, file: str, first: int, advice: str | None = None) -> PorterError:
    span = Span(file, node.start_mark.line + 1 + first, node.start_mark.column + 1)
    return PorterError(Diagnostic("PORT210", message, span, advice=advice))
