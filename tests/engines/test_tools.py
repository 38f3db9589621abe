"""Calls of tools that a real engine is made to write, over HTTP: steered, streamed, and by scopes left alone."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from server.app import create_app
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.engines.test_batching import vector
from tests.server.test_tools import ASK, HERMES
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import tiny
from vectors.library import Library

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1,
                                                                                  "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                                        "additionalProperties": False}}}
MODEL = "tiny"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    tokenizer = byte_tokenizer(HERMES)
    tiny("qwen3", vocab_size=len(tokenizer) + 5, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    engine = TransformersEngine(EngineOptions(model=str(tmp_path / "model"), model_id=MODEL, self_test=False,
                                              kv_cache_tokens=8192, max_batch_tokens=256))
    library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
    vocabulary = Vocabulary(tokenizer, [tokenizer.eos_token_id], engine.facts.vocab_size)
    app = create_app(Settings(served_model_name=MODEL, data_dir=tmp_path / "data"), engine, library, vocabulary)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60) as client:
        yield AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)


def body(choice: Any, scope: Any, seed: int) -> dict[str, Any]:
    push = {"op": "add", "layers": [1], "inline": {"vector": vector(1)},
            "scope": {"prompt": "none", "generation": scope}}
    steering = {} if scope is None else {"steering": {"interventions": [push]}}
    return {"model": MODEL, "messages": ASK, "tools": [WEATHER, CLOCK], "tool_choice": choice, "seed": seed,
            "max_tokens": 160, "parallel_tool_calls": False,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": False}, **steering}}


async def test_calls_that_must_come_are_right_steered_or_not_streamed_or_whole(api: AsyncOpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    asked = [body(choice, scope, seed) for seed, (choice, scope) in enumerate(
        [(choice, scope) for choice in ("required", named) for scope in
         (None, "all", {"exclude": {"sections": ["tool_call"]}})])]
    found = await asyncio.gather(*(api.chat.completions.create(**one) for one in asked))
    for one, answer in zip(asked, found, strict=True):
        [call] = answer.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        if call.function.name == "weather":
            assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
        else:
            assert (call.function.name, arguments) == ("clock", {}) and one["tool_choice"] == "required"
        name, pieces, reason = "", "", None
        async for chunk in await api.chat.completions.create(**one, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                name += part.function.name or ""
                pieces += part.function.arguments or ""
            reason = chunk.choices[0].finish_reason or reason
        assert (name, pieces, reason) == (call.function.name, call.function.arguments, "tool_calls")
        applied = answer.model_extra["steering"]["applied"]
        if not applied:
            continue
        # All that comes before the mark is complete is answer; the end token was never fed back.
        everything = applied[0]["tokens"]["generation"] == answer.usage.completion_tokens - 1
        assert everything == (one["extra_body"]["steering"]["interventions"][0]["scope"]["generation"] == "all")
        # The control: without the scope, the call itself is steered as well.
        if not everything:
            assert applied[0]["tokens"]["generation"] == len("<tool_call") + 1


async def test_an_answer_of_a_form_beside_tools_is_a_call_or_has_the_form(api: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(4):
        asked = body("auto", {"exclude": {"sections": ["json", "tool_call"]}}, seed)
        answer = await api.chat.completions.create(**asked, response_format=form, temperature=1.5)
        message = answer.choices[0].message
        if message.tool_calls:
            assert message.content is None and json.loads(message.tool_calls[0].function.arguments) is not None
        else:
            assert json.loads(message.content)["a"] in (1, 2)
