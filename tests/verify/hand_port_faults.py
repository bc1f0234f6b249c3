"""Seeded wrong ports, continued: mistakes that the engine's hand ports have had, as its issue tracker tells.

The number in a docstring is the issue or pull request of vllm-omni where the mistake was found.
"""

from __future__ import annotations

import ast

from tests.verify.faults import Change, Fault, calls, local_norm, name_of, outputs_reversed, rewrite


# ------------------------------------------------------------------------------------------------ transformer
def text_length_of_the_mask(tree: ast.Module) -> int:
    """#4443: rotary positions of the text counted by the mask, not by the padded width."""
    found = 0
    for scope in ast.walk(tree):
        if isinstance(scope, ast.FunctionDef) and scope.name.endswith("_from_mask"):
            for node in ast.walk(scope):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 3:
                    first, second, _ = node.value.elts
                    if not isinstance(second, ast.Constant):
                        text = f"int({name_of(second)}.min())"
                        node.value.elts[0] = ast.parse(text, mode="eval").body
                        found += name_of(first) != text
    return found


def _packing(change: dict[str, str | None]) -> Change:
    """Other shards in `stacked_params_mapping`: shard -> shard, or None to leave its row out."""

    def apply(tree: ast.Module) -> int:
        found = 0
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.List):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if name_of(target) != "stacked_params_mapping":
                    continue
                rows = []
                for row in node.value.elts:
                    assert isinstance(row, ast.Tuple) and isinstance(row.elts[2], ast.Constant)
                    shard = str(row.elts[2].value)
                    found += shard in change
                    new = change.get(shard, shard)
                    if new is not None:
                        rows.append(
                            row if shard not in change else ast.Tuple([*row.elts[:2], ast.Constant(new)], ast.Load())
                        )
                node.value.elts = rows
        return found

    return apply


packed_in_another_order = _packing({"q": "k", "k": "q"})
shard_not_packed = _packing({"v": None})


def divided_cross_attention(node: ast.AST) -> ast.AST | None:
    """#6930: keys and values that every rank has in full are put together once per rank.

    Without a mask the repeated keys change no softmax; a mask is not repeated with them.
    """
    if isinstance(node, ast.Call):
        kept = [k for k in node.keywords if k.arg != "skip_sequence_parallel"]
        if len(kept) < len(node.keywords):
            node.keywords = kept
            return node
    return None


def odd_length_not_padded(node: ast.AST) -> ast.AST | None:
    """#672: a number of tokens that the ranks do not divide."""
    if isinstance(node, ast.keyword) and node.arg == "auto_pad":
        node.value = ast.Constant(False)
        return node
    return None


# ------------------------------------------------------------------------------------------------ requests
def filled_value_taken(node: ast.AST) -> ast.AST | None:
    """#5615: a value that the engine filled in is taken for the user's."""
    if isinstance(node, ast.IfExp) and name_of(node.test).endswith("guidance_scale_provided"):
        return node.body
    return None


def default_changed(tree: ast.Module) -> int:
    """#1235: a refactoring changes what an omitted argument means."""
    found = 0
    for scope in ast.walk(tree):
        if isinstance(scope, ast.FunctionDef) and scope.name == "prepare_generation":
            pairs = zip(scope.args.args[::-1], scope.args.defaults[::-1], strict=False)
            for argument, default in pairs:
                if argument.arg == "guidance_scale" and isinstance(default, ast.Constant):
                    default.value = 2 * default.value  # type: ignore[operator]
                    found += 1
    return found


def guidance_not_handed_on(node: ast.AST) -> ast.AST | None:
    """#922: the scale is read from the request and never reaches the transformer."""
    if calls("full", exact=True)(node) and any("guidance" in name_of(a) for a in node.args):  # type: ignore[attr-defined]
        node.args[1] = ast.Constant(1.0)  # type: ignore[attr-defined]
        return node
    return None


def noise_of_each_rank(node: ast.AST) -> ast.AST | None:
    """#1713: ranks draw noise of their own."""
    if isinstance(node, ast.Call) and name_of(node.func).endswith("randn_tensor"):
        for keyword in node.keywords:
            if keyword.arg == "generator":
                first = "not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0"
                keyword.value = ast.parse(f"{name_of(keyword.value)} if {first} else None", mode="eval").body
                return node
    return None


def one_scheduler_for_all(node: ast.AST) -> ast.AST | None:
    """Requests that run step by step share a scheduler, which counts its steps."""
    if calls("deepcopy", exact=True)(node) and name_of(node.args[0]) == "self.scheduler":  # type: ignore[attr-defined]
        return node.args[0]  # type: ignore[attr-defined]
    return None


def step_of_another_request(node: ast.AST) -> ast.AST | None:
    """Step execution predicts at the first timestep each time."""
    if isinstance(node, ast.Attribute) and node.attr == "current_timestep" and isinstance(node.ctx, ast.Load):
        return ast.parse(f"{name_of(node.value)}.timesteps[0]", mode="eval").body
    return None


def one_generator_for_a_batch(node: ast.AST) -> ast.AST | None:
    """A batch draws the noise of all its requests from the generator of the first."""
    if isinstance(node, ast.If) and name_of(node.test).startswith("name == 'generator'"):
        (statement,) = node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            statement.value = ast.Subscript(statement.value, ast.Constant(0), ast.Load())
            return node
    return None


WAN, FLUX, PIXART = "WanPipeline", "FluxPipeline", "PixArtSigmaPipeline"

HAND_PORT_FAULTS = (
    Fault("text positions counted by the mask", "module", ("masked-text",), "transformer", text_length_of_the_mask),
    Fault("query and key packed in another order", "module", ("no-mask",), "transformer", packed_in_another_order),
    Fault("a shard without a row of its own", "weights", ("no-mask",), "transformer", shard_not_packed),
    Fault("norm across heads of one rank", "tp", ("text-to-video",), "transformer", rewrite(local_norm), subject=WAN),
    Fault("cross attention divided over ranks", "sp", ("masked-text",), "transformer",
          rewrite(divided_cross_attention), subject=PIXART),
    Fault("odd length not padded", "sp", ("no-mask",), "transformer", rewrite(odd_length_not_padded)),
    Fault("filled value taken for the user's", "pipeline", ("defaults-omitted",), "pipeline",
          rewrite(filled_value_taken), subject=FLUX),
    Fault("default changed", "pipeline", ("defaults-omitted",), "pipeline", default_changed, subject=FLUX),
    Fault("guidance not handed on", "pipeline", ("guidance_scale=7.0",), "pipeline", rewrite(guidance_not_handed_on),
          subject=FLUX),
    Fault("noise of each rank", "cfg", (), "pipeline", rewrite(noise_of_each_rank)),
    Fault("one scheduler for all requests", "step", (), "pipeline", rewrite(one_scheduler_for_all)),
    Fault("timestep of another step", "step", (), "pipeline", rewrite(step_of_another_request)),
    Fault("requests of a batch in another order", "batch", (), "pipeline", outputs_reversed),
    Fault("one generator for a batch", "batch", (), "pipeline", rewrite(one_generator_for_a_batch)),
)  # fmt: skip
