"""Batched guidance: one denoiser call for both branches, its result cut in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import libcst as cst
from msgspec import Struct
from msgspec.structs import replace

from porter.facts.pipeline.combination import Combination, combination, result_of, textbook_scale
from porter.facts.pipeline.denoiser_call import Branch
from porter.facts.pipeline.doubling import Doubled, concatenated, conditions_of, doubled_names, reads_whole
from porter.facts.pipeline.liveness import live_before, uses, writes
from porter.facts.pipeline.regions import Regions
from porter.facts.pipeline.undouble import undouble
from porter.model import Unknown
from porter.source.tree import body, expression, find, same, statement, substitute, with_body


class Batched(Struct, frozen=True):
    """The branches of a batched call; fields as in `Guidance`."""

    before: tuple[cst.BaseStatement, ...]
    positive: Branch
    condition: cst.BaseExpression
    negative: Branch
    before_negative: tuple[cst.BaseStatement, ...]
    again: tuple[str, ...]
    prepare: tuple[cst.BaseStatement, ...]
    call: cst.BaseStatement
    process: tuple[cst.BaseStatement, ...]
    combination: Combination
    after: tuple[cst.BaseStatement, ...]


def is_batched(regions: Regions, positive: Branch) -> bool:
    """Whether the guide region takes the one prediction apart."""
    return _guided(regions.guide, positive.result) is not None


def halves_first(regions: Regions, positive: Branch) -> bool:
    """Whether the guided statements begin by naming the halves: further calls there belong to the combination."""
    place = _guided(regions.guide, positive.result)
    guided = regions.guide[place] if place is not None else None
    return isinstance(guided, cst.If) and _split(body(guided)[0], positive.result) is not None


def batched_guidance(regions: Regions, positive: Branch, helpers: Mapping[str, cst.FunctionDef]) -> Batched | Unknown:
    """The two branches of one batched denoiser call."""
    place = _guided(regions.guide, positive.result)
    guided = regions.guide[place] if place is not None else None
    assert isinstance(guided, cst.If) and place is not None
    beside, between = _beside(regions.guide[:place], positive.result)
    process = (*positive.process, *between)
    if any(_splits_rows(s) for s in process):
        return Unknown("the batched prediction is taken apart before guidance is asked for")
    conditions = conditions_of(guided.test, [*regions.encode, *regions.predict])
    loop = undouble(regions.predict[:-1], conditions)
    if isinstance(loop, Unknown):
        return loop
    doubled = doubled_names(regions.encode, conditions, helpers)
    call = regions.predict[-1]
    reads = {n for s in (*loop.statements, call, *process) for n in reads_whole(s)}
    shared = {n: doubled[n] for n in sorted(reads & doubled.keys())}
    for name, value in shared.items():
        if isinstance(value, Unknown):
            return Unknown(f"{name} holds both branches: {value.reason}")
    two = frozenset(shared) | frozenset(loop.parts)
    if not two and _same_statements(loop.statements, regions.predict[:-1]):
        return Unknown("batched guidance, but nothing that the denoiser reads is doubled")
    if not loop.parts and all(isinstance(v, Doubled) and v.equal for v in shared.values()):
        return Unknown("batched guidance, but nothing that is followed differs between its branches")
    before, prepare = _separate(loop.statements, two)
    if (writes(beside) & live_before([*prepare, call, *process])) or (live_before(beside) & writes([*prepare, call])):
        return Unknown("what is computed beside the batched prediction can't be computed ahead of it")
    before += beside
    first = _first_is_negative(guided, positive.result, [*regions.encode, *regions.predict])
    if first is None:
        return Unknown("which half of the batched prediction is the conditional one is not known")
    guided = with_body(guided, _without_halving(body(guided), loop.halved - writes(prepare)))
    combined = _combined(guided, regions.guide[place + 1 :], positive.result, first)
    if isinstance(combined, Unknown):
        return combined
    used, after = combined
    lost = writes(used.statements) & (live_before(after) | live_before(regions.step)) - {used.result}
    if lost:
        return Unknown(f"{', '.join(sorted(lost))}, computed where the predictions are combined, is read after that")
    if guided.orelse is not None:
        unguided = _unguided_process(guided.orelse, positive.result)
        if isinstance(unguided, Unknown):
            return unguided
        process = (*process, *unguided)
    output = result_of(process) or positive.result
    if used.result != output:
        return Unknown("the guided prediction is stored under another name than the unguided one")
    own = [*prepare, *([call] if prepare else []), *process]
    lost = writes(own) & (live_before(after) | live_before(regions.step)) - {output}
    if lost:
        return Unknown(f"{', '.join(sorted(lost))}, computed for each branch, is read after them")
    arguments: Mapping[str, cst.BaseExpression] = positive.arguments
    if prepare:
        arguments = {n: cst.Name(n) for n in _ordered(live_before(own), own)}
    names = {n: _negative_name(n, [*regions.predict, *regions.guide]) for n in two}
    holes: dict[str, cst.BaseExpression] = {n: cst.Name(names[n]) for n in two}
    other = {n: substitute(v, holes) for n, v in arguments.items()}  # type: ignore[misc]
    again = tuple(n for n, v in arguments.items() if uses(v) & frozenset(shared))
    apart = [s for n, v in shared.items() for s in _halves(n, names[n], v, first)]  # type: ignore[arg-type]
    apart += [statement(f"{names[n]} = value", value=v) for n, v in loop.parts.items()]
    return Batched(
        tuple(before), replace(positive, arguments=arguments), guided.test,
        replace(positive, arguments=other, result=used.negative), tuple(apart), again, tuple(prepare), call, tuple(process),
        used, tuple(after),
    )  # fmt: skip


def _guided(statements: Sequence[cst.BaseStatement], result: str) -> int | None:
    for index, each in enumerate(statements):
        if isinstance(each, cst.If) and result in uses(each) and (result in writes([each]) or each.orelse is not None):
            return index
    return None


def _beside(
    statements: Sequence[cst.BaseStatement], result: str
) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement]]:
    """Statements that have nothing to do with the prediction (nor with one another's results), and the others."""
    apart = [s for s in statements if result not in uses(s) | writes([s])]
    others = [s for s in statements if result in uses(s) | writes([s])]
    if writes(apart) & live_before(others) or writes(others) & live_before(apart):
        return [], list(statements)
    return apart, others


def _same_statements(one: Sequence[cst.BaseStatement], other: Sequence[cst.BaseStatement]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _splits_rows(node: cst.BaseStatement) -> bool:
    """`x.chunk(2)` without an axis, below the node."""
    return any(
        isinstance(c.func, cst.Attribute) and c.func.attr.value == "chunk" and len(c.args) == 1
        for c in find(node, cst.Call)
    )


def _separate(
    statements: Sequence[cst.BaseStatement], two: frozenset[str]
) -> tuple[list[cst.BaseStatement], list[cst.BaseStatement]]:
    """Statements that both branches share, and those that each runs on its own half."""
    shared, own, names = [], [], set(two)
    for each in statements:
        if reads_whole(each) & names:
            own.append(each)
            names |= writes([each])
        else:
            shared.append(each)
    return shared, own


def _ordered(names: frozenset[str], where: Sequence[cst.BaseStatement]) -> list[str]:
    seen: dict[str, None] = {}
    for each in where:
        for node in find(each, cst.Name):
            if node.value in names:
                seen.setdefault(node.value)
    return list(seen)


def _negative_name(name: str, where: Sequence[cst.BaseStatement]) -> str:
    taken = {n for s in where for n in uses(s) | writes([s])}
    new = f"negative_{name}"
    while new in taken:
        new = f"{new}_half"
    return new


def _halves(name: str, negative: str, value: Doubled, negative_first: bool) -> list[cst.BaseStatement]:
    """Statements that cut a variable in two, the positive half under its own name."""
    axis = f", dim={value.dim}" if value.dim else ""
    if value.kind == "tensor":
        left, right = (negative, name) if negative_first else (name, negative)
        return [statement(f"{left}, {right} = {name}.chunk(2{axis})")]
    index = (0, 1) if negative_first else (1, 0)
    if value.kind == "list":
        text = "[each.chunk(2{axis})[{index}] for each in {name}]"
    else:
        text = "{{key: None if each is None else each.chunk(2{axis})[{index}] for key, each in {name}.items()}}"
    return [
        statement(f"{target} = " + text.format(axis=axis, index=i, name=name))
        for target, i in zip((negative, name), index, strict=True)
    ]


def _split(node: cst.BaseStatement, result: str) -> tuple[str, str] | None:
    """Names of the first and the second half in `a, b = result.chunk(2)`."""
    if not isinstance(node, cst.SimpleStatementLine) or not isinstance(node.body[0], cst.Assign):
        return None
    target, value = node.body[0].targets[0].target, node.body[0].value
    if not isinstance(target, cst.Tuple) or len(target.elements) != 2:
        return None
    wanted = (f"{result}.chunk(2)", f"{result}.chunk(2, dim=0)", f"{result}.chunk(2, 0)", f"torch·chunk({result}, 2)")
    if not any(same(value, expression(w)) for w in wanted):
        return None
    names = [e.value.value for e in target.elements if isinstance(e.value, cst.Name)]
    return (names[0], names[1]) if len(names) == 2 else None


def _is_negative(name: str) -> bool:
    return any(word in ("uncond", "neg", "negative", "unconditional", "null") for word in name.split("_"))


def _first_is_negative(guided: cst.If, result: str, where: Sequence[cst.BaseStatement]) -> bool | None:
    """Whether the first half is the unconditional one: by the formula, the names of the halves or what was joined."""
    inner = body(guided)
    halves = _split(inner[0], result)
    if halves is not None:
        for each in inner[1:]:
            if isinstance(each, cst.SimpleStatementLine) and isinstance(each.body[0], cst.Assign):
                if textbook_scale(each.body[0].value, halves[1], halves[0]) is not None:
                    return True
                if textbook_scale(each.body[0].value, halves[0], halves[1]) is not None:
                    return False
        marks = [_is_negative(h) for h in halves]
        if marks.count(True) == 1:
            return marks[0]
    for each in where:
        for call in [*find(each, cst.Call), *find(each, cst.BinaryOperation)]:
            parts = concatenated(call) if isinstance(call, cst.Call) else (call.left, call.right)
            if parts is not None:
                marks = [any(_is_negative(n) for n in uses(p)) for p in parts[:2]]
                if marks.count(True) == 1 and all(uses(p) for p in parts[:2]):
                    return marks[0]
    return None


def _without_halving(statements: Sequence[cst.BaseStatement], halved: frozenset[str]) -> list[cst.BaseStatement]:
    """Statements less `x, _ = x.chunk(2)` of an input: a branch has one half from the start."""
    return [s for s in statements if not any(_split(s, name) == (name, "_") for name in halved)]


def _combined(
    guided: cst.If, rest: Sequence[cst.BaseStatement], result: str, negative_first: bool
) -> tuple[Combination, list[cst.BaseStatement]] | Unknown:
    """The combination, with later statements that still read one branch's prediction, and the statements after it."""
    inner = body(guided)
    made = writes(inner) - {result, result_of(inner)}
    count = max((i + 1 for i, s in enumerate(rest) if uses(s) & made), default=0)
    moved = []
    for each in rest[:count]:
        if not isinstance(each, cst.If) or each.orelse is not None:
            return Unknown("one branch's prediction is read after the guided one is made")
        moved.append(_without_conjunct(each, guided.test))
    flat = [s for m in moved for s in (m if isinstance(m, list) else [m])]
    halves = _split(inner[0], result)
    if halves is not None:
        negative, positive = halves if negative_first else (halves[1], halves[0])
        statements = [*inner[1:], *flat]
    else:
        negative, positive = f"negative_{result}", f"positive_{result}"
        pair = f"{negative}, {positive}" if negative_first else f"{positive}, {negative}"
        statements = [statement(f"{result} = torch·cat([{pair}])"), *inner, *flat]
    made_result = result_of(statements)
    if made_result is None:
        return Unknown("the predictions are not combined")
    return combination(statements, positive, negative, made_result), list(rest[count:])


def _without_conjunct(node: cst.If, condition: cst.BaseExpression) -> cst.BaseStatement | list[cst.BaseStatement]:
    """A statement that runs when `condition` holds, inside a place where it does."""
    if same(node.test, condition):
        return body(node)
    test = node.test
    if isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.And):
        for one, other in ((test.left, test.right), (test.right, test.left)):
            if same(one, condition):
                return node.with_changes(test=other)
    return node


def _unguided_process(orelse: cst.If | cst.Else, result: str) -> tuple[cst.BaseStatement, ...] | Unknown:
    """What is done without guidance, if the guided branch may start from it as well: a renaming, or rows stacked."""
    statements = body(orelse)
    only = statements[0] if len(statements) == 1 else None
    if isinstance(only, cst.SimpleStatementLine) and isinstance(only.body[0], cst.Assign):
        value = only.body[0].value
        stacked = isinstance(value, cst.Call) and same(value.func, cst.Name("torch·stack"))
        if same(value, cst.Name(result)) or stacked:
            return (only,)
    return Unknown("without guidance the prediction is processed in another way")


__all__ = ["Batched", "batched_guidance", "halves_first", "is_batched"]
