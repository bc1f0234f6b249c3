"""The table of a trial: what converts and what blocks the rest, without writing anything."""

from __future__ import annotations

import csv
import io

from porter.source.library import open_library
from porter.trial import COLUMNS, trial
from tests.test_house import ROOT


def rows(text: str) -> dict[str, dict[str, str]]:
    return {row["class"]: row for row in csv.DictReader(io.StringIO(text))}


def test_a_class_that_converts_has_its_transformer_counted() -> None:
    row = rows(trial(["diffusers.PixArtSigmaPipeline"]))["PixArtSigmaPipeline"]
    assert row["pipeline"] == "yes" and not row["blocked_by"]
    name, _, lines = row["transformers"].partition(":")
    assert name == "PixArtTransformer2DModel" and int(lines) > 100
    assert row["diffusers"] == open_library().version


def test_a_class_that_does_not_convert_says_why() -> None:
    row = rows(trial(["DDPMPipeline"]))["DDPMPipeline"]
    assert row["pipeline"] == "no" and not row["transformers"]
    assert row["blocked_by"].startswith("PORT")


def test_the_tables_of_newer_versions_name_what_blocks_each_class_without_a_port() -> None:
    tables = sorted((ROOT / "tests" / "corpus").glob("trial-*.csv"))
    assert tables
    for path in tables:
        for row in rows(path.read_text()).values():
            assert tuple(row) == COLUMNS
            assert row["diffusers"] in path.name
            assert row["pipeline"] == "yes" or row["blocked_by"].startswith("PORT")
