"""A server that is told to stop: what is open finishes, or is told; nothing is cut."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.http.runner import Server
from server.requests.pools import Pools
from server.settings import Settings
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"shutdown_s": 30.0})


async def begun(engine: ScriptedEngine, count: int) -> None:
    async with asyncio.timeout(30):
        while len(engine.completions) < count:
            await asyncio.sleep(0.005)


async def first_token(engine: ScriptedEngine) -> None:
    async with asyncio.timeout(30):
        while not engine.completions[0].given:
            await asyncio.sleep(0.005)


def events(text: str) -> list[Any]:
    return [part.removeprefix("data: ") for part in text.strip().split("\n\n")]


async def test_what_is_open_finishes_and_what_comes_is_refused(address: str, server: Server, engine: ScriptedEngine
                                                               ) -> None:
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        whole = asyncio.create_task(client.post(CHAT, json=chat()))
        streamed = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
        await begun(engine, 2)
        assert (await client.get("/health/ready")).status_code == 200
        server.stop()
        for path, given in (("/health/ready", None), (CHAT, chat()), ("/v1/models", None)):
            answer = await client.request("GET" if given is None else "POST", path, json=given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down"), path
            assert answer.headers["retry-after"] == "5" and answer.headers["connection"] == "close"
        assert (await client.get("/health")).status_code == 200
        assert not whole.done() and not streamed.done()
        engine.gate.set()
        assert (await whole).json()["choices"][0]["message"]["content"] == " good day"
        assert events((await streamed).text)[-1] == "[DONE]"
    assert len(engine.completions) == 2


async def test_a_connection_that_has_asked_nothing_yet_is_answered_and_an_idle_one_closed(
        port: int, server: Server, engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        whole = asyncio.create_task(client.post(CHAT, json=chat()))
        await begun(engine, 1)
        request = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
        idle, unused = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        idle[1].write(request)
        assert b"200" in await idle[0].readline()
        server.stop()
        async with asyncio.timeout(30):
            await idle[0].read()
            unused[1].write(request)
            assert b"503" in await unused[0].readline()
        engine.gate.set()
        assert (await whole).status_code == 200
        for _, writer in (idle, unused):
            writer.close()


class TestOutOfTime:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"shutdown_s": 0.0})

    async def test_streams_end_with_an_error_and_the_rest_is_refused(self, address: str, server: Server,
                                                                     engine: ScriptedEngine) -> None:
        engine.gate = asyncio.Event()
        engine.gate.set()
        async with httpx.AsyncClient(base_url=address, timeout=60) as client, client.stream(
                "POST", CHAT, json=chat(stream=True, ignore_eos=True, max_tokens=200)) as begun_stream:
            lines = begun_stream.aiter_lines()
            assert (await anext(lines)).startswith("data: {")
            engine.gate.clear()
            whole = asyncio.create_task(client.post(CHAT, json=chat(n=2)))
            silent = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
            await begun(engine, 4)
            server.stop()
            # httpx raises unless the last chunk is whole.
            rest = [line async for line in lines if line]
            answers = [await whole, await silent]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            assert answer.headers["retry-after"] == "5"
        assert all(c.cancelled.is_set() for c in engine.completions)

    async def test_so_does_what_waits_for_something_else_than_the_engine(self, address: str, server: Server,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream whose tokens are all there and whose receipt does not come; a request that is not planned yet."""
        monkeypatch.setattr("server.http.runner.RUNS_END_S", 0.0)
        waiting = asyncio.Semaphore(0)

        async def never(*_: Any, **__: Any) -> Any:
            waiting.release()
            await asyncio.Event().wait()

        monkeypatch.setattr("server.requests.service.watch", never)
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            streamed = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
            await asyncio.wait_for(waiting.acquire(), 30)
            monkeypatch.setattr(Pools, "complete", never)
            planned = asyncio.create_task(client.post(CHAT, json=chat()))
            await asyncio.wait_for(waiting.acquire(), 30)
            server.stop()
            found = events((await streamed).text)
            answer = await planned
        assert found[-1] == "[DONE]" and json.loads(found[-2])["error"]["code"] == "shutting_down"
        assert [" good" in event or " day" in event for event in found[:2]] == [True, True]
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
