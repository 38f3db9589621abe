"""However a request ends, everything that it began ends with it; a server that stops can end all of them."""

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.engines.data import Generation
from server.errors import ShuttingDown
from server.requests.runs import Runs
from server.text.vocabulary import Vocabulary
from steering.language.errors import EngineUnavailable
from tests.leaving import leaving_at
from tests.server.conftest import chat
from tests.server.scripted import ScriptedCompletion, ScriptedEngine


def runs_of(app: FastAPI) -> Runs:
    found: Runs = app.state.server.runs
    return found


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_that_is_refused_ends_those_before_it(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                             monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    begin = engine.generate

    def third_fails(generation: Generation) -> ScriptedCompletion:
        if len(engine.completions) == 2:
            raise EngineUnavailable("no more")
        return begin(generation)

    monkeypatch.setattr(engine, "generate", third_fails)
    answer = await client.post("/v1/chat/completions", json=chat(n=4, stream=stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert [c.cancelled.is_set() for c in engine.completions] == [True, True]


async def test_a_choice_that_finds_no_room_ends_all(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.full = True
    answer = await client.post("/v1/chat/completions", json=chat(n=3))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "slots_exhausted")
    assert len(engine.completions) == 3 and all(c.cancelled.is_set() for c in engine.completions)


async def test_open_requests_are_failed_and_new_ones_refused(app: FastAPI, client: httpx.AsyncClient,
                                                             engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    whole = asyncio.create_task(client.post("/v1/chat/completions", json=chat(n=2)))
    await until(lambda: len(engine.completions) == 2 and len(runs_of(app)) == 1)
    runs_of(app).refuse(lambda: ShuttingDown("the server stops", retry_after_s=5))
    refused = await client.post("/v1/chat/completions", json=chat())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["Retry-After"] == "5"
    assert not whole.done(), "what is open goes on until it is failed"
    assert runs_of(app).fail(lambda: ShuttingDown("it took too long")) == 1
    answer = await whole
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert all(c.cancelled.is_set() for c in engine.completions[:2])
    assert len(runs_of(app)) == 0


class Gate(asyncio.Event):
    """Lets some tokens through, then no more."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.left = tokens

    async def wait(self) -> Any:
        self.left -= 1
        return self.left >= 0 or await super().wait()


async def test_a_stream_that_is_failed_gives_its_text_then_the_error_then_the_end(
        app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine, vocabulary: Vocabulary) -> None:
    engine.gate = Gate(5)
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat(
        stream=True, ignore_eos=True, max_tokens=50)))
    await until(lambda: engine.completions and len(engine.completions[0].given) == 5)
    runs_of(app).fail(lambda: ShuttingDown("it took too long"))
    events = [line.removeprefix("data: ") for line in (await asking).text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "shutting_down"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-2])
    assert text == vocabulary.decode(engine.completions[0].given) != ""
    assert engine.completions[0].cancelled.is_set()


@pytest.mark.parametrize("fields", [{"n": 3}, {"n": 2, "stream": True}, {"n": 1, "stop": ["day"]}],
                         ids=["whole", "streamed", "stopped by a text"])
async def test_a_request_that_leaves_at_any_await_leaves_nothing(app: FastAPI, client: httpx.AsyncClient,
                                                               engine: ScriptedEngine, fields: dict[str, Any]) -> None:
    async def ask(number: int) -> httpx.Response:
        answer: httpx.Response = await leaving_at(client.post("/v1/chat/completions", json=chat(**fields)), number)
        return answer

    before = asyncio.all_tasks()
    for number in itertools.count():
        task = asyncio.create_task(ask(number))
        await asyncio.wait({task}, timeout=30)
        assert task.done()
        await until(lambda: asyncio.all_tasks() <= before)
        assert len(runs_of(app)) == 0
        queue = app.state.server.queue
        assert not +queue._totals and not any(+own for own in queue._own.values())
        assert not queue._fair.waiting and not queue._fair._root.running
        assert all(c.cancelled.is_set() for c in engine.completions)
        if not task.cancelled():
            break
    assert number > 5 and task.result().status_code == 200
