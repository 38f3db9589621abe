"""Chat through the unmodified `openai` client: what is sent reaches the engine, what comes back is OpenAI's."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.requests.sampling import choice_seed
from steering.language.errors import TrimtabError
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine

HI: Any = [{"role": "user", "content": "hi"}]
STEER = {"steering": {"interventions": [
    {"op": "add", "inline": {"vector": {"1": [1.0] * 8}}, "strength": 2,
     "scope": {"prompt": {"positions": [-1]}, "generation": "all"}}]}}


@pytest.fixture
async def api(app: FastAPI) -> AsyncIterator[AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False))
    async with app.router.lifespan_context(app), AsyncOpenAI(
            base_url="http://localhost/v1", api_key="any", http_client=http, max_retries=0) as found:
        yield found


async def joined(api: AsyncOpenAI, **fields: Any) -> tuple[dict[int, str], list[ChatCompletionChunk]]:
    chunks = [chunk async for chunk in await api.chat.completions.create(stream=True, **fields)]
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


async def test_whole(api: AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI)
    assert isinstance(answer, ChatCompletion)
    assert answer.choices[0].message.content == " good day"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 3, 9)


async def test_the_receipt_of_an_unsteered_answer_says_so(api: AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI)
    assert answer.model_extra is not None
    assert answer.model_extra["steering"] == {"applied": [], "disabled": False, "reason": None, "presets": {},
                                              "engine": "scripted", "report": "none", "effects": None, "outcomes": None,
                                              "monitor": [], "guard_checks": [None], "switched_off": [None],
                                              "sections": [], "contrast": None, "rollouts": [], "warnings": []}


async def test_steered_whole(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI, extra_body=STEER)
    assert answer.choices[0].message.content == " bad day"
    [applied] = (answer.model_extra or {})["steering"]["applied"]
    assert applied == {
        "artifact": "inline", "card": None, "source": "request", "op": "add", "sites": ["resid_post"], "layers": [1],
        "strength": {"value": 2.0, "unit": "raw", "scale": {"1": 2.0}},
        "options": {"norm_match": False, "preserve_norm": False},
        "tokens": {"prompt": 1, "generation": 2}, "gate": None,
        "choices": [{"index": 0, "prompt": 1, "generation": 2, "positions": None, "guard": [],
                     "gate": None, "step": None}]}
    program = engine.completions[0].generation.program
    assert program is not None and program.compiled[0].op == "add"


@pytest.mark.parametrize("steering", [{}, STEER], ids=["base", "steered"])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"max_tokens": 1}, {"stop": "d d"}, {"stop": ["zz", "ay"]},
                                    {"logprobs": True, "top_logprobs": 2}, {"max_completion_tokens": 2}],
                         ids=lambda f: "+".join(f) or "plain")
async def test_stream_equals_whole(api: AsyncOpenAI, steering: Any, fields: Any) -> None:
    whole = await api.chat.completions.create(model=MODEL, messages=HI, extra_body=steering, **fields)
    texts, chunks = await joined(api, model=MODEL, messages=HI, extra_body=steering, **fields)
    assert texts == {c.index: c.message.content for c in whole.choices}
    reasons = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert (chunks[-1].model_extra or {})["steering"] == (whole.model_extra or {})["steering"]
    assert all("steering" not in (chunk.model_extra or {}) for chunk in chunks[:-1])
    if fields.get("logprobs"):
        entries = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
        assert whole.choices[0].logprobs is not None
        assert entries == whole.choices[0].logprobs.content


async def test_usage_comes_last_in_streams_when_asked_for(api: AsyncOpenAI) -> None:
    _, chunks = await joined(api, model=MODEL, messages=HI, stream_options={"include_usage": True}, n=2)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
    assert "steering" in (chunks[-1].model_extra or {})
    assert all(chunk.usage is None for chunk in chunks[:-1])
    _, chunks = await joined(api, model=MODEL, messages=HI)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_every_sampling_parameter_reaches_the_engine(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    await api.chat.completions.create(
        model=MODEL, messages=HI, temperature=0.5, top_p=0.9, presence_penalty=0.25, frequency_penalty=-0.5, seed=7,
        logit_bias={"5": 3, "6": -100}, max_completion_tokens=9, logprobs=True, top_logprobs=4,
        extra_body={"top_k": 11, "min_p": 0.125, "repetition_penalty": 1.5, "ignore_eos": True})
    got = engine.completions[0].generation.sampling
    assert (got.temperature, got.top_p, got.presence_penalty, got.frequency_penalty, got.seed, got.logit_bias,
            got.max_tokens, got.logprobs, got.top_k, got.min_p, got.repetition_penalty, got.ignore_eos) == (
                0.5, 0.9, 0.25, -0.5, 7, {5: 3.0, 6: -100.0}, 9, 4, 11, 0.125, 1.5, True)


async def test_defaults(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    await api.chat.completions.create(model=MODEL, messages=HI)
    got = engine.completions[0].generation
    assert (got.sampling.temperature, got.sampling.top_p, got.sampling.seed, got.sampling.logprobs) == (
        1.0, 1.0, None, None)
    # What the context leaves.
    assert got.sampling.max_tokens == engine.facts.context_length - len(got.prompt_ids)
    assert got.sampling.stop_token_ids and got.program is None and got.roles is None


async def test_choices_have_seeds_of_their_own(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    await api.chat.completions.create(model=MODEL, messages=HI, n=4, seed=-3)
    seeds = [c.generation.sampling.seed for c in engine.completions]
    assert seeds == [choice_seed(-3, i) for i in range(4)]
    assert seeds[0] == -3 and len(set(seeds)) == 4
    assert len({c.generation.request_id for c in engine.completions}) == 4


async def test_a_stop_string_ends_the_engines_work(api: AsyncOpenAI, engine: ScriptedEngine, vocabulary: Any) -> None:
    engine.script = lambda _: vocabulary.encode("one STOP two three", special_tokens=False)
    answer = await api.chat.completions.create(model=MODEL, messages=HI, stop="STOP")
    assert answer.choices[0].message.content == "one "
    assert answer.choices[0].finish_reason == "stop"
    assert engine.completions[0].cancelled.is_set()
    assert answer.usage is not None and answer.usage.completion_tokens == len(engine.completions[0].given)
    assert len(engine.completions[0].given) < len(engine.script(engine.completions[0].generation))


async def test_text_of_many_bytes_streams_as_it_is_whole(api: AsyncOpenAI, engine: ScriptedEngine,
                                                        vocabulary: Any) -> None:
    text = "na\u00efve \U0001f600 \u65e5\u672c STO \u00e9"
    engine.script = lambda _: vocabulary.encode(text, special_tokens=False)
    texts, chunks = await joined(api, model=MODEL, messages=HI, stop="STOP")
    assert texts[0] == text
    assert all("\ufffd" not in (c.delta.content or "") for chunk in chunks for c in chunk.choices)


async def test_logprobs(api: AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and answer.usage is not None
    assert [e.token for e in logprobs.content] == [" good", " day", "<|eos|>"]
    assert [e.logprob for e in logprobs.content] == [-0.25, -0.5, -0.75]
    assert logprobs.content[0].bytes == list(b" good")
    assert [(t.token, t.logprob) for t in logprobs.content[0].top_logprobs] == [("<|bos|>", -0.5), ("<|eos|>", -1.5)]
    assert len(logprobs.content) == answer.usage.completion_tokens


async def test_parts_and_developer_messages(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    await api.chat.completions.create(model=MODEL, messages=[
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}])
    await api.chat.completions.create(model=MODEL, messages=[
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    first, second = (c.generation.prompt_ids for c in engine.completions)
    assert first == second


async def test_roles_reach_the_engine_when_a_scope_names_them(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    scope = {"prompt": {"roles": ["user"]}, "generation": "none"}
    spec = {"interventions": [{**STEER["steering"]["interventions"][0], "scope": scope}], "report": "tokens"}
    answer = await api.chat.completions.create(model=MODEL, messages=HI, extra_body={"steering": spec})
    assert engine.completions[0].generation.roles == ["preamble", *["user"] * 4, "assistant"]
    [applied] = (answer.model_extra or {})["steering"]["applied"]
    assert applied["tokens"] == {"prompt": 4, "generation": 0}
    assert applied["choices"][0]["positions"] == [1, 2, 3, 4]


async def test_harmless_fields_are_taken(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(
        user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, modalities=["text"],
        response_format={"type": "text"}, tool_choice="none", tools=None, safety_identifier="x"))
    assert answer.status_code == 200


async def test_errors_are_those_of_the_client(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await api.chat.completions.create(model="other", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        await api.chat.completions.create(model=MODEL, messages=HI, tools=[
            {"type": "function", "function": {"name": "f"}}])
    assert refused.value.code == "unsupported_parameter" and refused.value.param == "tools"
    engine.full = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as full:
            await api.chat.completions.create(model=MODEL, messages=HI, n=2, stream=stream)
        assert full.value.status_code == 503 and full.value.code == "slots_exhausted"


async def test_what_fails_in_a_stream_is_said_in_the_stream(api: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.fails_at = 1
    with pytest.raises(openai.APIError) as typed:
        await joined(api, model=MODEL, messages=HI)
    assert "the engine fell over" in typed.value.message
    engine.failure = RuntimeError("secret path /etc")
    with pytest.raises(openai.APIError) as unexpected:
        await joined(api, model=MODEL, messages=HI)
    assert "secret" not in unexpected.value.message and "req-" in unexpected.value.message


@pytest.mark.parametrize("failure", [TrimtabError("the engine fell over"), RuntimeError("secret path /etc")])
async def test_a_stream_that_fails_ends_with_its_error_and_done(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                                failure: Exception) -> None:
    engine.fails_at, engine.failure = 1, failure
    events = (await client.post("/v1/chat/completions", json=chat(stream=True))).text.strip().split("\n\n")
    assert '"delta"' in events[0] and len(events) == 3
    error = json.loads(events[1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"], set(error)) == ("internal_error", "server_error",
                                                          {"message", "type", "param", "code"})
    assert events[2] == "data: [DONE]"
    assert 'trimtab_refusals_total{code="internal_error"} 1.0' in (await client.get("/metrics")).text


async def test_unexpected_errors_leak_nothing(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fails_at, engine.failure = 0, RuntimeError("secret path /etc")
    answer = await client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text and answer.headers["x-request-id"] in answer.text
