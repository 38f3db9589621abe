"""The tests of the library run on SQLite, and those of `ON_BOTH` on PostgreSQL as well, which takes longer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import needs_postgres
from tests.vectors.making import PLACE, open_library
from vectors import Library

ON_BOTH = {f"test_{name}" for name in (
    "audit", "backup", "blobs", "concurrency", "crash", "library", "listing", "memory", "migrations", "models",
    "presets", "quota", "rollouts", "stateful")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if metafunc.module.__name__.rsplit(".", 1)[-1] in ON_BOTH and "database" not in named:
        metafunc.parametrize("database", ["sqlite", pytest.param("postgresql", marks=[
            pytest.mark.slow, needs_postgres])], indirect=True)


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database the test runs on."""
    found: str = getattr(request, "param", "sqlite")
    PLACE.cluster = request.getfixturevalue("postgres") if found == "postgresql" else None
    try:
        yield found
        PLACE.close()
        if PLACE.cluster is not None:
            PLACE.cluster.clear()
    finally:
        PLACE.cluster = None


@pytest.fixture
def library(tmp_path: Path, database: str) -> Library:
    return open_library(tmp_path)
