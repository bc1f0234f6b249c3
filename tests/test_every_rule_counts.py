"""Leaving out any rule changes a port, and what `porter explain` says about a line is so."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from porter.convert import _Conversion
from porter.engine import RuleSet, load_rules
from porter.explain import line as explained
from porter.explain import origin_of
from porter.model import PorterError
from porter.resources import RULES
from porter.source.library import open_library
from porter.targets import find_target
from porter.transformer.policy import load_policy
from porter.transformer.port import TransformerPort
from tests.robustness.trial import printed

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "generated"
LINES = 10
TRIES = 4


@cache
def used_by() -> dict[str, list[str]]:
    """For each rule the classes it had a part in, those with most sites first."""
    found: dict[str, dict[str, int]] = {}
    for port in json.loads((GENERATED / "manifest.json").read_text(encoding="utf-8"))["ports"]:
        record = json.loads((GENERATED / port["folder"] / "port.json").read_text(encoding="utf-8"))
        for kind in ("transformers", "pipelines"):
            for name, about in record[kind].items():
                for rule, states in about.get("sites", {}).items():
                    if number := states.get("applied", 0) + states.get("inferred", 0):
                        found.setdefault(rule, {})[name] = number
    return {rule: sorted(counts, key=lambda n: (-counts[n], n)) for rule, counts in found.items()}


@cache
def library():
    return open_library()


def port(name: str, rules: RuleSet, denoisers: dict[str, TransformerPort] | None = None) -> dict[str, str] | str:
    """Files of a conversion, or what it is refused with."""
    run = _Conversion(library(), rules, load_policy(RULES))
    run.transformers.update(denoisers or {})
    try:
        run.add(find_target(library(), name), alone=True)
    except PorterError as error:
        return str(error)
    made = printed(run)
    said = "\n".join(sorted({d.message for d in (*run.diagnostics, *made.diagnostics)}))
    return {name: text for name, text in made.files.items() if name.endswith(".py")} | {"diagnostics": said}


@cache
def with_all(name: str) -> tuple[dict[str, str] | str, dict[str, TransformerPort]]:
    run = _Conversion(library(), load_rules(RULES), load_policy(RULES))
    run.add(find_target(library(), name), alone=True)
    kept = run.transformers if name.endswith("Pipeline") else {}
    return port(name, load_rules(RULES), kept), dict(run.transformers)


@pytest.mark.parametrize("rule", [r.id for r in load_rules(RULES).rules])
def test_leaving_a_rule_out_changes_a_port(rule: str) -> None:
    """What a rule does may be done by folding as well, in one port or another; not in all."""
    names = used_by().get(rule, [])[:TRIES]
    assert names, f"no checked-in port needs {rule}: it may go"
    assert any(changes(name, rule) for name in names), f"{', '.join(names)} are the same without {rule}"


def changes(name: str, rule: str) -> bool:
    whole, denoisers = with_all(name)
    kept = denoisers if name.endswith("Pipeline") else {}
    return port(name, RuleSet(tuple(r for r in load_rules(RULES).rules if r.id != rule)), kept) != whole


# ---- explain


def spread() -> list[tuple[Path, int]]:
    """Lines spread over a generated file, each with a source in Diffusers (what a template printed has none)."""
    path = GENERATED / "qwen_image/qwen_image_transformer.py"
    total = len(path.read_text(encoding="utf-8").splitlines())
    sources = {o.file for n in range(1, total + 1) if (o := origin_of(path, n)).file}
    known = {f for f in sources if (library().root / f).is_file()}
    numbers = [n for n in range(1, total + 1) if origin_of(path, n).file in known and words(text_of(path, n))]
    return [(path, numbers[(2 * i + 1) * len(numbers) // (2 * LINES)]) for i in range(LINES)]


def text_of(path: Path, number: int) -> str:
    return path.read_text(encoding="utf-8").splitlines()[number - 1]


def words(text: str) -> set[str]:
    return {w for w in re.findall(r"[A-Za-z_]\w+", text) if w not in ("self", "torch", "nn", "None", "True", "False")}


@pytest.mark.parametrize("index", range(LINES))
def test_a_generated_line_is_explained_by_the_source_line_it_comes_from(index: int) -> None:
    """What is on a line is on the source line, too, unless a rule put it there, which is named then."""
    path, number = spread()[index]
    origin = origin_of(path, number)
    source = (library().root / origin.file).read_text(encoding="utf-8").splitlines()
    first = origin.line - 1
    while source[first - 1].lstrip().startswith("#"):  # comments above a statement belong to it
        first -= 1
    statement = "\n".join(source[first : origin.line + 12])  # a statement may go on below its first line
    shared = words(text_of(path, number)) & words(statement)
    assert shared or origin.rules, (
        f"{path.name}:{number} {text_of(path, number)!r} has nothing of {origin.file}:{origin.line}"
    )
    shown = explained(path, number)
    assert f"diffusers/{origin.file}:{origin.line}" in shown and source[origin.line - 1].strip() in shown


def test_the_lines_come_from_different_places() -> None:
    origins = [origin_of(path, number) for path, number in spread()]
    assert len({o.line for o in origins}) == LINES
    assert [o.line for o in origins if not o.rules], "no line is as Diffusers has it"


def test_a_rule_that_a_line_names_is_the_one_that_made_it() -> None:
    """Without the rule, no statement of that text is there."""
    path = GENERATED / "qwen_image/qwen_image_transformer.py"
    wanted = {
        "merged-projections": "to_qkv(",
        "row-parallel-linears": "RowParallelLinear(",
        "replace-logger": "init_logger",
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    for rule, part in wanted.items():
        numbers = [n for n, text in enumerate(lines, 1) if part in text and rule in origin_of(path, n).rules]
        assert numbers, f"no line with {part} names {rule}"
        rest = RuleSet(tuple(r for r in load_rules(RULES).rules if r.id != rule))
        made = port("QwenImageTransformer2DModel", rest)
        text = made if isinstance(made, str) else made["qwen_image/qwen_image_transformer.py"]
        assert lines[numbers[0] - 1].strip() not in text
