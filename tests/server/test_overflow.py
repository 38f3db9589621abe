"""Errors of a running completion that steering caused, receipts of steps, and numbers that float32 does not hold."""

import json
from typing import Any

import httpx
import pytest

from server.engines.data import Touched
from server.requests.fields import LEAST_TEMPERATURE
from server.settings import Settings
from steering.language.errors import ModelOverflow, SteeringLimit, SteeringOverflow
from tests.server.conftest import chat
from tests.server.scripted import WIDTH, ScriptedCompletion, ScriptedEngine
from tests.server.test_gates import GATE, OPEN, _probe, _read, item  # noqa: F401 - the fixture is used by its name
from tests.server.test_steering import ask, store
from vectors.library import Library


def inline(**fields: Any) -> dict[str, Any]:
    return {"op": "add", "inline": {"vector": {"1": [1.0] * WIDTH}}, **fields}


@pytest.mark.parametrize("failure", [SteeringOverflow, SteeringLimit])
@pytest.mark.parametrize("n", [1, 3])
async def test_an_overflow_names_its_place_in_the_request(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                          failure: Any, n: int) -> None:
    engine.fails_at, engine.failure = 1, failure("intervention 1 went too far", param=("interventions", 1))
    answer = await client.post("/v1/chat/completions",
                               json=chat(n=n, steering={"interventions": [inline(), inline()]}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, failure.code)
    assert error["param"] == "steering.interventions[1]"


async def test_a_preset_that_overflows_is_named(client: httpx.AsyncClient, engine: ScriptedEngine, library: Library
                                                ) -> None:
    store(library, "one")
    created = await client.post("/v1/presets", json={"name": "much", "spec": {"interventions": [{"artifact": "one"}]}})
    assert created.status_code == 201
    engine.fails_at, engine.failure = 0, SteeringOverflow("it went too far", param=("interventions", 0))
    answer = await client.post("/v1/chat/completions", json=chat(steering={"preset": "much"}))
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("steering_overflow", "steering.preset")
    assert error["message"].startswith("preset much@1: it went too far")


async def test_a_stream_ends_with_the_error(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fails_at, engine.failure = 2, SteeringOverflow("it went too far", param=("interventions", 0))
    answer = await client.post("/v1/chat/completions", json=chat(stream=True, steering={"interventions": [inline()]}))
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    last = json.loads(events[-1] if events[-1] != "[DONE]" else events[-2])
    assert last["error"]["code"] == "steering_overflow"
    assert last["error"]["param"] == "steering.interventions[0]"
    assert sum("error" in event for event in events) == 1


async def test_the_models_own_overflow_is_no_fault_of_the_request(client: httpx.AsyncClient, engine: ScriptedEngine
                                                                  ) -> None:
    engine.fails_at, engine.failure = 0, ModelOverflow("the model overflows")
    answer = await client.post("/v1/chat/completions", json=chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_overflow")


async def test_a_gate_without_a_finite_score_is_not_decided(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def capture(requests: Any, program: Any = None) -> Any:
        return [{site: {layer: rows * 3e38 * 10 for layer, rows in layers.items()} for site, layers in found.items()}
                for found in (_read(request, request.token_ids[1]) for request in requests)]

    engine.capture = capture  # type: ignore[method-assign]
    answer = await client.post("/v1/chat/completions", json=chat(OPEN, steering={"interventions": [item()]}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "steering_overflow")
    assert error["param"] == "steering.interventions[0].gate"
    assert GATE["probe"] in error["message"]


async def test_the_receipt_tells_steps_and_warns(client: httpx.AsyncClient, engine: ScriptedEngine, library: Library,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    store(library, "one")
    count = ScriptedCompletion.touched
    monkeypatch.setattr(ScriptedCompletion, "touched", lambda self: [
        Touched(t.prompt, t.generation, 12.5, 3.0, clipped) for t, clipped in zip(count(self), (0, 2), strict=True)])
    body = await ask(client, {"interventions": [{"artifact": "one", "strength": 4.9}, {"artifact": "one",
                                                                                      "strength": -5}]})
    receipt = body["steering"]
    assert [choice["step"] for found in receipt["applied"] for choice in found["choices"]] == [
        {"max": 12.5, "mean": 3.0, "clipped": 0}, {"max": 12.5, "mean": 3.0, "clipped": 2}]
    assert [(warning["code"], warning["intervention"]) for warning in receipt["warnings"]] == [
        ("strong", 1), ("clipped", 1)]
    assert "5 times its own strength" in receipt["warnings"][0]["message"]
    # Without measured steps and at the artifact's own strength there is nothing to tell.
    monkeypatch.setattr(ScriptedCompletion, "touched", count)
    plain = (await ask(client, {"interventions": [{"artifact": "one"}, inline(strength=1e6)]}))["steering"]
    assert plain["warnings"] == []
    assert [choice["step"] for found in plain["applied"] for choice in found["choices"]] == [None, None]


@pytest.mark.parametrize("fields", [
    {"repetition_penalty": 1e-300}, {"repetition_penalty": 0.009}, {"temperature": -1e-300},
    {"temperature": 2.1}, {"presence_penalty": 3e38}, {"frequency_penalty": -3e38}, {"logit_bias": {"1": 1e39}}])
async def test_what_float32_does_not_hold_is_refused(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(**fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition(".")[0] == next(iter(fields))


@pytest.mark.parametrize(("temperature", "greedy"), [
    (1e-40, True), (1e-300, True), (9.9e-6, True), (LEAST_TEMPERATURE, False), (0.5, False)])
async def test_temperatures_near_zero_are_greedy(client: httpx.AsyncClient, engine: ScriptedEngine, temperature: float,
                                                 greedy: bool) -> None:
    await ask(client, None, temperature=temperature)
    assert engine.completions[-1].generation.sampling.temperature == (0.0 if greedy else temperature)


class TestTheSizeOfAProgram:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_program_numbers": 3 * WIDTH})

    async def test_is_bounded(self, client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        fits = [inline(), inline(), inline()]
        assert (await ask(client, {"interventions": fits}))["steering"]["applied"]
        answer = await client.post("/v1/chat/completions", json=chat(steering={"interventions": [*fits, inline()]}))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (413, "program_too_large")
        assert error["param"] == "steering.interventions[3]"
        assert len(engine.completions) == 1
