"""Guards of a request: where they come from, what the receipt says, streams, refusals."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from server.engines.data import CompareRequest, Comparison
from steering.divergence import Divergence, ResidualShift
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_steering import ask, refused, store
from vectors.library import Library

GUARD = {"max_kl": 0.5, "every": 4}


@pytest.fixture(autouse=True)
def _measuring(library: Library, engine: ScriptedEngine) -> Callable[[float], None]:
    """An engine that can go on from tokens, and whose KL a test sets; intervention 1 has the larger share."""
    store(library, "one")
    store(library, "two", 2.0)
    kl = [2.0]
    script = engine.script
    engine.features = frozenset({"resume"})

    async def compare(request: CompareRequest) -> Comparison:
        count = len(request.token_ids) - request.prompt_length

        def rows(value: float) -> Divergence:
            return Divergence(**{name: torch.full((count,), value) for name in Divergence.__dataclass_fields__})

        return Comparison(rows(kl[0]), tuple(rows(0.1 * (j + 1)) for j in range(len(request.program.compiled))),
                          ResidualShift(torch.ones(count), torch.ones(count)), exact=True)

    def shortened(generation: Any) -> Any:
        # The scripted engine counts max_tokens from where it starts.
        left = generation.sampling.max_tokens - len(generation.generated_ids)
        return original(type(generation)(**{**vars(generation), "sampling": type(generation.sampling)(
            **{**vars(generation.sampling), "max_tokens": left})}))

    original = engine.generate
    engine.compare = compare  # type: ignore[method-assign]
    engine.generate = shortened  # type: ignore[method-assign]
    engine.script = lambda generation: [*script(generation)] * 20

    def set_kl(value: float) -> None:
        kl[0] = value

    return set_kl


def spec(*names: str, **fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": name} for name in names or ("one",)], **fields}


async def test_the_receipt_says_what_was_done(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(client, spec("one", "two", guard={**GUARD, "action": "stop"}), max_tokens=12)
    one, two = answer["steering"]["applied"]
    assert two["choices"][0]["guard"] == [
        {"token": 4, "factor": 0.0, "reason": "kl", "kl": 2.0, "repetition": 0.0}]
    assert one["choices"][0]["guard"] == [
        {"token": 8, "factor": 0.0, "reason": "kl", "kl": 2.0, "repetition": 1.0}]
    assert answer["steering"]["guard_checks"] == [2] and answer["usage"]["completion_tokens"] == 12
    acting = [c.generation.program.acting for c in engine.completions]
    assert acting == [3, 1, 0]
    text = (await client.get("/metrics")).text
    assert 'trimtab_guard_breaches_total{action="stopped",reason="kl"} 2.0' in text


async def test_within_the_limit_nothing_is_done(client: httpx.AsyncClient, _measuring: Callable[[float], None]) -> None:
    _measuring(0.4)
    answer = await ask(client, spec(guard=GUARD), max_tokens=12)
    assert answer["steering"]["applied"][0]["choices"][0]["guard"] == []
    assert answer["steering"]["guard_checks"] == [2]
    plain = await ask(client, spec(), max_tokens=12)
    assert plain["choices"] == answer["choices"] and plain["steering"]["guard_checks"] == [None]


async def test_lowered_to_half(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(client, spec(guard=GUARD), max_tokens=8)
    assert [e["factor"] for e in answer["steering"]["applied"][0]["choices"][0]["guard"]] == [0.5]
    full, half = (c.generation.program.compiled[0].rows["resid_post", 2].tensors["delta"] for c in engine.completions)
    assert torch.equal(full / 2, half)
    assert answer["steering"]["applied"][0]["strength"]["scale"] == {"2": 1.0}, "as asked for"


async def test_streams_agree(client: httpx.AsyncClient) -> None:
    steering = spec(guard={**GUARD, "action": "stop"})
    whole = await ask(client, steering, max_tokens=10)
    lines = (await client.post("/v1/chat/completions", json=chat(max_tokens=10, stream=True, steering=steering))).text
    chunks = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    receipt = next(chunk["steering"] for chunk in chunks if chunk.get("steering"))
    assert receipt["applied"][0]["choices"][0]["guard"] == whole["steering"]["applied"][0]["choices"][0]["guard"]


async def test_guards_of_presets_and_the_default_spec_hold_too(client: httpx.AsyncClient) -> None:
    made = await client.post("/v1/presets", json={"name": "careful", "spec": spec(guard={**GUARD, "action": "stop"})})
    assert made.status_code == 201 and made.json()["spec"]["guard"]["max_kl"] == 0.5
    answer = await ask(client, model=f"{MODEL}:careful", max_tokens=10)
    assert answer["steering"]["applied"][0]["choices"][0]["guard"][0]["token"] == 4
    loose = spec("two", guard={"max_kl": 100.0, "every": 4})
    both = await ask(client, loose, model=f"{MODEL}:careful", max_tokens=10)
    assert both["steering"]["guard_checks"] == [2], "the stricter of two still holds"
    kept = await client.put("/v1/admin/default-spec", json=spec(guard={**GUARD, "action": "stop"}))
    assert kept.status_code == 200 and kept.json()["spec"]["guard"]["action"] == "stop"
    assert (await ask(client, max_tokens=10))["steering"]["guard_checks"] == [1]
    assert (await ask(client, {"default": "none"}, max_tokens=10))["steering"]["guard_checks"] == [None]


async def test_an_engine_that_cannot_go_on_refuses(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.features = frozenset()
    assert await refused(client, spec(guard=GUARD)) == (400, "invalid_spec", "steering.guard")
    assert not engine.completions


async def test_what_does_not_survive_being_cut_is_refused(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.not_resumed = ("presence_penalty",)
    body = chat(presence_penalty=0.5, steering=spec(guard=GUARD))
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "steering.guard"
    assert not engine.completions
    assert (await ask(client, spec(guard=GUARD)))["steering"]["guard_checks"] != [None]


@pytest.mark.parametrize(("guard", "param"), [
    ({}, "guard"), ({"every": 8}, "guard"), ({"max_kl": 0}, "guard.max_kl"), ({"max_kl": 1, "every": 1}, "guard.every"),
    ({"max_repetition": 1.5}, "guard.max_repetition"), ({"max_kl": 1, "actoin": "stop"}, "guard.actoin")])
async def test_malformed(client: httpx.AsyncClient, guard: Any, param: str) -> None:
    assert await refused(client, spec(guard=guard)) == (400, "invalid_spec", f"steering.{param}")
