"""Seeded wrong ports: each fault is one small change of a port's syntax tree that real hand ports have had.

A fault finds its place by pattern, not by exact text, so it works on any port of the same kind. `seed` returns the
number of places changed; zero means that the port has no such place.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Change = Callable[[ast.Module], int]


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake. `files` says which files it may be in; `rung` and `cases` are where it must be caught.

    `once`: only in the first file that has a place for it. `joint`: matters only where a port serves several requests
    with several outputs each in one call. `subject`: the pipeline whose port is made wrong, the usual one if empty.
    """

    name: str
    rung: str
    cases: tuple[str, ...]
    files: str
    change: Change
    once: bool = False
    joint: bool = False
    subject: str = ""


def seed(generated: Path, folder: str, out: Path, fault: Fault) -> int:
    """Copy `generated` to `out` with the fault in `folder`. Returns how many places were changed."""
    shutil.copytree(generated, out, ignore=shutil.ignore_patterns("__pycache__"))
    places = 0
    for path, tree, found in changed(out / folder, fault):
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
        places += found
    return places


def changed(folder: Path, fault: Fault) -> Iterator[tuple[Path, ast.Module, int]]:
    """Files of a folder that have places for the fault: their trees with it, and how many places they are."""
    for path in sorted(folder.glob("*.py")):
        is_pipeline = path.name.startswith("pipeline") or path.name.startswith("cfg")
        if fault.files not in ("any", "pipeline" if is_pipeline else "transformer"):
            continue
        tree = ast.parse(path.read_text())
        if found := fault.change(tree):
            yield path, tree, found
            if fault.once:
                return


def name_of(node: ast.expr) -> str:
    """Dotted name of an expression, or ""."""
    try:
        return ast.unparse(node)
    except (AttributeError, ValueError):
        return ""


def rewrite(visit: Callable[[ast.AST], ast.AST | None]) -> Change:
    """A change that replaces every node for which `visit` returns another one."""

    def change(tree: ast.Module) -> int:
        count = 0

        class Rewriter(ast.NodeTransformer):
            def generic_visit(self, node: ast.AST) -> ast.AST:
                nonlocal count
                super().generic_visit(node)
                new = visit(node)
                if new is None:
                    return node
                count += 1
                return new

        Rewriter().visit(tree)
        return count

    return change


