"""The kill switch works when the database, the disk and every thread do not."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event

import server.requests.killswitch
from server.observability.instruments import Registry
from server.requests.killswitch import KillSwitch
from server.settings import Settings
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library
from vectors.library.switches import Turn
from vectors.storage_errors import LibraryUnavailable

URL = "/v1/admin/kill-switch"
SPEC = {"interventions": [{"inline": {"vector": [1.0] * 8}, "op": "add", "site": "resid_post", "layers": [2]}]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.requests.killswitch, "POLL_S", 0.02)
    monkeypatch.setattr(server.requests.killswitch, "STORE_S", 0.2)


@pytest.fixture
def locked(tmp_path: Path, library: Library) -> Iterator[sqlite3.Connection]:
    """The library's database, held by a writer that does not end; readers of its write-ahead log are free."""
    with closing(sqlite3.connect(tmp_path / "library.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield holder


async def disabled(client: httpx.AsyncClient) -> bool:
    answer = await client.post("/v1/chat/completions", json=chat() | {"steering": SPEC})
    assert answer.status_code == 200, answer.text
    found: bool = answer.json()["steering"]["disabled"]
    return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(60):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_it_acts_while_the_database_is_locked_and_is_stored_afterwards(
        client: httpx.AsyncClient, library: Library, locked: sqlite3.Connection) -> None:
    assert not await disabled(client)
    answer = await client.put(URL, json={"on": True})
    assert answer.status_code == 200 and answer.json()["on"] is True and answer.json()["stored"] is False
    assert await disabled(client)
    assert library.switches.kill_switch() is False
    assert "trimtab_kill_switch_unstored 1.0" in (await client.get("/metrics")).text
    locked.execute("ROLLBACK")

    async def stored() -> bool:
        return bool((await client.get(URL)).json()["stored"])

    await until(stored)
    assert library.switches.kill_switch() is True


async def test_it_acts_on_a_read_only_database_and_says_why_it_is_not_stored(client: httpx.AsyncClient,
                                                                            library: Library) -> None:
    def forbid(connection: Any) -> None:
        connection.exec_driver_sql("PRAGMA query_only=ON")

    event.listen(library.presets._database.engine, "begin", forbid)
    answer = (await client.put(URL, json={"on": True})).json()
    assert (answer["on"], answer["stored"]) == (True, False) and "readonly" in answer["failure"]
    assert await disabled(client)


async def test_it_needs_no_thread_of_the_pool(client: httpx.AsyncClient) -> None:
    release, limiter = Event(), anyio.to_thread.current_default_thread_limiter()
    try:
        async with anyio.create_task_group() as tasks:
            for _ in range(int(limiter.total_tokens)):
                tasks.start_soon(anyio.to_thread.run_sync, release.wait)
            while limiter.available_tokens:
                await asyncio.sleep(0)
            with anyio.fail_after(60):
                answer = await client.put(URL, json={"on": True})
                assert (await client.get(URL)).json()["on"] is True
            assert answer.json() | {"turned": None} == {"on": True, "reason": "the kill switch is on", "stored": True,
                                                        "failure": None, "turned": None}
            release.set()
    finally:
        release.set()


async def test_a_change_by_another_server_arrives_and_survives_a_restart(
        client: httpx.AsyncClient, library: Library, settings: Settings) -> None:
    library.switches.set_kill_switch(True)
    await until(lambda: disabled(client))
    restarted = KillSwitch(library.switches, Registry(), always=False)
    await restarted.start()
    assert restarted.on
    await restarted.stop()


async def test_listeners_hear_every_change_once_and_in_the_loop(app: FastAPI, client: httpx.AsyncClient) -> None:
    switch: KillSwitch = app.state.server.kill_switch
    heard: list[tuple[int, bool]] = []
    with switch.subscribe(lambda: 1 / 0), switch.subscribe(lambda: heard.append((switch.generation, switch.on))):
        for on in (True, True, False):
            await client.put(URL, json={"on": on})
    await client.put(URL, json={"on": True})
    assert heard == [(1, True), (2, False)]


async def test_the_last_of_two_quick_changes_is_the_one_stored(library: Library, monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    """The second comes while the first is being written."""
    writing, go_on = Event(), Event()
    store = library.switches.set_kill_switch

    def slow(on: bool, turns: list[Turn]) -> None:
        writing.set()
        assert go_on.wait(60)
        store(on, turns)

    switch = KillSwitch(library.switches, Registry(), always=False)
    await switch.start()
    monkeypatch.setattr(library.switches, "set_kill_switch", slow)
    first = asyncio.create_task(switch.set(True))
    assert await anyio.to_thread.run_sync(writing.wait, 60)
    second = asyncio.create_task(switch.set(False))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, second)

    async def stored() -> bool:
        return switch.unstored is None

    await until(stored)
    assert not switch.on and library.switches.kill_switch() is False
    await switch.stop()


async def test_what_could_not_be_stored_does_not_keep_the_server_from_stopping(
        library: Library, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    switch = KillSwitch(library.switches, Registry(), always=False)
    await switch.start()

    def fails(on: bool, turns: list[Turn]) -> None:
        raise LibraryUnavailable("no space left on device")

    monkeypatch.setattr(library.switches, "set_kill_switch", fails)
    await switch.set(True)
    with anyio.fail_after(60):
        await switch.stop()
    assert switch.on and switch.unstored is True
