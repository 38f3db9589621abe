"""Prompts given back with their log-probabilities, as harnesses for evaluation ask for them."""

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from server.text.vocabulary import Vocabulary
from steering.language.errors import SteeringOverflow
from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine
from tests.server.test_chat import api  # noqa: F401

PATH = "/v1/completions"
SPEC = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}]}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hey", "max_tokens": 2, "temperature": 0, **fields}


async def asked(client: httpx.AsyncClient, **fields: Any) -> Any:
    answer = await client.post(PATH, json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_prompt_stands_in_front_with_its_log_probabilities(client: httpx.AsyncClient, vocabulary: Vocabulary,
                                                                    engine: ScriptedEngine) -> None:
    plain = (await asked(client, logprobs=2))["choices"][0]
    choice = (await asked(client, logprobs=2, echo=True))["choices"][0]
    ids = vocabulary.encode("hey", special_tokens=True)
    logprobs, own = choice["logprobs"], plain["logprobs"]
    assert choice["text"] == "hey" + plain["text"]
    assert engine.scored == [(ids, None)]
    assert logprobs["token_logprobs"] == [None, *[-float(t) for t in range(1, len(ids))], *own["token_logprobs"]]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][len(ids):] == own["top_logprobs"]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["tokens"] == [vocabulary.token_text(i) for i in ids] + own["tokens"]
    text = choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("<") or text[offset:].startswith(token), (token, offset)
    # Without echo nothing is scored.
    assert len(engine.scored) == 1


async def test_no_tokens_at_all(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    found = await asked(client, max_tokens=0, echo=True, logprobs=1, prompt=["ab", "abc"], n=2, steering=SPEC)
    assert not engine.completions and len(engine.scored) == 2
    assert all(program is not None for _, program in engine.scored)
    assert [c["finish_reason"] for c in found["choices"]] == ["length"] * 4
    assert found["usage"]["completion_tokens"] == 0
    for choice, (ids, _) in zip(found["choices"][::2], engine.scored, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids)
    receipt = found["steering"]["applied"][0]
    assert [c["prompt"] for c in receipt["choices"]] == [len(ids) for ids, _ in engine.scored for _ in range(2)]
    assert receipt["tokens"]["generation"] == 0
    bare = await asked(client, max_tokens=0, steering=SPEC)
    assert (bare["choices"][0]["text"], bare["steering"]["applied"][0]["tokens"]["prompt"]) == ("", 0)


async def test_a_prompt_that_fills_the_context_can_be_scored(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    full = [5] * engine.room
    assert await asked(client, max_tokens=0, echo=True, logprobs=0, prompt=full)
    for fields in ({"max_tokens": 1}, {"prompt": [5] * (engine.room + 1)}):
        answer = await client.post(PATH, json=body(**{"max_tokens": 0, "echo": True, "prompt": full, **fields}))
        assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_stream_brings_the_same(api: AsyncOpenAI) -> None:  # noqa: F811
    fields: Any = body(echo=True, logprobs=2, prompt=["hé🙂", "hey"], n=2)
    whole = await api.completions.create(**fields)
    texts, entries = {}, {}
    async for chunk in await api.completions.create(stream=True, **fields):
        for c in chunk.choices:
            texts[c.index] = texts.get(c.index, "") + c.text
            if c.logprobs:
                told = c.logprobs
                entries.setdefault(c.index, []).extend(zip(told.tokens or [], told.text_offset or [],
                                                           told.token_logprobs or [], strict=True))
    for c in whole.choices:
        assert texts[c.index] == c.text and c.logprobs is not None
        assert entries[c.index] == list(zip(c.logprobs.tokens or [], c.logprobs.text_offset or [],
                                            c.logprobs.token_logprobs or [], strict=True))


async def test_parts_of_a_character_keep_their_bytes_and_begin_where_it_does(client: httpx.AsyncClient) -> None:
    logprobs = (await asked(client, prompt="a🙂b", echo=True, logprobs=0))["choices"][0]["logprobs"]
    spelt = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))
    at = spelt.index(("a", 0))
    assert spelt[at + 1:at + 6] == [("bytes:\\xf0", 1), ("bytes:\\x9f", 1), ("bytes:\\x99", 1), ("bytes:\\x82", 1),
                                    ("b", 2)]


async def test_tokens_of_one_text_are_all_told(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vocabulary, "token_text", lambda self, i: "same")
    monkeypatch.setattr(Vocabulary, "token_bytes", lambda self, i: list(b"same"))
    top = (await asked(client, echo=True, logprobs=3))["choices"][0]["logprobs"]["top_logprobs"][1]
    assert set(top) == {"same", "token_id:1", "token_id:2"} and len(set(top.values())) == 3


async def test_prompt_logprobs_by_token_id(client: httpx.AsyncClient, vocabulary: Vocabulary) -> None:
    found = (await asked(client, prompt_logprobs=1, prompt=[5, 6, 7]))["choices"][0]
    assert "logprobs" not in found or found["logprobs"] is None
    first, *rest = found["prompt_logprobs"]
    assert first is None
    for t, (token, entry) in enumerate(zip((6, 7), rest, strict=True), start=1):
        assert entry == {str(token): {"logprob": -t, "rank": 7, "decoded_token": vocabulary.token_text(token)},
                         "0": {"logprob": -1 / 16, "rank": 1, "decoded_token": vocabulary.token_text(0)}}
    answer = await client.post(PATH, json=body(prompt_logprobs=1, stream=True))
    assert answer.status_code == 400 and "stream" in answer.json()["error"]["message"]


async def test_what_the_engine_says_of_an_intervention_is_told_in_the_requests_words(
        client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def score(*given: Any, **fields: Any) -> Any:
        raise SteeringOverflow("too much", param=("interventions", 0))

    monkeypatch.setattr(engine, "score", score)
    for stream in (False, True):
        answer = await client.post(PATH, json=body(echo=True, logprobs=1, steering=SPEC, stream=stream))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "steering_overflow",
                                                                      "steering.interventions[0]")


async def test_the_kill_switch_holds_scores_back_too(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.put("/v1/admin/kill-switch", json={"on": True})
    found = await asked(client, max_tokens=0, echo=True, logprobs=1, steering=SPEC)
    assert found["steering"]["disabled"] and engine.scored[0][1] is None
