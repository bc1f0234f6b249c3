"""The tables under `rules/symbols` that the pipeline half reads: request fields, refused parameters, engine classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

from porter.resources import RULES, table


class Tables(Struct, frozen=True, dict=True):
    """Parsed tables. `sampling` maps a field to the value it has when the caller gave none."""

    sampling: Mapping[str, object]
    given_by: Mapping[str, str]
    outputs: frozenset[str]
    refused: Mapping[str, str]
    media_words: frozenset[str]
    media_keys: Mapping[str, Sequence[str]]
    vae: Mapping[str, str]


@lru_cache(maxsize=4)
def load_tables(root: Path = RULES / "symbols") -> Tables:
    """Read the tables once."""

    keys = ("refused", "sampling", "given_by", "outputs", "media_words", "media_keys")
    request, vae = table(root / "request_parameters.yaml", *keys), table(root / "distributed_vae.yaml", "classes")
    refused = {name: reason for reason, names in request["refused"].items() for name in names}
    return Tables(
        sampling=request["sampling"],
        given_by=request["given_by"],
        outputs=frozenset(request["outputs"]),
        refused=refused,
        media_words=frozenset(request["media_words"]),
        media_keys=request["media_keys"],
        vae=vae["classes"],
    )
