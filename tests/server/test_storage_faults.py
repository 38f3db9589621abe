"""Disk full, read-only, failing; database locked or damaged: every answer is typed, and what was acknowledged stays.

The disks are real ones where this process may mount them, and the errors come from the kernel and from SQLite.
"""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import structlog
import torch

from server.observability.logs import configure_logging
from steering.artifacts.payload import Payload
from tests.server.conftest import chat
from tests.server.test_steering import store
from vectors.artifact import Metadata
from vectors.formats import get_format
from vectors.library import Library
from vectors.scratch import ScratchFolder
from vectors.storage_errors import StorageFull, StorageUnavailable

WIDTH = 8
KIB = 1024


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path))

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file:
            for size in (64 * KIB, KIB, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    def read_only(self, on: bool) -> None:
        self._run("mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.path))

    def close(self) -> None:
        self._run("umount", "-l", str(self.path))

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path / "disk")
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("this process may not mount a file system")
    yield made
    made.close()


def body(name: str, value: float = 1.0, layers: int = 1) -> dict[str, Any]:
    return {"metadata": {"name": name, "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {str(n): {"vector": [value] * WIDTH} for n in range(layers)}}


def file_of(name: str, width: int = WIDTH) -> bytes:
    return get_format("safetensors").write(Metadata(name=name, kind="vector", op="add", site="resid_post"),
                                           Payload.build("vector", {1: {"vector": torch.ones(width)}}))


def told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


WRITES = [("POST", "/v1/artifacts", body("new")), ("PATCH", "/v1/artifacts/one", {"description": "x"}),
          ("DELETE", "/v1/artifacts/two", None), ("PUT", "/v1/artifacts/one/aliases/live", {"version": 1}),
          ("POST", "/v1/presets", {"name": "p", "spec": {"interventions": [{"artifact": "one"}]}}),
          ("PUT", "/v1/admin/default-spec", {"interventions": [{"artifact": "one"}]}),
          ("DELETE", "/v1/admin/default-spec", None)]
READS = ["/v1/artifacts", "/v1/artifacts/one", "/v1/artifacts/one/versions", "/v1/artifacts/one/download",
         "/v1/presets", "/v1/models", "/v1/admin/default-spec", "/v1/admin/library"]


async def send(client: httpx.AsyncClient, method: str, path: str, json: Any) -> httpx.Response:
    return await client.request(method, path, json=json) if json is not None else await client.request(method, path)


class TestOnADiskOfItsOwn:
    @pytest.fixture
    def library(self, disk: Disk) -> Iterator[Library]:
        opened = Library.open(f"sqlite:///{disk.path / 'library.db'}", str(disk.path / "blobs"), wait_s=0.2)
        for name in ("one", "two"):
            store(opened, name)
        yield opened
        opened.close()

    async def test_full(self, client: httpx.AsyncClient, library: Library, disk: Disk) -> None:
        """Filled in the middle of use: whatever was acknowledged is there, and room lets everything go on."""
        disk.fill()
        acknowledged = []
        for i in range(12):
            answer = await client.post("/v1/artifacts", json=body(f"n{i}", float(i + 1), layers=40))
            if answer.status_code == 201:
                acknowledged.append(answer.json()["ref"])
            else:
                assert told(answer) == (507, "storage_full")
        assert len(acknowledged) < 12
        imported = await client.post("/v1/artifacts/import", files={"file": ("x", file_of("imported"))})
        assert told(imported) == (507, "storage_full")
        for path in READS:
            assert (await client.get(path)).status_code == 200, path
        answer = await client.post("/v1/chat/completions", json=chat(steering={"interventions": [{"artifact": "one"}]}))
        assert answer.status_code == 200
        disk.make_room()
        assert (await client.post("/v1/artifacts", json=body("after"))).status_code == 201
        assert {"one@1", "two@1", "after@1", *acknowledged} == {
            item["ref"] for item in (await client.get("/v1/artifacts")).json()["data"]}
        assert library.damaged() == []

    async def test_read_only(self, client: httpx.AsyncClient, library: Library, disk: Disk) -> None:
        # Connections of SQLite keep their files open for writing, which holds off the remount.
        library._database.engine.dispose()
        disk.read_only(True)
        for method, path, json in WRITES:
            status, code = told(await send(client, method, path, json))
            assert status == 503 and code in ("library_unavailable", "storage_unavailable"), (method, path)
        for path in READS:
            answer = await client.get(path)
            assert answer.status_code == 200 or told(answer) == (503, "library_unavailable"), path
        library._database.engine.dispose()
        disk.read_only(False)
        assert (await client.post("/v1/artifacts", json=body("after"))).status_code == 201
        assert (await client.get("/v1/artifacts/two")).status_code == 200


class TestALockedDatabase:
    @pytest.fixture
    def library(self, tmp_path: Path) -> Iterator[Library]:
        opened = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"), wait_s=0.1)
        for name in ("one", "two"):
            store(opened, name)
        yield opened
        opened.close()

    async def test_writes_say_so_in_time_and_reads_go_on(self, client: httpx.AsyncClient, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "library.db", isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            for method, path, json in WRITES:
                answer = await send(client, method, path, json)
                assert told(answer) == (503, "library_unavailable"), (method, path)
                assert int(answer.headers["Retry-After"]) >= 1
            for path in READS:
                assert (await client.get(path)).status_code == 200, path
            holder.execute("ROLLBACK")
        assert (await client.post("/v1/artifacts", json=body("new"))).status_code == 201


@pytest.mark.parametrize("garbage", [b"", b"this is no database " * 4096, b"\0" * 16384])
async def test_a_database_that_is_overwritten_while_it_is_used(client: httpx.AsyncClient, library: Library,
                                                              tmp_path: Path, garbage: bytes) -> None:
    store(library, "one")
    library._database.engine.dispose()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"library.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "library.db").write_bytes(garbage)
    steered = ("POST", "/v1/chat/completions", chat(steering={"interventions": [{"artifact": "one"}]}))
    for method, path, json in [*WRITES, *(("GET", path, None) for path in READS), steered]:
        answer = await send(client, method, path, json)
        assert told(answer) == (503, "library_unavailable"), (method, path, answer.text)
    assert (await client.get("/health/ready")).status_code == 200
    assert (await client.put("/v1/admin/kill-switch", json={"on": True})).json()["on"] is True


@pytest.mark.parametrize(("call", "number", "status", "code"), [
    ("open", errno.ENOSPC, 507, "storage_full"), ("open", errno.EACCES, 503, "storage_unavailable"),
    ("fsync", errno.EDQUOT, 507, "storage_full"), ("fsync", errno.EIO, 503, "storage_unavailable"),
    ("replace", errno.ENOSPC, 507, "storage_full"), ("makedirs", errno.EROFS, 503, "storage_unavailable")])
async def test_an_upload_whose_disk_fails_is_typed_and_leaves_nothing(
        client: httpx.AsyncClient, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str,
        number: int, status: int, code: str) -> None:
    store(library, "one", 3.0)
    before = sorted(path for path in (tmp_path / "blobs").rglob("*") if path.is_file())

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "secret"))

    with monkeypatch.context() as patched:
        patched.setattr(f"vectors.library.blobs.{'' if call == 'open' else 'os.'}{call}", fails, raising=call != "open")
        answers = [await client.post("/v1/artifacts", json=body("new")),
                   await client.post("/v1/artifacts/import", files={"file": ("x", file_of("new"))}),
                   await client.post("/v1/artifacts/import", content=file_of("new"),
                                     headers={"Content-Type": "application/octet-stream"})]
    for answer in answers:
        assert told(answer) == (status, code) and str(tmp_path) not in answer.text
    assert sorted(path for path in (tmp_path / "blobs").rglob("*") if path.is_file()) == before or call == "fsync"
    assert [item["name"] for item in (await client.get("/v1/artifacts")).json()["data"]] == ["one"]
    assert (await client.post("/v1/artifacts", json=body("new"))).status_code == 201


async def test_a_missing_folder_of_blobs_is_made_again(client: httpx.AsyncClient, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "blobs")
    assert (await client.post("/v1/artifacts", json=body("new"))).status_code == 201


async def test_a_form_for_which_there_is_no_temporary_space(client: httpx.AsyncClient, disk: Disk,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Large uploads wait on the disk while they are read, under another folder than the library's."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    disk.fill()
    large = file_of("large", width=2**19)
    assert told(await client.post("/v1/artifacts/import", files={"file": ("x", large)})) == (507, "storage_full")
    disk.make_room()
    assert (await client.post("/v1/artifacts/import", files={"file": ("x", file_of("small"))})).status_code == 201


def test_working_space_is_taken_before_it_is_used(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a mapped file that finds no room kills the process; here it never comes to that."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    folder = ScratchFolder()
    small = folder.array("small", np.float32, (4, 1024))
    assert small.shape == (4, 1024) and not small.any()
    small[:] = 1.0
    with pytest.raises(StorageFull, match="working space"):
        folder.array("large", np.float32, (512, 1024))
    assert not (folder.path / "large").exists()
    folder.cleanup()
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path / "nowhere"))
    with pytest.raises(StorageUnavailable):
        ScratchFolder()


def test_a_log_line_that_cannot_be_written_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, as everything on it does
    with pytest.raises(OSError, match="No space"):
        print("x", file=full, flush=True)
    monkeypatch.setattr(sys, "stderr", full)
    configure_logging("json")
    structlog.get_logger("trimtab.test").warning("one", text="x" * 100_000)
    with suppress(OSError):
        full.close()
    structlog.get_logger("trimtab.test").warning("closed")
