"""Gates of a request: decided per prompt, stated in the receipt, nothing of it left where it is shut."""

import asyncio
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.engines.data import Captured, CaptureRequest
from steering.artifacts.payload import Payload
from steering.language.errors import EngineUnavailable
from steering.language.gates import Reading
from steering.programs.program import Program
from tests.server.conftest import MODEL, chat
from tests.server.scripted import WIDTH, ScriptedEngine
from tests.server.test_admission import nothing_waits, until
from tests.server.test_steering import ask, names, refused, store
from tests.server.tokenizers import byte_tokenizer
from vectors.artifact import Metadata
from vectors.library import Library

OPEN = "STOP"
GATE = {"probe": "topic"}


@pytest.fixture(autouse=True)
def _probe(library: Library, engine: ScriptedEngine) -> None:
    """A probe that reads 1 where the prompt holds the word STOP, else 0."""
    store(library, "one")
    store(library, "two", 2.0)
    metadata = Metadata(name="topic", kind="probe", op="add", site="resid_post", fingerprint="f" * 64,
                        reading=Reading(pool="max", threshold=0.5))
    library.create(metadata, Payload.build("probe", {
        1: {"weight": torch.eye(WIDTH)[0], "bias": torch.tensor(0.0)}}))
    word = _ids()[0]

    async def capture(requests: Any, program: Program | None = None) -> list[Captured]:
        assert program is None, "gates read the untouched model"
        engine.captured = requests  # type: ignore[attr-defined]
        return [_read(request, word) for request in requests]

    engine.capture = capture  # type: ignore[method-assign]


def _ids() -> list[int]:
    return list(byte_tokenizer()(OPEN, add_special_tokens=False)["input_ids"])


def _read(request: CaptureRequest, word: int) -> Captured:
    rows = torch.zeros(len(request.token_ids), WIDTH)
    rows[:, 0] = torch.tensor([float(token == word) for token in request.token_ids])
    return {site: {layer: rows for layer in layers} for site, layers in request.sites.items()}


def forget_the_start(engine: ScriptedEngine) -> None:
    """A server that starts reads some texts of its own, to find massive activations."""
    vars(engine).pop("captured", None)


def item(name: str = "one", **fields: Any) -> dict[str, Any]:
    return {"artifact": name, "gate": GATE, **fields}


