"""Divide a large conversion among processes: what is printed into one folder stays in one of them."""

from __future__ import annotations

from collections.abc import Sequence

from porter.halves import usable
from porter.specialise.naming import snake, stem
from porter.targets import Target

FEW = 8
"""So many classes are converted faster than another process is worth."""
MOST = 8
"""Each process holds about a gigabyte."""


def processes(classes: int) -> int:
    """How many processes a conversion of so many classes gets: the processors this one may use, one for few classes; of a
    single class two, for the halves of a pipeline."""
    if classes <= FEW:
        return min(usable(), 2) if classes == 1 else 1
    return min(usable(), MOST)


def share_out(targets: Sequence[Target], number: int) -> list[list[int]]:
    """Positions in `targets` in at most `number` shares of about the same work, each in ascending order.

    Targets whose denoisers go into a common folder are one piece of work: the denoiser is converted once, and the
    folder's records are about all of them.
    """
    pieces: list[tuple[set[str], list[int]]] = []
    for position, target in enumerate(targets):
        folders = {snake(stem(qualified.rpartition(".")[2])) for qualified in target.denoisers.values()}
        touching = [p for p in pieces if p[0] & folders]
        pieces = [p for p in pieces if not p[0] & folders]
        positions = [n for p in touching for n in p[1]]
        pieces.append((folders.union(*(p[0] for p in touching)), [*positions, position]))
    shares: list[list[int]] = [[] for _ in range(min(number, len(pieces)) or 1)]
    work = [0] * len(shares)
    for folders, positions in sorted(pieces, key=lambda p: (-len(p[0]) - len(p[1]), p[1])):
        least = work.index(min(work))
        work[least] += len(folders) + len(positions)
        shares[least] += positions
    return [sorted(share) for share in shares]
