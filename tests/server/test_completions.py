"""Plain completions: the four forms of prompts, choices, log-probabilities, streams."""

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine
from tests.server.test_chat import api  # noqa: F401


@pytest.mark.parametrize(("prompt", "count"), [("hello world", 1), (["hello", "hello world"], 2), ([5, 6, 7], 1),
                                               ([[5, 6], [7]], 2)])
async def test_prompts(client: httpx.AsyncClient, engine: ScriptedEngine, vocabulary: Any, prompt: Any, count: int
                       ) -> None:
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "n": 2})
    assert answer.status_code == 200
    assert [c["index"] for c in answer.json()["choices"]] == list(range(2 * count))
    given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    wanted = [vocabulary.encode(p, special_tokens=True) if isinstance(p, str) else p for p in given]
    assert [c.generation.prompt_ids for c in engine.completions] == [ids for ids in wanted for _ in range(2)]
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, wanted))
    assert engine.completions[0].generation.sampling.max_tokens == 16


async def test_prompts_of_one_request_are_seeded_as_alone(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/v1/completions", json={"model": MODEL, "prompt": ["a", "b"], "n": 2, "seed": 3})
    await client.post("/v1/completions", json={"model": MODEL, "prompt": "b", "n": 2, "seed": 3})
    seeds = [c.generation.sampling.seed for c in engine.completions]
    assert seeds[:2] == seeds[2:4] == seeds[4:]


async def test_whole_and_stream_through_the_client(api: AsyncOpenAI) -> None:  # noqa: F811
    fields: Any = {"model": MODEL, "prompt": ["hello", "x"], "logprobs": 1, "n": 2, "stop": ["day"]}
    whole = await api.completions.create(**fields)
    texts, tokens, reasons = {}, {}, {}
    chunks = [c async for c in await api.completions.create(stream=True, **fields)]
    for chunk in chunks:
        for c in chunk.choices:
            texts[c.index] = texts.get(c.index, "") + c.text
            if c.logprobs:
                tokens.setdefault(c.index, []).extend(zip(c.logprobs.tokens or [], c.logprobs.text_offset or [],
                                                          strict=True))
            if c.finish_reason:
                reasons[c.index] = c.finish_reason
    assert texts == {c.index: c.text for c in whole.choices} == dict.fromkeys(range(4), " good ")
    assert reasons == {c.index: "stop" for c in whole.choices}
    for c in whole.choices:
        assert c.logprobs is not None
        assert tokens[c.index] == list(zip(c.logprobs.tokens or [], c.logprobs.text_offset or [], strict=True))
    assert (chunks[-1].model_extra or {})["steering"] == (whole.model_extra or {})["steering"]


async def test_empty_text_and_what_is_not_offered_are_refused_by_name(client: httpx.AsyncClient) -> None:
    for fields, param in (({"prompt": ""}, "prompt"),
                          ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 2}, "best_of"),
                          ({"prompt": ["a", ""]}, "prompt[1]")):
        answer = await client.post("/v1/completions", json={"model": MODEL, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_scopes_cannot_name_roles(client: httpx.AsyncClient) -> None:
    spec = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}},
                               "scope": {"prompt": {"roles": ["user"]}}}]}
    answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "steering": spec})
    assert answer.status_code == 400 and "roles" in answer.json()["error"]["message"]


async def test_bias_of_nothing_and_zero_temperature(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"model": MODEL, "prompt": "a", "logit_bias": {}, "temperature": 0}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    sampling = engine.completions[0].generation.sampling
    assert sampling.temperature == 0 and sampling.logit_bias == {}
