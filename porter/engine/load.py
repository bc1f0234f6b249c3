"""Load rule files. Everything is checked before anything runs, and every error names file and line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import msgspec
from msgspec import Struct

from porter.engine import registry
from porter.engine.lint import lint
from porter.engine.rule import Rule
from porter.engine.schema import PHASES, Phase, RuleSpec, Scope
from porter.engine.yamltext import Document, parse, parse_file
from porter.model import Diagnostic, PorterError, Span
from porter.resources import RULES

_NOT_RULES = frozenset({"symbols", "models"})
_EXAMPLES = re.compile(r"^examples:", re.MULTILINE)
_WHERE = re.compile(r" - at `(\$.*)`$")


class RuleSet(Struct, frozen=True, dict=True):
    """Rules that passed every check."""

    rules: tuple[Rule, ...]

    @cached_property
    def by_id(self) -> Mapping[str, Rule]:
        return {r.id: r for r in self.rules}

    def strata(self, phase: Phase, scope: Scope = "any") -> list[tuple[Rule, ...]]:
        """Rules of a phase in layers: each comes after the layers of the rules it names in `after`."""
        level: dict[str, int] = {}

        def depth(rule: Rule) -> int:
            if rule.id not in level:
                before = [b for a in rule.spec.after if (b := self.by_id.get(a)) and b.spec.phase == phase]
                level[rule.id] = 1 + max((depth(b) for b in before), default=-1)
            return level[rule.id]

        layers: dict[int, list[Rule]] = {}
        for rule in self.rules:
            if rule.spec.phase == phase:
                layer = depth(rule)
                if scope == "any" or rule.spec.scope in ("any", scope):
                    layers.setdefault(layer, []).append(rule)
        return [tuple(sorted(layers[n], key=lambda r: r.id)) for n in sorted(layers)]

    def only(self, *ids: str) -> RuleSet:
        """The set with just these rules."""
        return RuleSet(tuple(r for r in self.rules if r.id in ids))


def rule_files(paths: Iterable[Path]) -> list[Path]:
    """Rule files among files and folders; `symbols/` and `models/` hold data, not rules."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [p for p in sorted(path.rglob("*.yaml")) if not _NOT_RULES.intersection(p.relative_to(path).parts)]
        else:
            found.append(path)
    return found


def load_rules(paths: Path | Iterable[Path] = RULES, *, examples: bool = False) -> RuleSet:
    """Load and check rules. `examples` are only read when asked for: a conversion does not need them.

    Raises PorterError with one diagnostic for each thing wrong in any file; nothing is returned if there is one.
    """
    files = rule_files([paths] if isinstance(paths, Path) else paths)
    if not files and isinstance(paths, Path):
        raise PorterError(Diagnostic("PORT211", f"there is no rule in {paths}", advice="`porter rules new` starts one"))
    rules: list[Rule] = []
    errors: list[Diagnostic] = []
    for path in files:
        try:
            rules.append(load_rule(path, examples=examples))
        except PorterError as error:
            errors += error.diagnostics
    if any(r.spec.on.fact or any(c.op for c in r.spec.cases) for r in rules):
        registry.load()
    names = {r.id for r in rules}
    for rule in rules:
        errors += lint(rule, names, examples=examples)
    errors += _order(rules)
    if errors:
        raise PorterError(
            *sorted(dict.fromkeys(errors), key=lambda d: (d.span.file, d.span.line) if d.span else ("", 0))
        )
    return RuleSet(tuple(sorted(rules, key=lambda r: r.id)))


def load_rule(path: Path, *, examples: bool = True) -> Rule:
    """One rule file as data of the right shape. Raises PorterError (PORT210 to PORT213)."""
    shown = _shown(path)
    if examples:
        document = parse_file(path, shown)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PorterError(Diagnostic("PORT211", f"can't read {path}: {error}", Span(shown, 1))) from None
        found = _EXAMPLES.search(text)
        document = parse(text[: found.start()] if found else text, shown)
    try:
        spec = _spec(document)
    except PorterError:
        if examples:
            raise
        return load_rule(path, examples=True)  # maybe a key stands below the examples
    if spec.rule != path.stem:
        message = f"the file is named {path.name}, its rule `{spec.rule}`"
        raise PorterError(
            Diagnostic(
                "PORT213", message, Span(shown, document.line("$.rule")), advice=f"name the file {spec.rule}.yaml"
            )
        )
    return Rule(spec, document, _Lists(path))


