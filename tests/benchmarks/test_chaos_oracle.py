"""The oracle of the chaos benchmark sees what it must: each kind of wrong answer is told from a right one."""

import json
from typing import Any

import httpx
import pytest

from benchmarks.chaos.oracle import Answer, Broken, ask, brief, read

RECEIPT = {"applied": [{"op": "add"}], "disabled": False}
WHOLE = {"choices": [{"index": 0, "text": "a cat", "logprobs": {"token_logprobs": [-1.0, -2.0]}}], "steering": RECEIPT}
CHAT = {"choices": [{"index": 0, "message": {"content": "a cat"},
                     "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}}], "steering": RECEIPT}
EVENTS = [{"choices": [{"index": 0, "delta": {"content": "a "}, "logprobs": {"content": [{"logprob": -1.0}]}}]},
          {"choices": [{"index": 0, "delta": {"content": "cat"}, "logprobs": {"content": [{"logprob": -2.0}]}}],
           "steering": RECEIPT}]
RIGHT = Answer(200, None, ("a cat",), ((-1.0, -2.0),), 1)


def stream(*events: Any) -> str:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


async def answered(content: str, status: int = 200, streamed: bool = False) -> Answer:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=content))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        return await ask(http, "/v1/completions", {"stream": streamed})


async def test_the_same_answer_in_every_form() -> None:
    assert await answered(json.dumps(WHOLE)) == RIGHT
    assert await answered(json.dumps(CHAT)) == RIGHT
    assert await answered(stream(*EVENTS, "[DONE]"), streamed=True) == RIGHT


@pytest.mark.parametrize("other", [
    Answer(200, None, ("a dog",), ((-1.0, -2.0),), 1), Answer(200, None, ("",), ((-1.0, -2.0),), 1),
    Answer(200, None, ("a cat",), ((-1.0, -2.1),), 1), Answer(200, None, ("a cat",), ((-1.0,),), 1),
    Answer(200, None, ("a cat",), ((-1.0, -2.0),), 0), Answer(200, None, ("a cat",), ((-1.0, float("nan")),), 1),
], ids=["text", "empty", "logprob", "a token less", "unsteered", "nan"])
def test_another_answer_is_another(other: Answer) -> None:
    assert RIGHT.same_as(Answer(200, None, ("a cat",), ((-1.0, -2.0000001),), 1))
    assert not RIGHT.same_as(other) and not other.same_as(RIGHT)


@pytest.mark.parametrize(("content", "status", "streamed"), [
    ("Internal Server Error", 500, False), ('{"detail": "Not Found"}', 404, False), ('{"choices": [NaN]}', 200, False),
    (stream(*EVENTS), 200, True), (stream({"error": {"message": "x"}}, "[DONE]"), 200, True), ("", 200, True),
    (stream('{"choices"', "[DONE]"), 200, True),
], ids=["bare 500", "no code", "NaN", "no end", "error without a code", "nothing", "half an event"])
async def test_what_no_client_could_read_is_broken(content: str, status: int, streamed: bool) -> None:
    with pytest.raises(Broken):
        await answered(content, status, streamed)


async def test_errors_are_read_from_bodies_and_from_streams() -> None:
    error = {"error": {"code": "steering_overflow", "message": "x"}}
    assert (await answered(json.dumps(error), 400)).code == "steering_overflow"
    assert (await answered(stream(EVENTS[0], error, "[DONE]"), streamed=True)).code == "steering_overflow"
    busy = read(httpx.Response(503, json={"error": {"code": "engine_unavailable"}}, headers={"Retry-After": "2"}))
    assert busy.retry_after == "2"


def test_bodies_are_told_briefly() -> None:
    assert len(brief({"inline": {"vector": [0.5] * 10_000}, "prompt": "x" * 10_000})) < 300
