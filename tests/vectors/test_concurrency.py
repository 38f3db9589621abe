import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.vectors.making import PLACE, metadata, open_library, same_numbers, vector_payload
from vectors import Library, Patch

THREADS = 8
EACH = 6


def together(workers: int, work: Callable[[int], object]) -> list[object]:
    """Run `work(0..workers-1)` at once and hand back the results; what any of them raises is raised."""
    barrier = threading.Barrier(workers)

    def start(number: int) -> object:
        barrier.wait(timeout=60)
        return work(number)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(start, range(workers)))


def test_threads_creating_under_one_name_get_distinct_versions(library: Library) -> None:
    def create(thread: int) -> list[tuple[int, int]]:
        return [(seed, library.create(metadata(), vector_payload(seed)).version)
                for seed in range(thread * EACH, (thread + 1) * EACH)]

    made = dict(pair for pairs in together(THREADS, create) for pair in pairs)  # type: ignore[attr-defined]
    assert sorted(made.values()) == list(range(1, THREADS * EACH + 1))
    for seed, version in made.items():
        assert same_numbers(library.source(f"cheerful@{version}").payload, vector_payload(seed))


def test_threads_uploading_the_same_get_the_same_version(library: Library) -> None:
    refs = together(THREADS, lambda _: library.create(metadata(), vector_payload(1)).ref)
    assert set(refs) == {"cheerful@1"}
    assert len(library.versions("cheerful")) == 1


def test_two_libraries_on_one_database(library: Library, tmp_path: Path) -> None:
    both = (library, open_library(tmp_path))
    versions = together(6, lambda n: both[n % 2].create(metadata(), vector_payload(n)).version)
    assert sorted(versions) == [1, 2, 3, 4, 5, 6]  # type: ignore[type-var]


def _create_in_process(folder: str, process: int, barrier: object, results: object) -> None:
    barrier.wait(timeout=120)  # type: ignore[attr-defined]
    library = open_library(Path(folder))
    for step in range(EACH):
        seed = process * EACH + step
        results.put((seed, library.create(metadata(), vector_payload(seed)).version))  # type: ignore[attr-defined]


def test_processes_opening_a_new_library_and_creating_at_once(tmp_path: Path) -> None:
    """They race for the migration first, then for version numbers."""
    context = multiprocessing.get_context("fork")
    count = 4
    PLACE.url(tmp_path, empty=True)
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_create_in_process, args=(str(tmp_path), n, barrier, results))
                 for n in range(count)]
    for process in processes:
        process.start()
    made = dict(results.get(timeout=120) for _ in range(count * EACH))
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(made.values()) == list(range(1, count * EACH + 1))
    library = open_library(tmp_path)
    for seed, version in made.items():
        assert same_numbers(library.source(f"cheerful@{version}").payload, vector_payload(seed))


def test_an_alias_under_move_always_points_somewhere(library: Library) -> None:
    for seed in (1, 2):
        library.create(metadata(), vector_payload(seed))
    library.set_alias("cheerful", "production", 1)
    done = threading.Event()
    seen: set[int] = set()

    def move(_: int) -> None:
        try:
            for step in range(30):
                library.set_alias("cheerful", "production", step % 2 + 1)
        finally:
            done.set()

    def watch(_: int) -> None:
        while not done.is_set():
            artifact = library.resolve("cheerful@production")
            assert artifact.aliases == ("production",)
            seen.add(artifact.version)

    together(3, lambda n: move(n) if n == 0 else watch(n))
    assert seen <= {1, 2} and seen


def test_uploads_survive_a_collector_that_takes_everything_it_may(library: Library) -> None:
    stop = threading.Event()

    def collect(_: int) -> None:
        # Blobs of any age, but not files still being written, which only their age protects.
        while not stop.is_set():
            for stored in library._blobs.files():
                if stored.digest is not None:
                    library._database.write(lambda session, stored=stored: library._remove_unused(stored, session))

    def upload(thread: int) -> None:
        try:
            for seed in range(10):
                name = f"n{thread}-{seed}"
                library.create(metadata(name), vector_payload(seed))
                library.delete(name)
            library.create(metadata(f"kept-{thread}"), vector_payload(100 + thread))
        finally:
            stop.set()

    together(3, lambda n: collect(n) if n == 0 else upload(n))
    assert library.damaged() == []
    assert [a.metadata.name for a in library.list().items] == ["kept-1", "kept-2"]


def test_patches_and_deletes_beside_readers(library: Library) -> None:
    for seed in range(10):
        library.create(metadata(), vector_payload(seed))

    def change(thread: int) -> None:
        if thread == 0:
            for version in range(1, 9):
                library.delete(f"cheerful@{version}")
        elif thread == 1:
            for step in range(10):
                library.patch("cheerful@10", Patch(tags=(f"t{step}", "always")))
        else:
            for _ in range(20):
                page = library.list()
                assert [a.version for a in page.items] == [10]
                assert "always" in page.items[0].metadata.tags or page.items[0].metadata.tags == ()
                assert library.versions("cheerful")[0].version == 10

    together(4, change)
    assert [a.version for a in library.versions("cheerful")] == [10, 9]
    assert library.resolve("cheerful").metadata.tags == ("t9", "always")


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("many", [1, 4])
def test_a_connection_that_may_only_read_is_replaced(library: Library, database: str, many: int) -> None:
    """SQLite opens a file for reading alone while it cannot be written, and a pool keeps what it opened. `query_only`
    makes a connection fail in the same words. With PostgreSQL that would be a setting of its server."""
    with ExitStack() as stack:
        for _ in range(many):
            connection = stack.enter_context(library._database.engine.connect())
            connection.exec_driver_sql("PRAGMA query_only = ON")
    for n in range(many + 1):
        library.switches.set_kill_switch(n % 2 == 0)
        assert library.switches.kill_switch() == (n % 2 == 0)
