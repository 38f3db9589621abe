"""What deleted versions and crashes leave goes on a schedule and when asked for; the quota is an error like others."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import server.background.housekeeping
from server.observability.instruments import Registry
from server.settings import Settings
from tests.server.test_steering import store
from vectors.artifact import Limits
from vectors.library import Library


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").rglob("*") if path.is_file()}


@pytest.fixture
def leftovers(library: Library, tmp_path: Path) -> set[str]:
    """Of a deleted version and of a killed writer, both old; beside them what is used and what is young."""
    store(library, "gone")
    library.delete("gone")
    (tmp_path / "blobs" / "partial" / "killed").write_bytes(b"half")
    old = files(tmp_path)
    for path in (tmp_path / "blobs").rglob("*"):
        os.utime(path, (0, 0))
    store(library, "kept", 2.0)
    (tmp_path / "blobs" / "partial" / "running").write_bytes(b"half")
    return old


async def test_it_can_be_asked_for(client: httpx.AsyncClient, leftovers: set[str], tmp_path: Path) -> None:
    before = files(tmp_path)
    assert len(leftovers) == 2 and len(before) == 4
    found = (await client.post("/v1/admin/library/gc")).json()
    assert (found["blobs"], found["partial"]) == (1, 1) and found["bytes"] > 4
    assert files(tmp_path) == before - leftovers
    held = (await client.get("/v1/admin/library")).json()
    assert (held["names"], held["versions"], held["max_bytes"]) == (1, 1, None) and held["bytes"] > 0
    assert (await client.post("/v1/admin/library/gc", params={"min_age_s": 0})).status_code == 400


class TestSchedule:
    @pytest.fixture
    def settings(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
        monkeypatch.setattr(server.background.housekeeping, "FIRST_S", 0)
        return settings.model_copy(update={"gc_interval_s": 0.01})

    async def test_it_happens_by_itself_and_goes_on_after_a_failure(
            self, library: Library, leftovers: set[str], client: httpx.AsyncClient, tmp_path: Path,
            monkeypatch: pytest.MonkeyPatch) -> None:
        async with asyncio.timeout(60):
            while files(tmp_path) & leftovers:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(library, "gc", lambda: 1 / 0)
            while "trimtab_housekeeping_failures_total 0.0" in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            monkeypatch.undo()
            page = (await client.get("/metrics")).text
        assert 'trimtab_library_held{what="names"} 1.0' in page and "trimtab_library_freed_bytes_total 0.0" not in page


async def test_a_schedule_of_zero_runs_nothing(library: Library, leftovers: set[str], tmp_path: Path) -> None:
    quiet = server.background.housekeeping.Housekeeping(library, Registry(), 0)
    await quiet.start()
    assert quiet._task is None
    await quiet.stop()
    await quiet.tidy()
    assert not files(tmp_path) & leftovers


class TestQuota:
    @pytest.fixture
    def library(self, tmp_path: Path) -> Iterator[Library]:
        opened = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"), Limits(library_names=1))
        yield opened
        opened.close()

    async def test_a_full_library_is_a_typed_error(self, client: httpx.AsyncClient, library: Library) -> None:
        store(library, "one")
        answers = [await client.post("/v1/artifacts", json={
            "metadata": {"name": "two", "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {"2": {"vector": [1.0] * 8}}}), await client.post("/v1/presets", json={
                "name": "p", "spec": {"interventions": [{"artifact": "one"}]}})]
        for answer in answers:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (409, "library_full")
            assert "trimtab library gc" in error["message"]
