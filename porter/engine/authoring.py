"""What `porter rules` does: list, show, test, start, count, describe. Functions give text to print."""

from __future__ import annotations

import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from porter.engine.load import RuleSet, load_rule, load_rules, rule_files
from porter.engine.rule import Rule
from porter.engine.schema import PHASES, Example, Keep, json_schema
from porter.model import Diagnostic, PorterError
from porter.resources import RULES

_NEW = """\
# yaml-language-server: $schema=../rule.schema.json
rule: {name}
doc: |
  What the rule does, and why the engine needs it. One or two sentences.
phase: normalize
scope: {scope}
symbols:
  old: package.old
  new: package.new
on: {{call: old}}
cases:
  - match: old($x)
    edit: [{{replace: $site, with: new($x)}}]
otherwise: PORT203
examples:
  - name: what it does
    before: |
      y = old(x)
    after: |
      y = new(x)
  - name: what it must leave alone
    unchanged: |
      y = other(x)
  - name: what it can't do is reported
    before: |
      y = old(x, 2)
    reports: [PORT203]
"""


def _load(rules: Path | None, *, examples: bool = True) -> RuleSet:
    return load_rules(rules or RULES, examples=examples)


def in_order(rules: RuleSet) -> list[Rule]:
    """Rules as they run: by phase, stratum, name."""
    return [rule for phase in PHASES for stratum in rules.strata(phase) for rule in stratum]


def listing(rules: Path | None, fmt: str = "rich") -> str:
    """One line per rule in running order."""
    found = in_order(_load(rules, examples=False))
    if fmt == "json":
        rows = [
            {"rule": r.id, "phase": r.spec.phase, "scope": r.spec.scope, "file": r.file, "summary": r.summary}
            for r in found
        ]
        return json.dumps(rows, indent=2) + "\n"
    width = max((len(r.id) for r in found), default=0)
    return "".join(f"{r.spec.phase:9} {r.spec.scope:11} {r.id:{width}}  {r.summary}\n" for r in found)


def find_rule(name: str, rules: Path | None) -> Rule:
    """A rule by id. Raises PorterError (PORT012) with close names."""
    paths = {p.stem: p for p in rule_files([rules or RULES])}
    if name not in paths:
        close = difflib.get_close_matches(name, paths, 3)
        advice = f"did you mean {', '.join(close)}?" if close else "`porter rules list` lists them"
        raise PorterError(Diagnostic("PORT012", f"there is no rule {name}", advice=advice))
    return load_rule(paths[name])


def show(name: str, rules: Path | None) -> str:
    """A rule for reading: documentation, sites, first example as a patch, what is reported."""
    rule = find_rule(name, rules)
    spec = rule.spec
    parts = [f"{rule.id}  ({spec.phase}, {spec.scope})  {rule.file}", "", spec.doc.strip(), ""]
    if spec.after:
        parts.append(f"runs after: {', '.join(spec.after)}")
    parts.append(f"handles: {_sites(rule)}")
    reported = sorted({c for case in spec.cases for c in case.report})
    if isinstance(spec.otherwise, Keep):
        parts.append(f"otherwise: left alone, {spec.otherwise.keep}")
    else:
        parts.append(f"otherwise: {spec.otherwise}")
    if reported:
        parts.append(f"reports: {', '.join(reported)}")
    example = next((e for e in spec.examples if e.after is not None), None)
    if example is not None:
        parts += ["", example.name, *_patch(example)]
    for other in spec.examples:
        if other.unchanged is not None or other.reports:
            how = f"reports {', '.join(other.reports)}" if other.reports else "unchanged"
            parts.append(f"{how}: {other.name}")
    return "\n".join(parts) + "\n"


def _sites(rule: Rule) -> str:
    from porter.engine.schema import On

    on = rule.spec.on
    for name in On.__struct_fields__:
        value = getattr(on, name)
        if value is not None and name not in ("filter", "within", "bind"):
            shown = value if isinstance(value, str) else ", ".join(value) if isinstance(value, list) else _filter(value)
            return f"{name.rstrip('_').replace('_', ' ')} {' '.join(shown.split())}"
    return "nothing"


def _filter(value: object) -> str:
    named = getattr(value, "derives_from", None) or getattr(value, "name", None) or ""
    return ", ".join(named) if isinstance(named, list) else str(named)


def _patch(example: Example) -> list[str]:
    before, after = (example.before or "").splitlines(), (example.after or "").splitlines()
    rows = difflib.ndiff(before, after)
    return [f"  {row}" for row in rows if not row.startswith("?")]


