"""`/v1/messages` in Anthropic's shape. tests/clients/real has the same through Anthropic's own package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.requests.generate import Run
from server.requests.messages import MessagesRequest
from server.settings import Settings
from steering.language.errors import TrimtabError
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_responses import LOOKUP

PATH = "/v1/messages"
SPEC = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}]}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}], **fields}


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post(PATH, json=body(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, content = block.split("\n")
        events.append(json.loads(content.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_whole_and_streamed_are_one(client: httpx.AsyncClient) -> None:
    whole = (await client.post(PATH, json=body(steering=SPEC))).json()
    first, start, *changes, stop, delta, last = await streamed(client, steering=SPEC)
    assert (first["type"], first["message"]["content"], first["message"]["stop_reason"]) == ("message_start", [], None)
    assert (start["type"], start["index"]) == ("content_block_start", 0)
    assert {c["type"] for c in changes} == {"content_block_delta"}
    assert [e["type"] for e in (stop, delta, last)] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(c["delta"]["text"] for c in changes)
    assert whole["content"] == [{"type": "text", "text": text}] == [{"type": "text", "text": " bad day"}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"] == whole["usage"] and whole["usage"]["output_tokens"] > 1
    assert delta["steering"] == whole["steering"] and whole["steering"]["applied"][0]["tokens"]["prompt"] > 0


async def test_why_it_ended(client: httpx.AsyncClient) -> None:
    cut = (await client.post(PATH, json=body(max_tokens=2))).json()
    assert cut["stop_reason"] == "max_tokens"
    stopped = (await client.post(PATH, json=body(stop_sequences=["zzz", "day"]))).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "day")


async def test_the_prompt_is_that_of_a_chat_and_is_counted(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/v1/chat/completions", json=chat(messages=[
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hey"}, {"role": "user", "content": "so"}]))
    given = body(system=[{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
                         {"type": "text", "text": "kind."}], messages=[
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "hey"},
        {"role": "user", "content": "so"}])
    answer = await client.post(PATH, json=given)
    ids = engine.completions[1].generation.prompt_ids
    assert engine.completions[0].generation.prompt_ids == ids
    del given["max_tokens"]
    counted = await client.post(f"{PATH}/count_tokens", json=given)
    assert counted.json() == {"input_tokens": len(ids)}
    assert answer.json()["usage"]["input_tokens"] == len(ids)


async def test_thought_and_calls(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Run.pieces

    async def written(self: Run) -> Any:
        async for piece in pieces(self):
            if piece.finish_reason is not None:
                for delta in LOOKUP:
                    yield replace(piece, delta=delta, finish_reason=None)
                yield replace(piece, finish_reason="tool_calls")

    monkeypatch.setattr(Run, "pieces", written)
    whole = (await client.post(PATH, json=body())).json()
    assert whole["stop_reason"] == "tool_use"
    assert whole["content"] == [
        {"type": "thinking", "thinking": "so then", "signature": ""}, {"type": "text", "text": "Well now"},
        {"type": "tool_use", "id": "call_1", "name": "look", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "see", "input": {}}]
    events = await streamed(client)
    arguments = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"
                 and e["delta"]["type"] == "input_json_delta"]
    assert arguments == ['{"a"', ": 1}", "{}"]
    edges = [(e["type"], e["index"]) for e in events if e["type"] in ("content_block_start", "content_block_stop")]
    assert edges == [(f"content_block_{what}", n) for n in range(4) for what in ("start", "stop")]
    # And back again.
    given = MessagesRequest.model_validate(body(messages=[
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                                     {"type": "tool_result", "tool_use_id": "call_2", "is_error": False},
                                     {"type": "text", "text": "so?"}]}]))
    *_, said, first, second, user = given.as_chat()["messages"]
    assert said["reasoning"] == "so then" and [c["id"] for c in said["tool_calls"]] == ["call_1", "call_2"]
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert (first["role"], first["content"], second["content"], user["content"]) == ("tool", "rain", "", "so?")


def test_tools_are_those_of_a_chat() -> None:
    tool = {"name": "look", "description": "d", "input_schema": {"type": "object"}}
    for choice, meant in (({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"),
                          ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}})):
        found = MessagesRequest.model_validate(body(tools=[tool], tool_choice=choice)).as_chat()
        assert found["tool_choice"] == meant
        assert found["tools"] == [{"type": "function", "function": {
            "name": "look", "description": "d", "parameters": {"type": "object"}}}]


async def test_errors_are_in_its_shape(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for fields, kind, param in (({"max_tokens": 0}, "invalid_request_error", "max_tokens"),
                                ({"model": "x"}, "not_found_error", "model"),
                                ({"container": "c"}, "invalid_request_error", "container")):
        found = (await client.post(PATH, json=body(**fields))).json()
        assert (found["type"], found["error"]["type"], found["error"]["param"]) == ("error", kind, param)
    engine.fails_at, engine.failure = 2, TrimtabError("the engine fell over")
    last = (await streamed(client))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error") and "fell over" in last["error"]["message"]


class TestWithAKey:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("k"))

    async def test_the_key_may_come_in_the_header_of_its_clients(self, client: httpx.AsyncClient) -> None:
        for headers, status in (({"x-api-key": "k"}, 200), ({"x-api-key": "other"}, 401), ({"x-api-key": ""}, 401),
                                ({"Authorization": "Bearer k"}, 200), ({}, 401)):
            answer = await client.post(PATH, json=body(), headers=headers)
            assert answer.status_code == status, headers
        assert answer.json()["error"]["type"] == "authentication_error"