def calls(part: str, *, exact: bool = False) -> Callable[[ast.AST], bool]:
    """Whether a node is a call of something whose name contains `part`."""

    def test(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        name = name_of(node.func)
        return name.rsplit(".", 1)[-1] == part if exact else part in name.lower()

    return test


# ------------------------------------------------------------------------------------------------ attention
def swap_key_and_value(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Call) or not name_of(node.func).startswith("self."):
        return None
    names = [name_of(a).lower() for a in node.args[:3]]
    if len(names) == 3 and "k" in names[1] and "v" in names[2] and "q" in names[0] and "attn" in name_of(node.func):
        node.args[1], node.args[2] = node.args[2], node.args[1]
        return node
    keywords = {k.arg: k for k in node.keywords}
    if "attn" in name_of(node.func) and {"key", "value"} <= set(keywords):
        keywords["key"].value, keywords["value"].value = keywords["value"].value, keywords["key"].value
        return node
    return None


def drop_mask(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and name_of(node.func).endswith("AttentionMetadata"):
        masks = [k for k in node.keywords if k.arg and "mask" in k.arg and not isinstance(k.value, ast.Constant)]
        for keyword in masks:
            keyword.value = ast.Constant(None)
        return node if masks else None
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(t, ast.Attribute) and t.attr in ("attn_mask", "joint_attn_mask") for t in targets):
            node.value = ast.Constant(None)
            return node
    return None


def wrong_softmax_scale(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.keyword) and node.arg == "softmax_scale":
        node.value = ast.BinOp(node.value, ast.Mult(), ast.Constant(1.25))
        return node
    return None


def skip_rotary(node: ast.AST) -> ast.AST | None:
    """`query = rope(query, ...)` becomes `query = query`, and `rotate(norm_q(query))` becomes `norm_q(query)`."""
    if isinstance(node, ast.Call) and name_of(node.func) == "rotate" and len(node.args) == 1:
        return node.args[0]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args:
        called = name_of(node.value.func).lower()
        target, first = node.targets[0], node.value.args[0]
        if ("rope" in called or "rotary" in called) and not {"embed", "shard"} & set(
            called.rpartition(".")[2].split("_")
        ):
            if name_of(target) == name_of(first):
                node.value = first
                return node
            if isinstance(target, ast.Tuple) and len(target.elts) == 2:
                given = [a for a in node.value.args if name_of(a) in {name_of(e) for e in target.elts}]
                if len(given) == 2:
                    node.value = ast.Tuple(given, ast.Load())
                    return node
    return None


def unsharded_rotary(node: ast.AST) -> ast.AST | None:
    """Drop the rotary table's entries from the sequence-parallel plan."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if name_of(target) == "_sp_plan" and isinstance(node.value, ast.Dict):
            kept = [
                (k, v)
                for k, v in zip(node.value.keys, node.value.values, strict=True)
                if not any(w in name_of(k).lower() for w in ("rope", "pos_embed", "rotary"))
            ]
            if len(kept) < len(node.value.keys):
                node.value = ast.Dict([k for k, _ in kept], [v for _, v in kept])
                return node
    return None


def regions_left_open(node: ast.AST) -> ast.AST | None:
    """Divide the tables' outputs, too: the engine's count of open regions grows with every call."""
    if isinstance(node, ast.Dict) and len(node.keys) == 1 and name_of(node.keys[0]) == "'input'":
        given = node.values[0]
        specs = given.elts if isinstance(given, ast.List) else [given]
        for spec in specs:
            spec.keywords.append(ast.keyword("split_output", ast.Constant(True)))
        return ast.Dict([ast.Constant(i) for i in range(len(specs))], list(specs))
    return None


def table_in_default_dtype(node: ast.AST) -> ast.AST | None:
    """`.to(torch.float32)` becomes the dtype in which the engine builds models: right in float32 alone."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith(".to") and len(node.args) == 1:
        if name_of(node.args[0]) == "torch.float32":
            node.args = [ast.parse("torch.get_default_dtype()", mode="eval").body]
            return node
    return None


def buffer_as_computed(node: ast.AST) -> ast.AST | None:
    """A buffer of the checkpoint keeps the dtype in which the constructor computed it."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith("buffer.data.to"):
        return ast.parse("buffer.data", mode="eval").body
    return None


def shared_guider(node: ast.AST) -> ast.AST | None:
    """Requests that take turns share the pipeline's guider, and what it keeps from step to step."""
    if isinstance(node, ast.Call) and name_of(node.func) == "copy.deepcopy" and "guider" in ast.unparse(node):
        return node.args[0]
    return None


# ------------------------------------------------------------------------------------------------ blocks
def drop_residual(tree: ast.Module) -> int:
    """The first `x = x + ...` of the first block class loses its x."""
    for cls in ast.walk(tree):
        if isinstance(cls, ast.ClassDef) and "Block" in cls.name:
            for node in ast.walk(cls):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                    value = node.value
                    if isinstance(value.op, ast.Add) and name_of(value.left) == name_of(node.targets[0]):
                        node.value = value.right
                        return 1
    return 0


def wrong_epsilon(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.keyword) and node.arg == "eps" and isinstance(node.value, (ast.Constant, ast.Name)):
        node.value = ast.Constant(0.05)
        return node
    return None


def swap_shift_and_scale(node: ast.AST) -> ast.AST | None:
    """`shift, scale, gate = mod.chunk(3)` becomes `scale, shift, gate = ...`."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Call):
        if name_of(node.value.func).rsplit(".", 1)[-1] not in ("chunk", "unbind", "split"):
            return None
        names = [name_of(e).lower() for e in node.targets[0].elts]
        pairs = [i for i in range(len(names) - 1) if "shift" in names[i] and "scale" in names[i + 1]]
        pairs += [i for i in range(len(names) - 1) if "scale" in names[i] and "shift" in names[i + 1]]
        for i in pairs:
            elts = node.targets[0].elts
            elts[i], elts[i + 1] = elts[i + 1], elts[i]
        return node if pairs else None
    return None


# ------------------------------------------------------------------------------------------------ weights
def _in_load_weights(code: str) -> Change:
    """Insert statements at the start of every `load_weights` of a module (not of a pipeline)."""

    def change(tree: ast.Module) -> int:
        found = 0
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "load_weights":
                source = node.args.args[1].arg
                at = 1 if ast.get_docstring(node) else 0
                node.body[at:at] = ast.parse(code.replace("WEIGHTS", source)).body
                found += 1
        return found

    return change


skip_a_weight = _in_load_weights("WEIGHTS = [(n, w) for n, w in WEIGHTS if not n.endswith('norm_q.weight')]")
ignore_unknown = _in_load_weights("WEIGHTS = [(n, w) for n, w in WEIGHTS if not n.startswith('porter.')]")
swap_two_weights = _in_load_weights(
    "WEIGHTS = [(n.replace('norm_q', 'norm_#').replace('norm_k', 'norm_q').replace('norm_#', 'norm_k'), w)"
    " for n, w in WEIGHTS]"
)


# ------------------------------------------------------------------------------------------------ parallel
def _row_parallel(body: str) -> Change:
    """Replace RowParallelLinear by a subclass whose forward has `body` (y is the right result)."""

    def change(tree: ast.Module) -> int:
        imported = next(
            (
                i
                for i, n in enumerate(tree.body)
                if isinstance(n, ast.ImportFrom) and any(a.name == "RowParallelLinear" for a in n.names)
            ),
            None,
        )
        if imported is None:
            return 0
        code = (
            "_Right = RowParallelLinear\n"
            "class RowParallelLinear(_Right):\n"
            "    def forward(self, x):\n"
            "        out = super().forward(x)\n"
            "        y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)\n"
            f"        {body}\n"
            "        return y if rest is None else (y, *rest)\n"
        )
        last = max(i for i, n in enumerate(tree.body) if isinstance(n, (ast.Import, ast.ImportFrom)))
        tree.body[last + 1 : last + 1] = ast.parse(code).body
        return 1

    return change


bias_on_every_rank = _row_parallel("y = y if self.bias is None else y + (self.tp_size - 1) * self.bias")
not_reduced = _row_parallel("y = y / self.tp_size")


def local_norm(node: ast.AST) -> ast.AST | None:
    """A norm across heads that forgets the other ranks."""
    if isinstance(node, ast.Call) and "all_reduce" in name_of(node.func) and node.args:
        return node.args[0]
    return None


# ------------------------------------------------------------------------------------------------ pipeline
def timestep_scale(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (ast.Div, ast.Mult)):
        return None
    if isinstance(node.right, ast.Constant) and node.right.value in (1000, 1000.0):
        node.right = ast.Constant(500.0)
        return node
    return None


def schedule_off_by_one(node: ast.AST) -> ast.AST | None:
    """`linspace(1.0, 1 / n, n)` becomes `linspace(1.0, 1 / (n + 1), n)`."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith("linspace") and len(node.args) >= 3:
        node.args[1] = ast.BinOp(ast.Constant(1), ast.Div(), ast.BinOp(node.args[2], ast.Add(), ast.Constant(1)))
        return node
    return None


def lost_guidance_norm(node: ast.AST) -> ast.AST | None:
    """Guidance without the norm rescale: the keyword says no, and an override does nothing."""
    if isinstance(node, ast.keyword) and node.arg == "cfg_normalize":
        node.value = ast.Constant(False)
        return node
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
        text = name_of(node.value)
        if "norm" in text and "/" in text and "comb" in text:
            comb = next((n for n in ast.walk(node.value) if isinstance(n, ast.Name) and "comb" in n.id), None)
            if comb is not None:
                node.value = comb
                return node
    return None


def default_swallows_zero(node: ast.AST) -> ast.AST | None:
    """`x if x is not None else d` becomes `x or d`: an explicit 0 turns into the default."""
    if isinstance(node, ast.comprehension):
        tests = [t for t in node.ifs if isinstance(t, ast.Compare) and name_of(t).endswith("is not None")]
        if tests:
            node.ifs = [t.left if t in tests else t for t in node.ifs]
            return node
    if not isinstance(node, (ast.IfExp, ast.If)) or not isinstance(node.test, ast.Compare):
        return None
    test = node.test
    if "scale" not in name_of(test.left) or name_of(test.comparators[0]) != "None":
        return None
    if isinstance(node, ast.IfExp) and isinstance(test.ops[0], ast.IsNot) and name_of(node.body) == name_of(test.left):
        return ast.BoolOp(ast.Or(), [node.body, node.orelse])
    if isinstance(node, ast.If) and isinstance(test.ops[0], ast.Is):
        node.test = ast.UnaryOp(ast.Not(), test.left)
        return node
    return None


def empty_negative_is_none(node: ast.AST) -> ast.AST | None:
    """`negative_prompt is not None` becomes its truth value: "" no longer counts."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or name_of(node.comparators[0]) != "None":
        return None
    left = name_of(node.left)
    if "negative_prompt" not in left or "embeds" in left:
        return None
    truth = ast.parse(f"(any({left}) if isinstance({left}, list) else bool({left}))", mode="eval").body
    return truth if isinstance(node.ops[0], ast.IsNot) else ast.UnaryOp(ast.Not(), truth)


def _permute(function: str, first: int, second: int) -> Change:
    """Exchange two axes of the permute in functions whose name contains `function`."""

    def change(tree: ast.Module) -> int:
        found = 0
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef) and function in scope.name:
                for node in ast.walk(scope):
                    if isinstance(node, ast.Call) and name_of(node.func).endswith("permute") and len(node.args) >= 6:
                        node.args[first], node.args[second] = node.args[second], node.args[first]
                        found += 1
        return found

    return change


pack_order = _permute("_pack_latents", 1, 2)
unpack_order = _permute("unpack", -1, -3)


def batch_order(node: ast.AST) -> ast.AST | None:
    """`x.repeat(1, n, 1)` becomes `x.repeat(n, 1, 1)`: copies ABAB instead of AABB."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "repeat":
        shape = [name_of(a) for a in node.args]
        if len(shape) in (2, 3) and shape[0] == "1" and not shape[1].isdigit():
            node.args[0], node.args[1] = node.args[1], node.args[0]
            new = ast.Call(ast.Attribute(node, "reshape", ast.Load()), [], [])
            first = ast.parse(f"{name_of(node.func.value)}.shape[0]", mode="eval").body
            second = ast.parse(f"{name_of(node.func.value)}.shape[1] * ({shape[1]})", mode="eval").body
            rest = [ast.Constant(-1)] if len(shape) == 3 else []
            new.args = [first, second, *rest]
            return new
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "repeat_interleave":
        node.func.attr = "tile"
        node.args = [ast.Tuple([node.args[0], ast.Constant(1), ast.Constant(1)], ast.Load())]
        node.keywords = []
        return node
    return None


def outputs_reversed(tree: ast.Module) -> int:
    """A batch gives its outputs in the opposite order of its requests."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "forward" and "RequestBatch" in ast.unparse(node.args):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    inner.value = ast.Subscript(inner.value, ast.Slice(step=ast.Constant(-1)), ast.Load())
                    found += 1
    return found


def settings_not_compared(node: ast.AST) -> ast.AST | None:
    """Requests share a call whatever their settings are."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith(("array_equal", "same_value")):
        return ast.Constant(True)
    return None


def other_noise(node: ast.AST) -> ast.AST | None:
    """Noise that ignores the request's generator."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith("randn_tensor"):
        kept = [k for k in node.keywords if k.arg != "generator"]
        if len(kept) < len(node.keywords):
            node.keywords = kept
            return node
    return None


def guidance_sign(node: ast.AST) -> ast.AST | None:
    """Exchange the positive and the negative branch."""
    if isinstance(node, ast.Call) and "predict_noise" in name_of(node.func):
        places = [i for i, a in enumerate(node.args) if name_of(a) in ("positive_kwargs", "negative_kwargs")]
        if len(places) == 2:
            i, j = places
            node.args[i], node.args[j] = node.args[j], node.args[i]
            return node
        words = {k.arg: k for k in node.keywords}
        if {"positive_kwargs", "negative_kwargs"} <= set(words):
            a, b = words["positive_kwargs"], words["negative_kwargs"]
            a.value, b.value = b.value, a.value
            return node
    return None


def _in_pre_processing(change: Callable[[ast.FunctionDef], int]) -> Change:
    """A change of the pre-process function's factory alone, not of what the worker does without it."""

    def apply(tree: ast.Module) -> int:
        found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.endswith("_pre_process_func")]
        return sum(map(change, found))

    return apply


