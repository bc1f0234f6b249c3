"""Tests that share the engine's processes run in one worker, so that these are started once; see `make test`."""

from __future__ import annotations

import pytest

from tests.verify.rotation import turn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "bench" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("engine"))


def pytest_report_header() -> str:
    return f"sweep: turn {turn()} (PORTER_TURN={turn()} repeats it)"
