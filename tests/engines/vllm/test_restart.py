"""vLLM's process dies under a running server: typed errors at once, a restart under back-off, right answers after."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.engines.vllm.host import engine as engine_module
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.host.selftest import run_selftest
from server.engines.vllm.host.serving import Serving
from steering.language.errors import EngineUnavailable
from steering.models.facts import ModelFacts
from tests.engines.vllm.apps import client_of, make_app
from tests.engines.vllm.conftest import options
from tests.engines.vllm.same import CHAT, TURNS, answer, requests_of, same_numbers, store

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
NAME = "lab-dense"


@dataclass
class Server:
    client: httpx.AsyncClient
    engine: VllmEngine
    library: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder: Path = tmp_path_factory.mktemp("restart")
    # Two attempts to start again are made to fail below.
    engine = VllmEngine(options(NAME, eager=True, back_off_s=(0.0, 0.05, 0.0)))
    app = make_app(NAME, engine, "vllm", folder)
    async with client_of(app) as client:
        yield Server(client, engine, app.state.server.library)


@pytest.mark.parametrize("part", [
    {"type": "integer", "multipleOf": 3}, {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "string", "pattern": "^(?=a)b$"}, {"$ref": "#/$defs/nothing"},
    {"type": "integer", "minimum": 5, "maximum": 2}])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_schema_that_cannot_be_held_to_is_no_outage(server: Server, part: dict[str, Any], stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": part}, "required": ["a"]}
    response = await server.client.post(CHAT, json=long_body(stream=stream, max_tokens=8, response_format={
        "type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "response_format.json_schema.schema")
    assert server.engine.alive


async def test_kill_and_come_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    client, engine = server.client, server.engine
    ref = store(server.library, engine.facts)
    bodies = [body | {"model": NAME} for body in requests_of(engine.facts.d_model, 0)]
    before = [await answer(client, body) for body in bodies]

    # The first two attempts to start again fail, and the third waits until the test has looked around.
    attempts: list[int] = []
    go = asyncio.Event()
    launch = engine.connection._launch

    async def launching() -> None:
        attempts.append(len(attempts))
        if len(attempts) <= 2:
            raise RuntimeError("no memory yet")
        await go.wait()
        await launch()

    proofs: list[bool] = []

    async def proving(serving: Serving, facts: ModelFacts) -> ModelFacts:
        proofs.append(serving.connection.alive)
        return await run_selftest(serving, facts)

    monkeypatch.setattr(engine.connection, "_launch", launching)
    monkeypatch.setattr(engine_module, "run_selftest", proving)
    begun = await first_tokens(client)
    plain = asyncio.ensure_future(client.post(CHAT, json=long_body()))
    steered = asyncio.ensure_future(client.post(CHAT, json=long_body(requests_of(engine.facts.d_model, 0)[3])))
    streams = [asyncio.ensure_future(read_stream(client, long_body(stream=True))) for _ in range(2)]
    # All four are half way, and one of our own calls is as well, which vLLM itself would leave waiting for ever.
    while await first_tokens(client) < begun + 4:
        await asyncio.sleep(0.005)
    call = asyncio.ensure_future(engine.score([5] * 400, full=True))
    await asyncio.sleep(0)
    victim = engine.connection._llm.engine_core.resources.engine_manager.processes[0]
    os.kill(victim.pid, signal.SIGKILL)

    for response in await asyncio.gather(plain, steered):
        assert_unavailable(response)
    for events in await asyncio.gather(*streams):
        assert json.loads(events[-2])["error"]["code"] == "engine_unavailable" and events[-1] == "[DONE]"
    with pytest.raises(EngineUnavailable):
        await call
    # While it is away: typed errors for what needs the model, the rest of the server answers.
    assert_unavailable(await client.post(CHAT, json=long_body()))
    assert_unavailable(await client.post(CHAT, json=long_body(requests_of(engine.facts.d_model, 0)[1])))
    assert_unavailable(await client.get("/health/ready"))
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/v1/artifacts/stored")).status_code == 200
    assert "trimtab_requests" in (await client.get("/metrics")).text
    assert engine.slots.num_pinned == 0 and not engine.connection.running

    while len(attempts) < 3:
        await asyncio.sleep(0.02)
    assert not engine.alive
    go.set()
    while (await client.get("/health/ready")).status_code != 200:
        await asyncio.sleep(0.1)
    after = [await answer(client, body) for body in bodies]
    for one, other in zip(before, after, strict=True):
        for choice, was in zip(other["choices"], one["choices"], strict=True):
            assert choice["message"] == was["message"]
            assert [t["logprob"] for t in choice["logprobs"]["content"]] == pytest.approx(
                [t["logprob"] for t in was["logprobs"]["content"]], abs=1e-4)
        same_numbers(other["steering"]["applied"], one["steering"]["applied"])
    assert server.library.resolve(ref).ref == ref
    assert dict(engine.restarts()) == {"restarting": 1}
    assert proofs == [False], "proven again, before anything was served"


async def first_tokens(client: httpx.AsyncClient) -> int:
    """How many completions have brought a token."""
    found = re.search(r"^trimtab_time_to_first_token_seconds_count (\S+)", (await client.get("/metrics")).text,
                      re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def long_body(body: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {"messages": TURNS, "temperature": 0.0, **(body or {}), "model": NAME, "max_tokens": 400,
            "logit_bias": {"1": -100}, **changes}


async def read_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    response = await client.post(CHAT, json=body)
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def assert_unavailable(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.json()["error"]["code"] == "engine_unavailable"
    # As long as the start took that the fixture waited for, or what is left of that.
    assert 1 <= int(response.headers["Retry-After"]) <= 600
