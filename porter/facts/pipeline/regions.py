"""The five regions of `__call__`: encode, predict, guide, step, decode.

The cuts are found by what the statements do: a loop that calls a denoiser and steps a scheduler is the denoising loop;
inside it the first denoiser call begins the prediction, and the statement that steps the scheduler ends the guidance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import libcst as cst
from msgspec import Struct

from porter.facts.pipeline.liveness import names_of
from porter.model import Unknown
from porter.source.tree import body, children, find, self_attribute


class Loop(Struct, frozen=True):
    """The denoising loop: `for index, timestep in enumerate(iterable)`; `index` is None if it is not counted."""

    node: cst.For
    index: str | None
    timestep: str
    iterable: cst.BaseExpression


class Regions(Struct, frozen=True):
    """Statements of each region in order. `predict` ends before the first statement after the first denoiser call."""

    encode: tuple[cst.BaseStatement, ...]
    loop: Loop
    predict: tuple[cst.BaseStatement, ...]
    guide: tuple[cst.BaseStatement, ...]
    step: tuple[cst.BaseStatement, ...]
    decode: tuple[cst.BaseStatement, ...]

    @property
    def denoise(self) -> tuple[cst.BaseStatement, ...]:
        """One round of the loop."""
        return (*self.predict, *self.guide, *self.step)


def regions(statements: Sequence[cst.BaseStatement], denoisers: Collection[str]) -> Regions | Unknown:
    """Cut the statements of a (cleaned) `__call__`. `denoisers` are component names."""
    flat = unwrap_progress(statements)
    places = [i for i, s in enumerate(flat) if isinstance(s, cst.For) and _denoises(s, denoisers)]
    if not places:
        nested = any(_denoises(s, denoisers) for s in flat)
        return Unknown(
            "the denoising loop stands inside another statement"
            if nested
            else "no loop calls a denoiser and a scheduler"
        )
    if len(places) > 1:
        return Unknown(f"{len(places)} loops call a denoiser")
    loop = _loop(flat[places[0]])
    if isinstance(loop, Unknown):
        return loop
    inner = body(loop.node)
    aliases = model_aliases(flat, denoisers)
    if any(isinstance(s, (cst.For, cst.While)) and _denoises(s, denoisers) for s in inner):
        return Unknown("the denoising loop stands inside another loop")
    if any(_jumps(s) for s in inner):
        return Unknown("a round of the loop may end early")
    first = next((i for i, s in enumerate(inner) if any(denoiser_calls(s, denoisers, aliases))), None)
    last = next((i for i, s in enumerate(inner) if steps_scheduler(s)), None)
    if first is None or last is None or last <= first:
        return Unknown("the loop does not call the denoiser before it steps the scheduler")
    if sum(1 for s in inner if steps_scheduler(s)) > 1:
        return Unknown("the loop steps the scheduler in more than one place")
    return Regions(
        tuple(flat[: places[0]]),
        loop,
        tuple(inner[: first + 1]),
        tuple(inner[first + 1 : last]),
        tuple(inner[last:]),
        tuple(flat[places[0] + 1 :]),
    )


def _jumps(statement: cst.CSTNode) -> bool:
    """Whether a statement of a loop's body may leave the round: `continue`, `break` or `return`, not of a loop inside."""
    if isinstance(statement, (cst.Continue, cst.Break, cst.Return)):
        return True
    if isinstance(statement, (cst.For, cst.While)):
        return any(True for _ in find(statement, cst.Return))
    return not isinstance(statement, cst.FunctionDef) and any(_jumps(c) for c in children(statement))


def unwrap_progress(statements: Sequence[cst.BaseStatement]) -> list[cst.BaseStatement]:
    """`with self.progress_bar(...) as bar:` around the loop is only display."""
    flat: list[cst.BaseStatement] = []
    for statement in statements:
        if isinstance(statement, cst.With) and all(is_progress(i.item) for i in statement.items):
            inner = body(statement)
            if inner and statement.leading_lines:
                inner[0] = inner[0].with_changes(leading_lines=[*statement.leading_lines, *inner[0].leading_lines])
            flat += inner
        else:
            flat.append(statement)
    return flat


def is_progress(node: cst.BaseExpression) -> bool:
    """Whether an expression is a call of the pipeline's progress bar."""
    return isinstance(node, cst.Call) and self_attribute(node.func) == "progress_bar"


def _loop(node: cst.BaseStatement) -> Loop | Unknown:
    assert isinstance(node, cst.For)
    iterable, index = node.iter, None
    target: cst.BaseExpression = node.target
    if isinstance(iterable, cst.Call) and not iterable.args:
        return Unknown("the loop runs over a call without arguments")
    if isinstance(iterable, cst.Call) and isinstance(iterable.func, cst.Name) and iterable.func.value == "enumerate":
        iterable = iterable.args[0].value
        if not isinstance(target, cst.Tuple) or len(target.elements) != 2:
            return Unknown("enumerate without an index and a timestep")
        index = next(iter(names_of(target.elements[0].value)), None)
        target = target.elements[1].value
    if isinstance(iterable, cst.Call) and not iterable.args:
        return Unknown("the loop runs over a call without arguments")
    if is_progress(iterable) or (isinstance(iterable, cst.Call) and _ends_with(iterable.func, "tqdm")):
        iterable = iterable.args[0].value  # type: ignore[union-attr]
    if not isinstance(target, cst.Name):
        return Unknown("the loop runs over more than timesteps")
    return Loop(node, index, target.value, iterable)


def _ends_with(node: cst.BaseExpression, name: str) -> bool:
    return isinstance(node, cst.Name) and node.value.endswith(name)


def _denoises(node: cst.BaseStatement, denoisers: Collection[str]) -> bool:
    return steps_scheduler(node) and any(
        True for _ in denoiser_calls(node, denoisers, model_aliases([node], denoisers))
    )


def model_aliases(statements: Sequence[cst.CSTNode], denoisers: Collection[str]) -> frozenset[str]:
    """Locals that hold a denoiser itself: `current_model = self.transformer if ... else self.transformer_2`."""
    found: set[str] = set()
    for statement in statements:
        for assign in find(statement, cst.Assign):
            if any(True for _ in find(assign.value, cst.Call)):
                continue
            values = [assign.value]
            if isinstance(assign.value, cst.IfExp):
                values = [assign.value.body, assign.value.orelse]
            if any(self_attribute(v) in denoisers for v in values):
                found |= {n for t in assign.targets for n in names_of(t.target)}
    return frozenset(found)


def denoiser_calls(node: cst.CSTNode, denoisers: Collection[str], aliases: Collection[str] = ()) -> Iterator[cst.Call]:
    """Calls of `self.<denoiser>(...)`, or of a local that holds one, below the node."""
    for call in find(node, cst.Call):
        if self_attribute(call.func) in denoisers or (isinstance(call.func, cst.Name) and call.func.value in aliases):
            yield call


def _step_calls(node: cst.CSTNode) -> Iterator[cst.Call]:
    for call in find(node, cst.Call):
        if isinstance(call.func, cst.Attribute) and call.func.attr.value == "step":
            owner = call.func.value
            name = self_attribute(owner) or (owner.value if isinstance(owner, cst.Name) else "")
            if "scheduler" in (name or ""):
                yield call


def steps_scheduler(node: cst.CSTNode) -> bool:
    """Whether `<...scheduler>.step(...)` is called below the node."""
    return any(True for _ in _step_calls(node))