def picture_in_another_range(factory: ast.FunctionDef) -> int:
    """The engine process prepares pictures in [0, 1]."""
    built = [n.value for n in factory.body if isinstance(n, ast.Assign) and name_of(n.targets[0]) == "image_processor"]
    for call in built:
        if isinstance(call, ast.Call):
            call.keywords.append(ast.keyword("do_normalize", ast.Constant(False)))
    return len(built)


def nothing_prepared(factory: ast.FunctionDef) -> int:
    """The engine process prepares nothing, and nobody notices, as the worker does it then."""
    functions = [n for n in factory.body if isinstance(n, ast.FunctionDef) and n.name == "prepare_media"]
    for function in functions:
        function.body = [ast.Return(ast.Dict([], []))]
    return len(functions)


PICTURES = "FluxInpaintPipeline"


def shared_branches(node: ast.AST) -> ast.AST | None:
    """Cache-DiT takes the branches of guidance for steps."""
    return ast.Constant(False) if isinstance(node, ast.Compare) and name_of(node) == "calls == 2" else None


def always_two_branches(node: ast.AST) -> ast.AST | None:
    """A step without guidance counts as one with it."""
    return ast.Constant(2) if isinstance(node, ast.IfExp) and name_of(node) == "2 if do_true_cfg else 1" else None


