"""Several processes on one PostgreSQL: changes are told, connections that are lost are made again."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from server.errors import status_of
from tests.postgres import Cluster, needs_postgres
from tests.vectors.making import metadata, open_library, vector_payload
from vectors import Library, LibraryUnavailable

pytestmark = [pytest.mark.slow, needs_postgres,
              pytest.mark.parametrize("database", ["postgresql"], indirect=True)]
LONG_S = 60


class Told:
    """How often a library was told, as something that can be waited for."""

    def __init__(self) -> None:
        self.times = 0
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.times += 1
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, LONG_S)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def follower(tmp_path: Path, library: Library, told: Told) -> Iterator[Library]:
    """A second library on the database, which never asks it whether something has changed."""
    library.create(metadata(), vector_payload(1))
    found = open_library(tmp_path)
    found._database.revision._clock = lambda: 0.0
    found.follow(told, lambda: None)
    told.wait(lambda: told.times > 0)
    assert found.followed
    assert found.source("cheerful").ref == "cheerful@1"
    yield found
    found.close()
    assert found.followed is None


def test_a_change_of_another_process_is_told_and_acts(library: Library, follower: Library, told: Told, tmp_path: Path
                                                      ) -> None:
    deaf = open_library(tmp_path)
    deaf._database.revision._clock = lambda: 0.0
    assert deaf.source("cheerful").ref == "cheerful@1"
    library.create(metadata(), vector_payload(2))
    told.wait(lambda: follower.source("cheerful").ref == "cheerful@2")
    before = told.times
    library.set_alias("cheerful", "production", 1)
    told.wait(lambda: told.times > before)
    assert follower.source("cheerful").ref == "cheerful@1"
    # The control: without being told it would never know.
    library.set_alias("cheerful", "production", 2)
    assert deaf.source("cheerful").ref == "cheerful@1"


def test_what_is_rolled_back_is_not_told(library: Library, follower: Library, told: Told) -> None:
    before = told.times
    with pytest.raises(Exception, match="there is no"):
        library.set_alias("cheerful", "production", 9)
    library.set_alias("cheerful", "production", 1)
    told.wait(lambda: told.times > before)
    assert told.times == before + 1


def test_a_listener_whose_connection_is_cut_listens_again_and_looks_at_once(
        library: Library, follower: Library, told: Told) -> None:
    before = told.times
    with library._database.engine.connect() as connection:
        cut = connection.execute(text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                                      "WHERE query LIKE 'LISTEN%' AND datname = current_database()")).scalar()
    assert cut == 1
    library.create(metadata(), vector_payload(2))
    told.wait(lambda: told.times > before and follower.source("cheerful").ref == "cheerful@2")


def test_a_database_that_restarts_is_missed_for_as_long_as_it_is_away(
        library: Library, follower: Library, told: Told, postgres: Cluster) -> None:
    before = told.times
    postgres.stop()
    try:
        for use in (lambda: library.list(), lambda: library.set_alias("cheerful", "production", 1)):
            with pytest.raises(LibraryUnavailable) as caught:
                use()
            assert status_of(caught.value) == 503 and caught.value.retry_after_s
            assert str(postgres.folder) not in str(caught.value)
    finally:
        postgres.start()
    # Every connection of the pool is dead, and the first use notices.
    library.set_alias("cheerful", "production", 1)
    told.wait(lambda: told.times > before and follower.followed is True)
    assert follower.resolve("cheerful").aliases == ("production",)


def test_a_wait_for_a_lock_ends(library: Library, tmp_path: Path) -> None:
    impatient = open_library(tmp_path, wait_s=0.5)
    library.create(metadata(), vector_payload(1))
    with library._database.engine.begin() as holder:
        holder.execute(text("SELECT number FROM revision FOR UPDATE"))
        with pytest.raises(LibraryUnavailable, match="lock timeout"):
            impatient.set_alias("cheerful", "production", 1)
    impatient.set_alias("cheerful", "production", 1)


def test_a_wait_for_a_connection_ends(tmp_path: Path) -> None:
    library = open_library(tmp_path, wait_s=0.5, connections=2)
    with library._database.engine.connect(), library._database.engine.connect(), pytest.raises(LibraryUnavailable):
        library.list()
    assert library.list().items == []


def test_the_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LibraryUnavailable) as caught:
        Library.open("postgresql://nobody@localhost/x", str(tmp_path))
    assert caught.value.fix is not None and "trimtab[postgresql]" in caught.value.fix
