"""A contrast in a request: what is planned of it, checked, counted, refused and told."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_steering import store
from tests.server.test_switched import Gate, until
from vectors.library import Library

INLINE = {"inline": {"vector": [1.0] * 8}, "op": "add", "layers": [2]}
OTHER = {"inline": {"vector": [2.0] * 8}, "op": "add", "layers": [1], "scope": {"prompt": "none"}}
WEAK = {"weak": {"interventions": [OTHER]}}


@pytest.fixture(autouse=True)
def _contrasts(engine: ScriptedEngine) -> None:
    engine.features = frozenset({"contrast", "resume"})


async def ask(client: httpx.AsyncClient, contrast: Any, **steering: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=chat(steering={**steering, "contrast": contrast}))


async def test_both_programs_reach_the_engine_and_the_receipt(client: httpx.AsyncClient, engine: ScriptedEngine
                                                              ) -> None:
    answer = await ask(client, {**WEAK, "alpha": 0.2, "beta": 1.5}, interventions=[INLINE])
    assert answer.status_code == 200, answer.text
    asked = engine.completions[0].generation
    assert asked.contrast is not None and (asked.contrast.alpha, asked.contrast.beta) == (0.2, 1.5)
    assert asked.program is not None and asked.contrast.weak is not None
    assert [item.applied.layers for item in asked.program.compiled] == [(2,)]
    assert [item.applied.layers for item in asked.contrast.weak.compiled] == [(1,)]
    told = answer.json()["steering"]
    assert [one["layers"] for one in told["applied"]] == [[2]]
    assert (told["contrast"]["alpha"], told["contrast"]["beta"]) == (0.2, 1.5)
    weak = told["contrast"]["weak"][0]
    assert (weak["artifact"], weak["layers"], weak["source"]) == ("inline", [1], "request")
    assert weak["tokens"]["prompt"] == 0 and weak["tokens"]["generation"] > 0


@pytest.mark.parametrize("weak", [{}, {"interventions": []}])
async def test_against_the_untouched_model(client: httpx.AsyncClient, engine: ScriptedEngine, weak: Any) -> None:
    told = (await ask(client, {"weak": weak}, interventions=[INLINE])).json()["steering"]
    assert told["contrast"] == {"weak": [], "alpha": 0.1, "beta": 0.5}
    contrast = engine.completions[0].generation.contrast
    assert contrast is not None and contrast.weak is not None and not contrast.weak.acting


async def test_beta_0_is_no_contrast(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    plain = (await client.post("/v1/chat/completions", json=chat(steering={"interventions": [INLINE]}))).json()
    none = (await ask(client, {**WEAK, "beta": 0}, interventions=[INLINE])).json()
    assert none["choices"] == plain["choices"] and none["steering"] == plain["steering"]
    assert [one.generation.contrast for one in engine.completions] == [None, None]


async def test_presets_and_artifacts_of_the_weak_run(client: httpx.AsyncClient, library: Library) -> None:
    store(library, "calm")
    await client.post("/v1/presets", json={"name": "dull", "spec": {"interventions": [INLINE]}})
    told = (await ask(client, {"weak": {"preset": "dull", "artifact": "calm", "strength": 2.0}})).json()["steering"]
    assert [(one["artifact"], one["source"]) for one in told["contrast"]["weak"]] == [
        ("inline", "preset"), ("calm@1", "request")]
    for weak, param in (({"artifact": "no-such"}, "steering.contrast.weak.artifact"),
                        ({"preset": "no-such"}, "steering.contrast.weak.preset"),
                        ({"interventions": [INLINE, {**INLINE, "layers": [9]}]},
                         "steering.contrast.weak.interventions[1].layers[0]"),
                        ({"strength": 1.0}, "steering.contrast.weak")):
        error = (await ask(client, {"weak": weak})).json()["error"]
        assert error["param"] == param, error


@pytest.mark.parametrize(("contrast", "param"), [
    ({}, "steering.contrast.weak"), ({"weak": {}, "alpha": 1.5}, "steering.contrast.alpha"),
    ({"weak": {}, "beta": -1}, "steering.contrast.beta"), ({"weak": {"report": "summary"}},
                                                                 "steering.contrast.weak.report"),
    ({"weak": {"contrast": {"weak": {}}}}, "steering.contrast.weak.contrast"),
])
async def test_what_is_no_contrast_is_refused(client: httpx.AsyncClient, contrast: Any, param: str) -> None:
    answer = await ask(client, contrast)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/chat/completions", chat(steering={"contrast": WEAK, "guard": {"max_kl": 1.0}, "interventions": [INLINE]}),
     "steering.contrast"),
    ("/v1/chat/completions", chat(steering={"contrast": WEAK, "report": "summary"}), "steering.report"),
    ("/v1/chat/completions", chat(steering={"contrast": WEAK, "default": "none"}), "steering"),
    ("/v1/completions", {"model": MODEL, "prompt": "a", "steering": {"contrast": WEAK}, "prompt_logprobs": 1},
     "steering.contrast"),
    ("/v1/completions", {"model": MODEL, "prompt": "a", "steering": {"contrast": WEAK}, "echo": True, "logprobs": 1},
     "steering.contrast"),
    ("/v1/lens", {"model": MODEL, "input": "a", "steering": {"contrast": WEAK}}, "steering.contrast"),
])
async def test_what_does_not_go_with_a_contrast_is_refused_by_name(client: httpx.AsyncClient, path: str, body: Any,
                                                                   param: str) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


async def test_an_engine_that_cannot_says_so(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await client.get("/v1/capabilities")).json()["contrast"] is True
    engine.features = frozenset({"resume"})
    assert (await client.get("/v1/capabilities")).json()["contrast"] is False
    error = (await ask(client, WEAK)).json()["error"]
    assert error["param"] == "steering.contrast" and "scripted cannot keep two runs in one step" in error["message"]


async def test_what_the_server_does_of_itself_acts_in_both_runs(client: httpx.AsyncClient, library: Library,
                                                                 engine: ScriptedEngine) -> None:
    store(library, "own")
    await client.put("/v1/admin/default-spec", json={"interventions": [{"artifact": "own"}]})
    for default, runs in (("inherit", [("own@1", "default")]), ("override", [])):
        told = (await ask(client, WEAK, interventions=[INLINE], default=default)).json()["steering"]
        assert [(one["artifact"], one["source"]) for one in told["applied"]] == [*runs, ("inline", "request")]
        assert [(one["artifact"], one["source"]) for one in told["contrast"]["weak"]] == [*runs, ("inline", "request")]


async def test_every_choice_has_a_run_of_its_own_beside_it(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(n=3, steering={"contrast": WEAK}, seed=3))
    assert len(answer.json()["choices"]) == 3
    assert all(one.generation.contrast is not None for one in engine.completions)
    assert [choice["index"] for choice in answer.json()["steering"]["contrast"]["weak"][0]["choices"]] == [0, 1, 2]


async def test_the_kill_switch_turns_both_off(app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine,
                                              vocabulary: Vocabulary) -> None:
    said = {kind: vocabulary.encode(text, special_tokens=False)
            for kind, text in ((True, " bad day hello bad day"), (False, " good world hello good day"))}
    engine.script = lambda generation: said[generation.contrast is not None][len(generation.generated_ids):]
    engine.gate = gate = Gate(engine, 2)
    asking = asyncio.create_task(ask(client, WEAK))
    await until(lambda: engine.completions and len(engine.completions[0].given) == 2)
    app.state.server.kill_switch._apply(True, None)
    gate.set()
    told = (await asking).json()
    off = engine.completions[1].generation
    assert (off.program, off.contrast, list(off.generated_ids)) == (None, None, engine.completions[0].given[:2])
    assert told["steering"]["switched_off"] == [2] and len(told["steering"]["contrast"]["weak"]) == 1
    later = (await ask(client, WEAK, interventions=[INLINE])).json()["steering"]
    assert later["disabled"] and later.get("contrast") is None
    assert engine.completions[-1].generation.contrast is None


async def test_the_queue_counts_both(client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine) -> None:
    joined, costs = app.state.server.queue.joined, []

    def counting(who: Any, given: Any, **how: Any) -> Any:
        costs.append([(cost.prompt, cost.most) for cost in given])
        return joined(who, given, **how)

    app.state.server.queue.joined = counting
    await client.post("/v1/chat/completions", json=chat())
    await ask(client, WEAK)
    (prompt, most), twice = *(one[0] for one in costs if one),
    assert twice == (2 * prompt, 2 * most)


async def test_nothing_is_measured_or_graded_of_it_behind_the_answer(client: httpx.AsyncClient, app: FastAPI) -> None:
    state = app.state.server
    state.shadow.follow(1.0, 1.0)
    offered: list[Any] = []
    state.shadow.offer = lambda finished: offered.extend(finished)
    await ask(client, WEAK, interventions=[INLINE])
    assert offered == []
    await client.post("/v1/chat/completions", json=chat(steering={"interventions": [INLINE]}))
    assert len(offered) == 1