async def test_open_and_shut(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for text, opens in ((OPEN, True), ("hello", False)):
        answer = await ask(client, {"interventions": [item()]}, text=text)
        applied = answer["steering"]["applied"][0]
        assert applied["gate"] == {"rule": "all", "when": "prompt", "conditions": [{
            "probe": "topic@1", "site": "resid_post", "layers": [1], "form": "linear", "pool": "max",
            "threshold": 0.5, "direction": "above"}]}
        assert applied["choices"][0]["gate"] == {"open": opens, "scores": [{"1": float(opens)}]}
        assert (applied["tokens"]["prompt"] > 0) is opens and (applied["tokens"]["generation"] > 0) is opens
        program = engine.completions[-1].generation.program
        assert program is not None and bool(program.acting) is opens


async def test_only_the_gated_one_is_shut_and_others_act(client: httpx.AsyncClient) -> None:
    answer = await ask(client, {"interventions": [{"artifact": "two"}, item()]}, text="hello")
    two, one = answer["steering"]["applied"]
    assert two["tokens"]["prompt"] > 0 and two["gate"] is None and two["choices"][0]["gate"] is None
    assert one["tokens"] == {"prompt": 0, "generation": 0}


async def test_choices_of_several_prompts(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"model": MODEL, "prompt": ["hello", OPEN], "n": 2, "max_tokens": 4,
            "steering": {"interventions": [item()], "report": "tokens"}}
    answer = (await client.post("/v1/completions", json=body)).json()
    choices = answer["steering"]["applied"][0]["choices"]
    assert [choice["gate"]["open"] for choice in choices] == [False, False, True, True]
    assert [bool(choice["positions"]) for choice in choices] == [False, False, True, True]
    assert len(engine.captured) == 2, "one pass per prompt"  # type: ignore[attr-defined]
    digests = {c.generation.program.digest for c in engine.completions}
    assert len(digests) == 2


async def test_stream_ends_with_the_same_receipt(client: httpx.AsyncClient) -> None:
    steering = {"interventions": [item()]}
    whole = await ask(client, steering, text=OPEN)
    lines = (await client.post("/v1/chat/completions", json=chat(OPEN, stream=True, steering=steering))).text
    last = [line for line in lines.splitlines() if '"steering"' in line][-1]
    assert '"gate":{"open":true,"scores":[{"1":1.0}]}' in last.replace(" ", "")
    assert whole["steering"]["applied"][0]["choices"][0]["gate"]["open"] is True


async def test_presets_and_default_spec(client: httpx.AsyncClient, library: Library) -> None:
    made = await client.post("/v1/presets", json={"name": "guarded", "spec": {"interventions": [item()]}})
    assert made.status_code == 201, made.text
    for text, opens in ((OPEN, True), ("hello", False)):
        answer = await ask(client, model=f"{MODEL}:guarded", text=text)
        assert answer["steering"]["applied"][0]["choices"][0]["gate"]["open"] is opens
    gone = await client.delete("/v1/artifacts/topic")
    assert gone.status_code == 409 and "guarded@1" in gone.json()["error"]["message"]
    missing = {"name": "bad", "spec": {"interventions": [item(gate={"any": [GATE, {"probe": "nobody"}]})]}}
    refusal = (await client.post("/v1/presets", json=missing)).json()["error"]
    assert (refusal["code"], refusal["param"]) == ("not_found", "spec.interventions[0].gate.any[1].probe")


async def test_the_kill_switch_asks_no_probe(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    forget_the_start(engine)
    await client.put("/v1/admin/kill-switch", json={"on": True})
    answer = await ask(client, {"interventions": [item()]}, text=OPEN)
    assert answer["steering"]["disabled"] and not hasattr(engine, "captured")


async def test_strength_zero_does_nothing_whatever_the_gate(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(client, {"interventions": [item(strength=0)]}, text=OPEN)
    applied = answer["steering"]["applied"][0]
    assert applied["choices"][0]["gate"]["open"] is True and applied["tokens"] == {"prompt": 0, "generation": 0}
    program = engine.completions[-1].generation.program
    assert program is not None and not program.acting


async def test_equal_requests_that_open_and_shut_share_no_program(client: httpx.AsyncClient, engine: ScriptedEngine
                                                                  ) -> None:
    steering = {"interventions": [item()]}
    await asyncio.gather(*(ask(client, steering, text=text) for text in (OPEN, "hello", OPEN, "good")))
    word = _ids()[0]
    acting = [(bool(c.generation.program.acting), word in c.generation.prompt_ids) for c in engine.completions
              if c.generation.program]
    assert sorted(acting) == [(False, False)] * 2 + [(True, True)] * 2


async def test_an_unreadable_prompt_fails_the_request(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    async def broken(requests: Any, program: Any = None) -> Any:
        raise EngineUnavailable("the engine does not run")

    engine.capture = broken  # type: ignore[method-assign]
    assert await refused(client, {"interventions": [item()]}) == (503, "engine_unavailable", None)  # type: ignore[comparison-overlap]
    assert not engine.completions


@pytest.mark.parametrize(("gate", "status", "code", "param"), [
    ({"probe": "nobody"}, 404, "not_found", "probe"),
    ({"probe": "one"}, 400, "invalid_spec", "threshold"),
    ({"probe": "topic", "threshhold": 1}, 400, "invalid_spec", "threshhold"),
    ({"probe": "topic", "form": "cast"}, 400, "invalid_spec", "form"),
    ({"all": [{"probe": "topic"}, {"probe": "nobody"}]}, 404, "not_found", "all[1].probe"),
    ({"all": [{"probe": "topic"}], "any": [{"probe": "topic"}]}, 400, "invalid_spec", None),
])
async def test_refusals_name_the_field(client: httpx.AsyncClient, gate: Any, status: int, code: str, param: str | None
                                       ) -> None:
    found = await refused(client, {"interventions": [item(gate=gate)]})
    where = "steering.interventions[0].gate"
    assert found == (status, code, where if param is None else f"{where}.{param}")


async def test_names_of_the_receipt(client: httpx.AsyncClient) -> None:
    answer = await ask(client, {"interventions": [item(), item("two", gate={"any": [GATE, GATE]})]}, text=OPEN)
    assert names(answer["steering"]) == [("request", "one@1"), ("request", "two@1")]
    assert answer["steering"]["applied"][1]["choices"][0]["gate"]["scores"] == [{"1": 1.0}, {"1": 1.0}]


async def test_the_passes_of_gates_hold_a_place(app: FastAPI, client: httpx.AsyncClient,
                                                engine: ScriptedEngine) -> None:
    """All places are taken: nothing is read for a request that waits, and it is counted once, with its tokens."""
    forget_the_start(engine)
    queue = app.state.server.queue
    queue._fair._places = 1
    engine.gate = asyncio.Event()
    running = asyncio.create_task(ask(client, {"interventions": [{"artifact": "two"}]}))
    await until(lambda: len(engine.completions) == 1)
    waiting = asyncio.create_task(ask(client, {"interventions": [item()]}, text=OPEN))
    await until(lambda: queue._totals["tokens"] > 0 or hasattr(engine, "captured"))
    assert not hasattr(engine, "captured") and (queue._totals["requests"], queue._fair.waiting) == (1, 1)
    engine.gate.set()
    assert (await waiting)["steering"]["applied"][0]["choices"][0]["gate"]["open"]
    await running
    assert hasattr(engine, "captured") and nothing_waits(app)
