"""Work that waits for a database takes its threads from nobody else."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi._compat.v2 import ModelField

from server.api.route import AT_ONCE_BYTES
from server.api.strict_json import parse_json
from server.http.runner import settle
from server.requests.pools import UPLOADS
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library

MORE_THAN_THE_POOL = 45


@pytest.fixture
def stuck(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Changes of the library wait until the test is over; released once per call that waits."""
    waiting, go_on = threading.Semaphore(0), threading.Event()

    def wait(*_: object, **__: object) -> None:
        waiting.release()
        go_on.wait(60)
        raise RuntimeError("over")

    monkeypatch.setattr(library, "patch", wait)
    yield waiting
    go_on.set()


async def test_completions_and_health_go_on_beside_a_locked_library(client: httpx.AsyncClient,
                                                                    stuck: threading.Semaphore) -> None:
    patches = [asyncio.create_task(client.patch("/v1/artifacts/a", json={"description": "x"}))
               for _ in range(MORE_THAN_THE_POOL)]
    try:
        for _ in range(40):
            while not stuck.acquire(blocking=False):
                await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            answers = [await client.get(path) for path in ("/health", "/health/ready", "/metrics")]
            answers.append(await client.post("/v1/chat/completions", json=chat()))
            answers.append(await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"}))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert not any(task.done() for task in patches)
    finally:
        for task in patches:
            task.cancel()


async def test_uploads_wait_their_turn_unread(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Semaphore(0), threading.Event()
    read = 0

    def held(*_: object) -> None:
        reading.release()
        go_on.wait(60)
        raise RuntimeError("over")

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"x"

    monkeypatch.setattr("server.api.library.artifacts._import", held)
    headers = {"Content-Type": "application/octet-stream"}
    uploads = [asyncio.create_task(client.post("/v1/artifacts/import", content=body(), headers=headers))
               for _ in range(UPLOADS + 3)]
    for _ in range(UPLOADS):
        while not reading.acquire(blocking=False):
            await asyncio.sleep(0.001)
    assert read == UPLOADS
    go_on.set()
    await asyncio.gather(*uploads)
    assert read == UPLOADS + 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_long_answers_are_built_off_the_event_loop(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch,
                                                         path: str) -> None:
    """Every alternative of every token is spelt in a thread."""
    spelling, threads = Vocabulary.token_text, set()

    def spelt(self: Vocabulary, token_id: int) -> str:
        threads.add(threading.get_ident())
        return spelling(self, token_id)

    monkeypatch.setattr(Vocabulary, "token_text", spelt)
    body = chat(logprobs=True, top_logprobs=20) if "chat" in path else {"model": "tiny", "prompt": "a", "logprobs": 20}
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert threads and threading.get_ident() not in threads


async def test_the_event_loop_goes_on_while_a_long_body_is_read(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader waits for what only the event loop does; on the loop it would wait in vain. A short body is read at
    once."""
    served, threads = threading.Event(), []

    def held(body: bytes, **how: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        if len(body) > AT_ONCE_BYTES:
            assert served.wait(30)
        return parse_json(body, **how)

    monkeypatch.setattr("server.api.route.parse_json", held)
    validate = ModelField.validate

    def validated(self: ModelField, value: Any, *rest: Any, **how: Any) -> Any:
        if isinstance(value, dict) and len(value["prompt"]) > 1:
            threads.append(threading.current_thread() is threading.main_thread())
        return validate(self, value, *rest, **how)

    monkeypatch.setattr(ModelField, "validate", validated)
    reading = asyncio.create_task(client.post("/v1/completions", json={
        "model": MODEL, "prompt": [[7]] * 4 + [[1, 2, 3] * 5000] * 2, "max_tokens": 2}))
    async with asyncio.timeout(60):
        while not threads:
            await asyncio.sleep(0.002)
    assert (await client.post("/v1/completions", json={"model": MODEL, "prompt": [7], "max_tokens": 1})
            ).status_code == 200
    assert not reading.done()
    served.set()
    assert (await reading).status_code == 400, "more prompts than the server allows, which the route itself tells"
    assert threads == [False, True, False]


@pytest.mark.parametrize("fields", [
    {"prompt": [7] * 20_000 + ["x"]}, {"steering": {"x": "y" * 40_000}},
    {"max_tokens": "much", "prompt": "x" * 40_000}, {"prompt": None, "stop": ["y" * 40_000]}], ids=lambda f: [*f][0])
async def test_a_long_body_gets_the_errors_of_a_short_one(client: httpx.AsyncClient, fields: dict[str, Any],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for limit in (AT_ONCE_BYTES, 2**30):
        monkeypatch.setattr("server.api.route.AT_ONCE_BYTES", limit)
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})
        answers.append((answer.status_code, answer.json()))
    assert answers[0] == answers[1] and answers[0][0] == 400


def test_what_is_there_at_the_start_is_not_looked_through() -> None:
    before = len(gc.get_objects())
    try:
        settle()
        assert gc.get_freeze_count() > before / 2 and len(gc.get_objects()) < before / 10
    finally:
        gc.unfreeze()
