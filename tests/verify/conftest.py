"""One bench for the whole test session, and a port to verify: a generated one, else one made from the engine's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from porter.verify.environment import check_environment

ROOT = Path(__file__).resolve().parents[2]


def _why_not() -> str:
    return "; ".join(p.title for p in check_environment())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if reason and {"bench", "engine_environment"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def bench() -> Iterator[object]:
    from porter.verify.bench import Bench

    with Bench() as made:
        made.warm(engine=2)
        yield made


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """Environment of a process that imports the engine itself."""
    from porter.verify.platform.bootstrap import environment

    return environment()


@pytest.fixture(scope="session")
def port_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated folder with a port of a pipeline that has packed projections, rotary tables and true guidance."""
    from tests.verify.hand_port import SUBJECT, adapt

    generated = ROOT / "generated"
    if (generated / "manifest.json").is_file() and os.environ.get("PORTER_TEST_PORT") != "hand":
        from porter.verify.manifest import read_manifest

        if any(p.source_class == SUBJECT and p.module for p in read_manifest(generated).ports):
            return generated
    return adapt(tmp_path_factory.mktemp("adapted"))
