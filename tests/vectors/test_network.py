"""A PostgreSQL on another machine: over TLS, with a password, and only where its certificate is the right one."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import make_url, text

from tests.postgres import USER, Cluster, needs_postgres, running
from tests.server.test_tls import Authority
from tests.vectors.making import metadata, vector_payload
from vectors import Library, LibraryUnavailable

pytestmark = [pytest.mark.slow, needs_postgres]
PASSWORD = "p@ss/w'ord:%"
At = Callable[..., str]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def cluster(ours: Authority) -> Iterator[Cluster]:
    with running() as found:
        found.make_template()
        found.library_url("one")
        found.open_to_network(PASSWORD, *ours.issue("database"))
        yield found


@pytest.fixture
def at(cluster: Cluster, ours: Authority) -> At:
    """URL of a library there. The certificate is of the name localhost."""

    def url(host: str = "localhost", password: str = PASSWORD, **options: str) -> str:
        name = make_url(cluster.library_url("one")).database
        options = {"sslmode": "verify-full", "sslrootcert": str(ours.file)} | options
        told = "&".join(f"{key}={quote(value, safe='')}" for key, value in options.items())
        return f"postgresql://{USER}:{quote(password, safe='')}@{host}:{cluster.port}/{name}?{told}"

    return url


def test_a_library_is_used_and_followed_over_tls(at: At, tmp_path: Path) -> None:
    told = threading.Event()
    first, second = (Library.open(at(), str(tmp_path)) for _ in range(2))
    try:
        second.follow(told.set, lambda: None)
        with first._database.engine.connect() as connection:
            assert connection.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")) is True
        # It is told once when it has connected, and again of the change.
        assert told.wait(60)
        told.clear()
        first.create(metadata(), vector_payload(1))
        assert told.wait(60) and second.source("cheerful").ref == "cheerful@1"
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(("change", "why"), [
    ({"host": "127.0.0.1"}, "certificate"), ({"password": "guessed"}, "password"),
    ({"sslmode": "disable"}, "no encryption")], ids=["another name", "wrong password", "no TLS"])
def test_what_is_not_as_it_should_be_is_refused(at: At, tmp_path: Path, change: dict[str, str], why: str) -> None:
    with pytest.raises(LibraryUnavailable) as caught:
        Library.open(at(**change), str(tmp_path))
    assert why in str(caught.value) and PASSWORD not in str(caught.value)


def test_a_certificate_of_somebody_else_is_refused(at: At, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    with pytest.raises(LibraryUnavailable, match="certificate"):
        Library.open(at(sslrootcert=str(other.file)), str(tmp_path))
    # What refuses it is the check, which this mode leaves out.
    Library.open(at(sslmode="require", sslrootcert=""), str(tmp_path)).close()
