"""Running completions under the kill switch: at once, for every one of them, and the receipt says from where."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.engines.data import Generation
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine

STEERED, PLAIN = " bad day hello bad day", " good world hello good day"
SPEC = {"interventions": [{"inline": {"vector": [1.0] * 8}, "op": "add", "layers": [2]}]}


class Gate(asyncio.Event):
    """Every completion gets so many tokens, then waits."""

    def __init__(self, engine: ScriptedEngine, tokens: int) -> None:
        super().__init__()
        self._engine, self._tokens = engine, tokens
        engine.held = lambda generation: self._given(generation) >= self._tokens

    def _given(self, generation: Generation) -> int:
        return len(next(c for c in self._engine.completions if c.generation is generation).given)


@pytest.fixture
def words(engine: ScriptedEngine, vocabulary: Vocabulary) -> dict[bool, list[int]]:
    """What is said, steered or not; an engine that goes on from what was said."""
    said = {steered: vocabulary.encode(text, special_tokens=False)
            for steered, text in ((True, STEERED), (False, PLAIN))}

    def script(generation: Generation) -> Sequence[int]:
        return said[generation.program is not None][len(generation.generated_ids):]

    engine.script = script
    engine.features = frozenset({"resume"})
    return said


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def switched(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine, tokens: int, *, flips: int = 1,
                   **fields: Any) -> tuple[list[str], list[str], dict[str, Any]]:
    """Texts, finish reasons and receipt of a request during which the kill switch is turned."""
    gate = engine.gate = Gate(engine, tokens)
    n = fields.get("n", 1)
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat(**fields, max_tokens=12) | {
        "steering": {**SPEC, **fields.pop("steering", {})}}))
    await until(lambda: len(engine.completions) == n and all(len(c.given) == tokens for c in engine.completions))
    for flip in range(flips):
        app.state.server.kill_switch._apply(flip % 2 == 0, None)
    gate.set()
    answer = await asking
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        body = answer.json()
        return ([choice["message"]["content"] for choice in body["choices"]],
                [choice["finish_reason"] for choice in body["choices"]], body["steering"])
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    texts, reasons = [""] * n, [""] * n
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    return texts, reasons, chunks[-1]["steering"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("flips", [1, 2])
async def test_they_go_on_unsteered(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine,
                                    vocabulary: Vocabulary, words: dict[bool, list[int]], stream: bool, flips: int
                                    ) -> None:
    """Also where it is turned off again at once: what runs is not steered a second time."""
    texts, reasons, receipt = await switched(app, client, engine, 2, n=2, stream=stream, seed=7, flips=flips)
    expected = [*words[True][:2], *words[False][2:]]
    assert texts == [vocabulary.decode(expected)] * 2 and reasons == ["stop"] * 2
    assert receipt["switched_off"] == [2, 2] and receipt["disabled"] is False
    first, second, *later = (c.generation for c in engine.completions)
    assert len(later) == 2 and {g.program for g in later} == {None}
    assert [list(g.generated_ids) for g in later] == [words[True][:2]] * 2
    assert ({g.request_id: g.sampling for g in later}
            == {f"{g.request_id}.off": g.sampling for g in (first, second)}), "seeds and penalties count on"
    # The last token that was made steered was never fed back.
    assert receipt["applied"][0]["tokens"]["generation"] <= 2 * 2


@pytest.mark.parametrize("why", ["setting", "engine", "sampling"])
async def test_they_end(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine, vocabulary: Vocabulary,
                        words: dict[bool, list[int]], why: str) -> None:
    fields: dict[str, Any] = {}
    if why == "setting":
        state = app.state.server
        object.__setattr__(state, "settings", state.settings.model_copy(update={"kill_switch_running": "end"}))
    elif why == "engine":
        engine.features = frozenset()
    else:
        engine.not_resumed = ("presence_penalty",)
        fields["presence_penalty"] = 0.5
    # A stop string that begins within what was said is held back, and let out at the end.
    held = vocabulary.decode(words[True][:2])[-2:]
    texts, reasons, receipt = await switched(app, client, engine, 2, stop=[held + "?"], **fields)
    assert texts == [vocabulary.decode(words[True][:2])] and reasons == ["stop"]
    assert receipt["switched_off"] == [2] and len(engine.completions) == 1
    assert engine.completions[0].cancelled.is_set()


async def test_before_the_first_token(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine,
                                      vocabulary: Vocabulary, words: dict[bool, list[int]]) -> None:
    texts, _, receipt = await switched(app, client, engine, 0)
    assert texts == [vocabulary.decode(words[False])] and receipt["switched_off"] == [0]


async def test_guarded_ones(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine, vocabulary: Vocabulary,
                            words: dict[bool, list[int]]) -> None:
    texts, _, receipt = await switched(app, client, engine, 3, steering={"guard": {"max_kl": 5.0, "every": 8}})
    assert texts == [vocabulary.decode([*words[True][:3], *words[False][3:]])]
    assert receipt["switched_off"] == [3] and receipt["guard_checks"] == [0]


async def test_those_that_wait_for_a_place(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine,
                                           vocabulary: Vocabulary, words: dict[bool, list[int]]) -> None:
    """The program was compiled before; nothing of it reaches the answer."""
    app.state.server.queue._fair._places = 1
    gate = engine.gate = Gate(engine, 1)
    asking = [asyncio.create_task(client.post("/v1/chat/completions", json=chat(max_tokens=12) | {"steering": SPEC}))
              for _ in range(2)]
    queue = app.state.server.queue
    await until(lambda: len(engine.completions) == 1 and engine.completions[0].given and queue._fair.waiting == 1)
    app.state.server.kill_switch._apply(True, None)
    gate.set()
    bodies = [(await task).json() for task in asking]
    assert sorted(body["steering"]["switched_off"] for body in bodies) == [[0], [1]]
    waited = next(body for body in bodies if body["steering"]["switched_off"] == [0])
    assert waited["choices"][0]["message"]["content"] == vocabulary.decode(words[False])


async def test_what_is_not_steered_is_left_alone(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine,
                                                 vocabulary: Vocabulary, words: dict[bool, list[int]]) -> None:
    gate = engine.gate = Gate(engine, 2)
    asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat(max_tokens=12)))
    await until(lambda: engine.completions and len(engine.completions[0].given) == 2)
    app.state.server.kill_switch._apply(True, None)
    gate.set()
    body = (await asking).json()
    assert body["choices"][0]["message"]["content"] == vocabulary.decode(words[False])
    assert body["steering"]["switched_off"] == [None] and len(engine.completions) == 1


def test_the_setting() -> None:
    assert Settings().kill_switch_running == "unsteered"
