"""How far the outputs of the sides are from each other, over cases, blocks and steps; and small pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.bench.sides import REFERENCE, SIDES
from porter.verify.compare import difference

if TYPE_CHECKING:
    import torch

PICTURE = 96
"""Longest side of a picture of an output, in pixels."""


def agreement(folder: Path, cases: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """{case: {side: {other side: relative L2 error}}}; the reference is one of the others."""
    import torch

    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        files = {name: folder / f"{name}@{case}.pt" for name in (REFERENCE.name, *SIDES)}
        outputs = {name: torch.load(path, weights_only=True) for name, path in files.items() if path.is_file()}
        found[case] = {
            side: {other: difference(got, want)["rel_l2"] for other, want in outputs.items() if other != side}
            for side, got in outputs.items()
            if side != REFERENCE.name
        }
    return found


def growth(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Errors against the reference: {layers: {side: [[block, error]]}, steps: {side: [error]}}."""
    import torch

    grown: dict[str, dict[str, list[Any]]] = {"layers": {}, "steps": {}}
    reference = folder / f"{REFERENCE.name}.layers.pt"
    walked = folder / f"{REFERENCE.name}.walk.pt"
    for side in SIDES:
        layers, walk = folder / f"{side}.layers.pt", folder / f"{side}.walk.pt"
        if layers.is_file() and reference.is_file():
            got, want = torch.load(layers, weights_only=True), torch.load(reference, weights_only=True)
            grown["layers"][side] = [[n, difference(got[n], want[n])["rel_l2"]] for n in want if n in got]
        if walk.is_file() and walked.is_file():
            pair = zip(torch.load(walk, weights_only=True), torch.load(walked, weights_only=True), strict=False)
            grown["steps"][side] = [difference(a, b)["rel_l2"] for a, b in pair]
    return grown


def first_divergence(grown: dict[str, Any], side: str, baseline: str, factor: float = 2.0) -> str | None:
    """The first block whose error is more than `factor` times the baseline's; None where there is none."""
    own, other = grown.get("layers", {}).get(side, []), dict(grown.get("layers", {}).get(baseline, []))
    for block, error in own:
        if block in other and not error <= factor * other[block] + 1e-6:
            return block
    return None


def pictures(folder: Path, case: str) -> dict[str, Any]:
    """Three channels of the output of a case as pixels, by side, and what differs from the reference.

    {reference: pixels, side: {output: pixels, difference: pixels, scale: largest difference shown}}
    """
    import torch

    path = folder / f"{REFERENCE.name}@{case}.pt"
    if not path.is_file():
        return {}
    want = _image(torch.load(path, weights_only=True))
    if want is None:
        return {}
    low, high = want.quantile(0.01), want.quantile(0.99)
    shown: dict[str, Any] = {"reference": _pixels((want - low) / (high - low + 1e-12))}
    for side in SIDES:
        file = folder / f"{side}@{case}.pt"
        if not file.is_file():
            continue
        got = _image(torch.load(file, weights_only=True))
        if got is None or got.shape != want.shape:
            continue
        apart = (got - want).abs()
        scale = apart.max().item()
        shown[side] = {"output": _pixels((got - low) / (high - low + 1e-12)), "scale": scale,
                       "difference": _pixels(apart / (scale or 1.0))}  # fmt: skip
    return shown


def _image(output: torch.Tensor) -> torch.Tensor | None:
    """[rows, columns, 3] of the first item: of a latent (channels first, middle frame) or of packed tokens."""
    item = output[0].float()
    if item.dim() == 4:
        frames_first = item.shape[0] > item.shape[1]
        item = item[item.shape[0] // 2] if frames_first else item[:, item.shape[1] // 2]
    elif item.dim() == 2:
        width = max(d for d in range(1, int(item.shape[0] ** 0.5) + 1) if item.shape[0] % d == 0)
        item = item.T.reshape(item.shape[1], width, -1)
    if item.dim() != 3 or item.shape[0] < 1:
        return None
    item = item[[0, 1 % item.shape[0], 2 % item.shape[0]]].permute(1, 2, 0)
    step = max(1, -(-max(item.shape[:2]) // PICTURE))
    return item[::step, ::step].contiguous()


def _pixels(image: torch.Tensor) -> dict[str, Any]:
    """{rows, columns, rgb}: 8-bit values in base64."""
    import base64

    import torch

    values = (image.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1).tolist()
    return {"rows": image.shape[0], "columns": image.shape[1], "rgb": base64.b64encode(bytes(values)).decode()}
