"""`/v1/responses` through the official package: whole, streamed, stored, gone on from."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError

from server.requests.generate import Run
from server.requests.responses import ResponsesRequest
from server.requests.stored.responses import Stored, StoredResponses
from server.settings import Settings
from server.text.message import CallDelta, Delta
from steering.language.errors import NotFound, TrimtabError
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_chat import api  # noqa: F401

SPEC = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}]}
LOOKUP = [Delta(reasoning="so "), Delta(reasoning="then"), Delta("Well"), Delta(" now"),
          Delta(calls=(CallDelta(0, "call_1", "look"),)), Delta(calls=(CallDelta(0, arguments='{"a"'),)),
          Delta(calls=(CallDelta(0, arguments=": 1}"),)), Delta(calls=(CallDelta(1, "call_2", "see", "{}"),))]


def said(engine: ScriptedEngine, vocabulary: Any, n: int = -1) -> str:
    return str(vocabulary.decode(engine.completions[n].generation.prompt_ids))


async def test_whole_and_streamed_are_one(api: AsyncOpenAI) -> None:  # noqa: F811
    fields: Any = {"model": MODEL, "input": "hi", "max_output_tokens": 8, "temperature": 0,
                   "extra_body": {"steering": SPEC}}
    whole = await api.responses.create(**fields)
    events = [event async for event in await api.responses.create(stream=True, **fields)]
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * (len(events) - 8), "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert whole.output_text == last.response.output_text == " bad day"
    assert (whole.status, last.response.status) == ("completed", "completed")
    assert whole.usage is not None and whole.usage.model_dump() == last.response.usage.model_dump()
    assert (whole.model_extra or {})["steering"] == last.response.model_extra["steering"]
    assert (whole.model_extra or {})["steering"]["applied"][0]["tokens"]["prompt"] > 0
    async with api.responses.stream(**fields) as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == " bad day"


async def test_headers_and_later_receipts(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/responses", json={"model": MODEL, "input": "hi", "steering": SPEC})
    assert answer.headers["X-Trimtab-Applied"].startswith('"inline";op=add;prompt=')
    found = await client.get(f"/v1/receipts/{answer.json()['id']}")
    assert found.json()["applied"][0]["tokens"] == answer.json()["steering"]["applied"][0]["tokens"]


async def test_a_message_with_thought_and_calls(api: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pieces = Run.pieces

    async def written(self: Run) -> Any:
        deltas = iter(LOOKUP)
        async for piece in pieces(self):
            if piece.finish_reason is None:
                continue
            for delta in deltas:
                yield replace(piece, delta=delta, finish_reason=None)
            yield replace(piece, finish_reason="tool_calls")

    monkeypatch.setattr(Run, "pieces", written)
    events = [e async for e in await api.responses.create(model=MODEL, input="hi", stream=True)]
    last: Any = events[-1]
    thought, message, first, second = last.response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "so then")
    assert (message.type, last.response.output_text) == ("message", "Well now")
    assert (first.type, first.call_id, first.name, first.arguments) == ("function_call", "call_1", "look", '{"a": 1}')
    assert (second.call_id, second.arguments) == ("call_2", "{}")
    assert {item.status for item in last.response.output} == {"completed"}
    opened = [(e.type, e.output_index) for e in events if e.type in ("response.output_item.added",
                                                                     "response.output_item.done")]
    assert opened == [(f"response.output_item.{what}", n) for n in range(4) for what in ("added", "done")]
    # What was said can be said again.
    replayed = ResponsesRequest.model_validate({"model": MODEL, "input": [
        *[item.model_dump() for item in last.response.output],
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"}]}).said()
    assert replayed == [
        {"role": "assistant", "content": "Well now", "reasoning": "so then", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "see", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]


async def test_the_prompt_is_that_of_a_chat(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/v1/chat/completions", json=chat(messages=[
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hey"}, {"role": "user", "content": "so"}]))
    await client.post("/v1/responses", json={"model": MODEL, "instructions": "Be kind.", "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "hey", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "so"}]})
    assert engine.completions[0].generation.prompt_ids == engine.completions[1].generation.prompt_ids


async def test_a_conversation_goes_on(api: AsyncOpenAI, engine: ScriptedEngine, vocabulary: Any) -> None:  # noqa: F811
    first = await api.responses.create(model=MODEL, input="one", instructions="Be kind.")
    second = await api.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    await api.responses.create(model=MODEL, input="three", previous_response_id=second.id, store=False)
    text = said(engine, vocabulary)
    assert [text.index(part) for part in ("one", " good day", "two", "three")] == sorted(
        text.index(part) for part in ("one", " good day", "two", "three"))
    assert text.count(" good day") == 2 and "kind" not in text
    assert (await api.responses.retrieve(second.id)).output_text == second.output_text == " good day"
    await api.responses.delete(first.id)
    for gone in (first.id, "resp_0"):
        with pytest.raises(NotFoundError):
            await api.responses.retrieve(gone)
        with pytest.raises(NotFoundError) as caught:
            await api.responses.create(model=MODEL, input="x", previous_response_id=gone)
        assert caught.value.param == "previous_response_id"
    # The one that went on from it has all of it.
    assert (await api.responses.create(model=MODEL, input="x", previous_response_id=second.id)).output_text


async def test_what_is_not_to_be_stored_is_not(api: AsyncOpenAI) -> None:  # noqa: F811
    answer = await api.responses.create(model=MODEL, input="one", store=False)
    with pytest.raises(NotFoundError):
        await api.responses.retrieve(answer.id)


async def test_a_cut_answer_is_incomplete(api: AsyncOpenAI) -> None:  # noqa: F811
    answer = await api.responses.create(model=MODEL, input="one", max_output_tokens=2)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


async def test_cancel(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    engine.held = lambda generation: bool(engine.completions) and len(engine.completions[-1].given) > 1
    asking = asyncio.create_task(client.post("/v1/responses", json={"model": MODEL, "input": "hi"}))
    async with asyncio.timeout(30):
        while not (engine.completions and len(engine.completions[-1].given) > 1):
            await asyncio.sleep(0.005)
        name = engine.completions[-1].generation.request_id.removeprefix("req-").rpartition("-")[0]
        cancelled = await client.post(f"/v1/responses/resp_{name}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        answer = (await asking).json()
    assert answer["status"] == "cancelled" and engine.completions[-1].cancelled.is_set()
    assert (await client.get(f"/v1/responses/{answer['id']}")).json()["status"] == "cancelled"
    engine.gate = None
    ended = (await client.post("/v1/responses", json={"model": MODEL, "input": "hi"})).json()
    again = await client.post(f"/v1/responses/{ended['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "completed")


async def test_failures(api: AsyncOpenAI, engine: ScriptedEngine) -> None:  # noqa: F811
    for fields, param in (({"input": []}, "input"), ({"background": True}, "background"),
                          ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
                          ({"tools": [{"type": "web_search"}]}, "tools"), ({"conversation": "c"}, "conversation")):
        with pytest.raises(BadRequestError) as caught:
            await api.responses.create(**{"model": MODEL, "input": "a", **fields})  # type: ignore[call-overload]
        assert (caught.value.param or "").startswith(param), (fields, caught.value)
    engine.fails_at, engine.failure = 2, TrimtabError("the engine fell over")
    with pytest.raises(APIError, match="fell over"):
        async for _ in await api.responses.create(model=MODEL, input="a", stream=True):
            pass


def test_what_is_stored_is_bounded_in_time_and_bytes(tmp_path: Path) -> None:
    now = 100.0
    store = StoredResponses(f"sqlite:///{tmp_path / 'r.db'}", seconds=10, most_bytes=250, now=lambda: now)

    def there(name: str) -> bool:
        try:
            return store.find(name, "id").response == {"n": name}
        except NotFound:
            return False

    for name in ("a", "b", "c"):
        assert store.keep(name, Stored({"n": name}, [{"content": "x" * 70}]))
        now += 1
    assert [there(name) for name in "abc"] == [False, True, True]
    assert not store.keep("large", Stored({}, [{"content": "x" * 300}])) and there("b")
    now = 111.5
    assert [there(name) for name in "bc"] == [False, True]
    # A server that starts again finds them.
    again = StoredResponses(f"sqlite:///{tmp_path / 'r.db'}", seconds=10, most_bytes=250, now=lambda: now)
    assert again.find("c", "id").messages == [{"content": "x" * 70}]
    again.close()
    store.close()


class TestWithoutADatabase:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data",
                        responses_database_url=f"sqlite:///{tmp_path / 'nowhere' / 'x' / 'r.db'}")

    async def test_an_answer_that_cannot_be_stored_says_so_and_is_given(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/responses", json={"model": MODEL, "input": "hi"})
        assert (answer.status_code, answer.json()["store"], answer.json()["status"]) == (200, False, "completed")
        assert (await client.get(f"/v1/responses/{answer.json()['id']}")).status_code == 503
