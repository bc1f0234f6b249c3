"""How far what the sides gave is from each other."""

from __future__ import annotations

from pathlib import Path

from porter.bench.sides import SIDES
from porter.verify.compare import difference


def agreement(folder: Path, cases: list[str]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{case: {side: {other side: {latents, decoded}}}}, relative L2; infinite where the shapes differ."""
    import torch

    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for case in cases:
        files = {name: folder / f"{name}@{case}.pt" for name in SIDES}
        given = {name: torch.load(path, weights_only=True) for name, path in files.items() if path.is_file()}
        found[case] = {
            side: {
                other: {k: difference(own[k], theirs[k])["rel_l2"] for k in own if k in theirs}
                for other, theirs in given.items()
                if other != side
            }
            for side, own in given.items()
        }
    return found