def test(names: tuple[str, ...], rules: Path | None) -> bool:
    """Run examples, print one line per rule and details of what failed; whether all passed."""
    from porter.engine.examples import run_examples

    loaded = _load(rules)
    for name in names:
        if name not in loaded.by_id:
            find_rule(name, rules)  # raises with close names
    counts: Counter[str] = Counter()
    for result in run_examples(loaded, names):
        counts[result.word] += 1
        if not result.passed:
            rule = loaded.by_id[result.rule]
            number = next(i for i, e in enumerate(rule.spec.examples) if e.name == result.example)
            place = f"{rule.file}:{rule.document.line(f'$.examples[{number}]')}"
            print(f"{result.word}: {result.rule}: {result.example}  ({place})")
            print("".join(f"    {line}\n" for line in result.details), end="")
    bad = sum(n for word, n in counts.items() if word != "passed")
    shown = ", ".join(f"{counts[word]} {word}" for word in ("passed", "missing", "noisy", "wrong") if counts[word])
    print(f"{len(names) or len(loaded.rules)} rules: {shown or 'no examples'}", file=sys.stderr)
    return bad == 0


def new(name: str, folder: str, rules: Path | None) -> str:
    """Write the start of a rule file; returns its path. Raises PorterError if the id is taken or no id."""
    import re

    root = rules or RULES
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        advice = "small letters, digits and hyphens, for example replace-rms-norm"
        raise PorterError(Diagnostic("PORT013", f"`{name}` can't be the name of a rule", advice=advice))
    if not re.fullmatch(r"\w[\w-]*(/\w[\w-]*)*", folder):
        raise PorterError(
            Diagnostic("PORT013", f"`{folder}` is no folder below {root}", advice="for example transformer")
        )
    if root.is_dir() and any(p.stem == name for p in rule_files([root])):
        raise PorterError(Diagnostic("PORT224", f"there is a rule {name} already"))
    from porter.emit.write import write_atomically

    scope = folder if folder in ("transformer", "pipeline") else "any"
    write_atomically({f"{folder}/{name}.yaml": _NEW.format(name=name, scope=scope)}, root)
    return str(root / folder / f"{name}.yaml")


def stats(rules: Path | None, generated: Path | None = None) -> str:
    """Counts that show where the language is used, and how often it does not suffice (ops, hints for single models)."""
    found = _load(rules)
    cases = [c for r in found.rules for c in r.spec.cases]
    examples = [e for r in found.rules for e in r.spec.examples]
    negative = sum(1 for e in examples if e.unchanged is not None or e.reports)
    ops = sum(1 for c in cases if c.op)
    verbs = Counter(e.verb for c in cases for e in c.edit)
    phases = Counter(r.spec.phase for r in found.rules)
    rows = [
        ("rules", len(found.rules), ", ".join(f"{phases[p]} {p}" for p in PHASES if phases[p])),
        ("cases", len(cases), ""),
        ("cases with an op", ops, f"{100 * ops // max(1, len(cases))} % (a rising share is a smell)"),
        ("examples", len(examples), f"{100 * negative // max(1, len(examples))} % say what must not happen"),
        ("edits", sum(verbs.values()), ", ".join(f"{n} {v}" for v, n in verbs.most_common())),
        ("hints", len(list(((rules or RULES) / "models").glob("*.yaml"))), "files for single models"),
    ]
    if generated is not None and (generated / "manifest.json").is_file():
        sites, by_ops = sites_of(generated, {r.spec.rule for r in found.rules if any(c.op for c in r.spec.cases)})
        rows.append(("sites of the ports", sites, f"{100 * by_ops // max(1, sites)} % by rules with an op"))
    return "".join(f"{name:18} {number:5}  {detail}".rstrip() + "\n" for name, number, detail in rows)


def sites_of(generated: Path, ops: Iterable[str]) -> tuple[int, int]:
    """Sites that rules rewrote in all ports of a folder, and how many of them rules with ops did."""
    from porter.coverage import handled

    totals = [0, 0]
    for path in sorted(generated.glob("*/port.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for about in (*record["transformers"].values(), *record["pipelines"].values()):
            totals = [a + b for a, b in zip(totals, handled(about.get("sites", {}), ops), strict=True)]
    return totals[0], totals[1]


def schema(write: bool, rules: Path | None) -> str:
    """The JSON Schema; with `write`, also put into rules/rule.schema.json."""
    text = json.dumps(json_schema(), indent=2) + "\n"
    if write:
        from porter.emit.write import write_atomically

        write_atomically({"rule.schema.json": text}, rules or RULES)
    return text
