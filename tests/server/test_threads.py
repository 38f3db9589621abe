"""Who starts a thread stays until it has ended, however often it is cancelled."""

import asyncio
import threading
from inspect import iscoroutinefunction

import anyio
import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api.route import StrictRoute
from server.errors import InternalError
from server.threads import in_thread
from steering.language.errors import EngineFailed
from tests.server.conftest import MODEL
from vectors.library import Library


class Held:
    """Work that a test lets go of, and that says when it runs."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.go.wait(60)
        self.ended.set()
        return 7

    async def running(self) -> None:
        async with asyncio.timeout(30):
            while not self.begun.is_set():
                await asyncio.sleep(0.002)


async def test_results_and_errors_come_back() -> None:
    assert await in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_a_cancelled_caller_leaves_when_the_thread_has_ended() -> None:
    work, limiter = Held(), anyio.CapacityLimiter(1)
    task = asyncio.create_task(in_thread(work, limiter=limiter))
    await work.running()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done() and limiter.borrowed_tokens == 1
    work.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set() and limiter.borrowed_tokens == 0


async def test_so_does_one_in_a_cancelled_scope_or_out_of_time() -> None:
    work = Held()
    loops = 0
    with anyio.CancelScope() as scope:
        async def leave() -> None:
            nonlocal loops
            await work.running()
            scope.cancel()
            for _ in range(20):
                await asyncio.sleep(0.001)
                loops += 1
            work.go.set()

        leaving = asyncio.create_task(leave())
        await in_thread(work)
        await asyncio.sleep(0)
    assert scope.cancelled_caught and work.ended.is_set() and loops == 20
    await leaving
    late = Held()
    releasing = asyncio.create_task(late.running())
    releasing.add_done_callback(lambda _: asyncio.get_running_loop().call_later(0.05, late.go.set))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await in_thread(late)
    assert late.ended.is_set() or not late.begun.is_set()
    await releasing


async def test_one_that_waits_for_its_turn_leaves_at_once_and_never_begins() -> None:
    first, second, limiter = Held(), Held(), anyio.CapacityLimiter(1)
    running = asyncio.create_task(in_thread(first, limiter=limiter))
    await first.running()
    waiting = asyncio.create_task(in_thread(second, limiter=limiter))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.go.set()
    assert await running == 7
    assert not second.begun.is_set()


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
async def test_what_would_end_the_server_is_a_failure_of_the_work(end: BaseException) -> None:
    def work() -> None:
        raise end

    with pytest.raises(InternalError, match=type(end).__name__) as found:
        await in_thread(work)
    assert found.value.__cause__ is end
    with pytest.raises(EngineFailed):
        await in_thread(work, failure=EngineFailed)


async def test_a_thread_that_is_told_to_end_fails_its_request_alone(
        client: httpx.AsyncClient, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes that are plain functions run in threads of FastAPI's own; the library, texts and plans in ours."""
    def end(*_: object, **__: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(library, "list", end)
    monkeypatch.setattr(library.presets, "resolve", end)
    monkeypatch.setattr(library.switches, "set_kill_switch", end)
    assert_failed(await client.get("/v1/artifacts"))
    assert_failed(await client.get("/v1/models/tiny:a"))
    switched = await client.put("/v1/admin/kill-switch", json={"on": True})
    assert switched.status_code == 200 and not switched.json()["stored"] and "SystemExit" in switched.json()["failure"]
    with monkeypatch.context() as patched:
        patched.setattr("server.text.vocabulary.Vocabulary.encode", end)
        assert_failed(await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"}))
    assert (await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})).status_code == 200


async def test_every_route_that_is_a_plain_function_is_contained(app: FastAPI) -> None:
    plain = [route for route in app.routes if isinstance(route, APIRoute) and not iscoroutinefunction(route.endpoint)]
    assert len(plain) > 10
    assert [route.path for route in plain if not isinstance(route, StrictRoute)] == []


def assert_failed(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