def _spec(document: Document) -> RuleSpec:
    try:
        return msgspec.convert(document.data, RuleSpec)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _WHERE.search(text)
        place = found[1] if found else "$"
        message = _WHERE.sub("", text).replace("Object ", "this ")
        unknown = re.search(r"unknown field `(.+?)`", text)
        line = document.line(f"{place}.{unknown[1]}" if unknown else place)
        raise PorterError(
            Diagnostic("PORT212", message, Span(document.file, line), advice=_advice(place, unknown))
        ) from None


def _advice(place: str, unknown: re.Match[str] | None) -> str | None:
    if unknown is None:
        return f"at {place}; docs/writing-a-rule.md lists what may stand there" if place != "$" else None
    import difflib

    from porter.engine import schema

    kinds = [v for v in vars(schema).values() if isinstance(v, type) and issubclass(v, msgspec.Struct)]
    words = sorted({f for kind in kinds for f in getattr(kind, "__struct_encode_fields__", ())})
    close = difflib.get_close_matches(unknown[1], words, 1)
    return f"did you mean `{close[0]}`?" if close else "docs/writing-a-rule.md lists what may stand there"


def _shown(path: Path) -> str:
    """The path as a person would write it: relative to the working folder if it is below it."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


class _Lists:
    """`@name` in a rule file: the keys (or items) of `symbols/name.yaml` beside it or above it."""

    def __init__(self, rule: Path) -> None:
        self.folder = next((p / "symbols" for p in rule.resolve().parents if (p / "symbols").is_dir()), None)
        self._read: dict[str, tuple[str, ...]] = {}

    def __call__(self, name: str) -> tuple[str, ...]:
        if name not in self._read:
            path = (self.folder or RULES / "symbols") / f"{name}.yaml"
            data = _list_data(str(path), path)
            self._read[name] = data
        return self._read[name]


_LISTS: dict[str, tuple[int, tuple[str, ...]]] = {}


def _list_data(key: str, path: Path) -> tuple[str, ...]:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        raise PorterError(Diagnostic("PORT223", f"there is no list {path}", Span(_shown(path), 1))) from None
    if key not in _LISTS or _LISTS[key][0] != stamp:
        data = parse_file(path, _shown(path)).data
        if not isinstance(data, (dict, list)):
            raise PorterError(Diagnostic("PORT223", f"{path} is no list", Span(_shown(path), 1)))
        _LISTS[key] = (stamp, tuple(str(each) for each in data))
    return _LISTS[key][1]


def _order(rules: list[Rule]) -> Iterator[Diagnostic]:
    """Findings about `after` and about two files with one id."""
    by_id: dict[str, Rule] = {}
    for rule in rules:
        other = by_id.setdefault(rule.id, rule)
        if other is not rule:
            message = f"{other.file} and {rule.file} are both named {rule.id}"
            yield Diagnostic("PORT224", message, Span(rule.file, rule.document.line("$.rule")), rule.id)
    for rule in rules:
        for position, name in enumerate(rule.spec.after):
            before = by_id.get(name)
            if before and PHASES.index(before.spec.phase) > PHASES.index(rule.spec.phase):
                line = rule.document.line(f"$.after[{position}]")
                message = f"{name} runs in the later phase `{before.spec.phase}`"
                yield Diagnostic("PORT219", message, Span(rule.file, line), rule.id)
    for cycle in _cycles(by_id):
        rule = by_id[cycle[0]]
        message = "`after` goes round in a circle: " + " -> ".join([*cycle, cycle[0]])
        yield Diagnostic("PORT219", message, Span(rule.file, rule.document.line("$.after")), rule.id)


def _cycles(by_id: Mapping[str, Rule]) -> Iterator[tuple[str, ...]]:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if name in path:
            yield path[path.index(name) :]
        elif name not in done and name in by_id:
            for each in by_id[name].spec.after:
                yield from visit(each, (*path, name))
            done.add(name)

    for name in sorted(by_id):
        yield from visit(name, ())
