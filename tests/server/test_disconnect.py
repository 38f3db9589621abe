"""A client that leaves takes its completions with it. Over real connections."""

import asyncio

import httpx
import pytest

from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine


async def all_cancelled(engine: ScriptedEngine) -> None:
    async with asyncio.timeout(10):
        for completion in engine.completions:
            await completion.cancelled.wait()


async def begun(engine: ScriptedEngine, count: int) -> None:
    async with asyncio.timeout(10):
        while len(engine.completions) < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(address: str, engine: ScriptedEngine, stream: bool) -> None:
    engine.gate = asyncio.Event()
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(f"{address}/v1/chat/completions", json=chat(stream=stream, n=2)))
        await begun(engine, 2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await all_cancelled(engine)
    assert [c.given for c in engine.completions] == [[], []]


async def test_in_the_middle_of_a_stream(address: str, engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    engine.gate.set()
    body = chat(stream=True, n=2, ignore_eos=True, max_tokens=200)
    async with httpx.AsyncClient() as client, client.stream(
            "POST", f"{address}/v1/chat/completions", json=body) as answer:
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        engine.gate.clear()
    await all_cancelled(engine)
    given = [len(c.given) for c in engine.completions]
    engine.gate.set()
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{address}/health/ready")).status_code == 200
    assert [len(c.given) for c in engine.completions] == given
    assert all(n < 200 for n in given)


async def test_streams_over_a_connection_are_server_sent_events(address: str) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{address}/v1/chat/completions", json=chat(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all(e.startswith("data: {") for e in events[:-1])