def loops_go_on(node: ast.AST) -> ast.AST | None:
    """A loop of steps starts with what the loop before left to Cache-DiT."""
    begins = isinstance(node, ast.Expr) and name_of(node).startswith("begin_anew(")
    return ast.Pass() if begins else None


FAULTS = (
    Fault("key and value swapped", "module", ("no-mask",), "transformer", rewrite(swap_key_and_value)),
    Fault("mask dropped", "module", ("masked-text",), "transformer", rewrite(drop_mask)),
    Fault("softmax scale wrong", "module", ("no-mask",), "transformer", rewrite(wrong_softmax_scale)),
    Fault("rotary skipped", "module", ("no-mask",), "transformer", rewrite(skip_rotary)),
    Fault("residual dropped", "module", ("no-mask",), "transformer", drop_residual),
    Fault("norm epsilon wrong", "module", ("no-mask",), "transformer", rewrite(wrong_epsilon)),
    Fault("shift and scale swapped", "module", ("no-mask",), "transformer", rewrite(swap_shift_and_scale)),
    Fault("query and key norm swapped", "module", ("no-mask",), "transformer", swap_two_weights,
          once=True),
    Fault("a weight silently skipped", "weights", ("no-mask",), "transformer", skip_a_weight),
    Fault("an unknown name ignored", "weights", ("no-mask",), "transformer", ignore_unknown),
    Fault("rotary table in the default dtype", "bf16", ("no-mask",), "transformer", rewrite(table_in_default_dtype)),
    Fault("buffer in another dtype", "bf16", ("plain",), "transformer", rewrite(buffer_as_computed),
          subject="StableDiffusion3Pipeline"),
    Fault("bias added on every rank", "tp", ("no-mask",), "transformer", bias_on_every_rank),
    Fault("partial sums lost", "tp", ("no-mask",), "transformer", not_reduced),
    Fault("regions left open", "sp", ("no-mask",), "transformer", rewrite(regions_left_open)),
    Fault("rotary table unsharded", "sp", ("no-mask",), "transformer", rewrite(unsharded_rotary)),
    Fault("guider shared by requests", "step", (), "pipeline", rewrite(shared_guider), subject="HunyuanImagePipeline"),
    Fault("branches share what Cache-DiT reuses", "cache", (), "pipeline", rewrite(shared_branches)),
    Fault("branches share it and texts are as long", "cache", (), "pipeline", rewrite(shared_branches),
          subject="StableDiffusion3Pipeline"),
    Fault("unguided requests cached as guided ones", "cache", (), "pipeline", rewrite(always_two_branches)),
    Fault("requests of a batch share what Cache-DiT reuses", "cache", (), "pipeline", rewrite(loops_go_on)),
    Fault("timestep scaled wrong", "pipeline", ("plain",), "any", rewrite(timestep_scale)),
    Fault("schedule off by one", "pipeline", ("plain",), "pipeline", rewrite(schedule_off_by_one)),
    Fault("guidance norm lost", "pipeline", ("negative-prompt",), "any", rewrite(lost_guidance_norm)),
    Fault("guidance branches swapped", "pipeline", ("negative-prompt",), "any", rewrite(guidance_sign)),
    Fault("explicit zero swallowed", "pipeline", ("true_cfg_scale=0.0,negative=text",), "pipeline",
          rewrite(default_swallows_zero)),
    Fault("empty negative prompt taken for none", "pipeline", ("true_cfg_scale=3.0,negative=empty",), "pipeline",
          rewrite(empty_negative_is_none)),
    Fault("latents packed in the wrong order", "pipeline", ("plain",), "pipeline", pack_order),
    Fault("latents unpacked in the wrong order", "pipeline", ("plain",), "pipeline", unpack_order),
    Fault("copies in the order ABAB", "pipeline", ("two-", "everything"), "pipeline", rewrite(batch_order),
          joint=True),
    Fault("outputs of a batch in another order", "pipeline", ("two-prompts",), "pipeline", outputs_reversed),
    Fault("requests of other settings in one call", "batch", ("other-settings",), "pipeline",
          rewrite(settings_not_compared)),
    Fault("pictures prepared in another range", "pipeline", ("plain",), "pipeline",
          _in_pre_processing(picture_in_another_range), subject=PICTURES),
    Fault("pictures left to the worker", "pipeline", ("plain",), "pipeline",
          _in_pre_processing(nothing_prepared), subject=PICTURES),
    Fault("noise without the request's generator", "pipeline", ("plain",), "pipeline", rewrite(other_noise)),
)  # fmt: skip
