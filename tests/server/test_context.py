"""The context of a request is what the engine can hold, which may be less than the model's."""

import httpx
import pytest

from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine

ROOM = 100


@pytest.fixture(autouse=True)
def _small_cache(engine: ScriptedEngine) -> None:
    assert engine.facts.context_length > ROOM
    engine.room = ROOM


async def test_max_tokens_left_out_is_what_the_engine_can_hold(client: httpx.AsyncClient, engine: ScriptedEngine
                                                               ) -> None:
    body = chat()
    del body["max_tokens"]
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    asked = engine.completions[0].generation
    assert asked.sampling.max_tokens == ROOM - len(asked.prompt_ids)


@pytest.mark.parametrize(("prompt", "max_tokens", "param"), [([5] * ROOM, 1, "prompt"), ([5] * 60, 41, "max_tokens")])
async def test_what_does_not_fit_is_refused_with_the_engines_figure(client: httpx.AsyncClient, prompt: list[int],
                                                                    max_tokens: int, param: str) -> None:
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": max_tokens})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert str(ROOM) in error["message"]
    fits = {"model": MODEL, "prompt": [5] * 60, "max_tokens": 40}
    assert (await client.post("/v1/completions", json=fits)).status_code == 200


async def test_it_is_told(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    told = (await client.get("/v1/capabilities")).json()
    assert (told["context_length"], told["model_context_length"]) == (ROOM, engine.facts.context_length)
    assert [model["max_model_len"] for model in (await client.get("/v1/models")).json()["data"]] == [ROOM]
    assert (await client.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == ROOM
