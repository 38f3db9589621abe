"""Shadow arms: the candidate of a roll-out on the prompts of the stable version, for nobody to read."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from pydantic import SecretStr

from server.engines.data import CompareRequest, Comparison
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import TrimtabError
from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, make
from tests.server.test_rollouts import ERRORS, Desk, measured, still, stored  # noqa: F401


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                    shadow_budget=10.0)


@pytest.fixture
def desk(client: httpx.AsyncClient, app: FastAPI) -> Desk:
    return Desk(client, app)


def by_artifact(vocabulary: Vocabulary, say: dict[str, str]) -> Any:
    def script(generation: Any) -> Any:
        name = generation.program.compiled[0].applied.artifact
        return vocabulary.encode(say[name], special_tokens=False)
    return script


async def test_in_shadow_the_candidate_is_measured_and_never_answers(
        desk: Desk, engine: ScriptedEngine, vocabulary: Vocabulary) -> None:
    rails = [{"metric": "refusals", "margin": 0.1}, ERRORS, {"metric": "latency", "margin": 0.1}]
    made = await desk.make(rails=rails, steps=[{"shadow": 1.0, "wait_s": 0}, {"share": 0.5}])
    engine.script = by_artifact(vocabulary, {"old@1": "The bread is done when it sounds hollow.",
                                             "new@1": "I cannot help with that."})
    for n in range(4):
        receipt = await desk.ask(f"user-{n}", max_tokens=64)
        assert receipt["rollouts"][0]["arm"] == "stable" and receipt["applied"][0]["artifact"] == "old@1"
    await measured(desk)
    programs = [one.generation.program.compiled[0].applied.artifact for one in engine.completions[-8:]]
    assert sorted(programs) == ["new@1"] * 4 + ["old@1"] * 4
    guests = [one.generation for one in engine.completions if one.generation.guest]
    hosts = [one.generation for one in engine.completions[-8:] if not one.generation.guest]
    assert len(guests) == 4 and sorted(one.prompt_ids for one in guests) == sorted(one.prompt_ids for one in hosts)
    refusals, errors, latency = (await desk.show(made["id"]))["rails"]
    assert (refusals["stable_samples"], refusals["stable_mean"]) == (4, 0.0)
    assert (refusals["candidate_samples"], refusals["candidate_mean"]) == (4, 1.0)
    assert (errors["stable_samples"], errors["candidate_samples"], errors["candidate_mean"]) == (4, 4, 0.0)
    assert latency["candidate_samples"] == 0
    # What nobody was answered with is neither served nor one of the effects.
    rows = (await desk.client.get("/v1/effects", headers=OWNER, params={"group": "preset"})).json()["data"]
    assert "cheer@2" not in {row["preset"] for row in rows}


async def test_a_candidate_that_fails_in_shadow_is_returned_before_anybody_has_it(
        desk: Desk, engine: ScriptedEngine) -> None:
    made = await desk.make(rails=[ERRORS], steps=[{"shadow": 1.0, "wait_s": 0}, {"share": 1.0}])
    good = engine.script

    def script(generation: Any) -> Any:
        if generation.program is not None and generation.program.compiled[0].applied.artifact == "new@1":
            raise TrimtabError("it does not get through")
        return good(generation)

    engine.script = script
    for n in range(10):
        assert await desk.version(f"user-{n}") == "cheer@1"
    await measured(desk)
    await desk.rollouts.look()
    ended = await desk.show(made["id"])
    assert ended["status"] == "returned" and ended["step"] == 0
    assert ended["rails"][0]["candidate_mean"] == 1.0


async def test_shadows_give_way_and_obey(desk: Desk, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shadow runs while requests wait, for a key that may not have the candidate, or under the kill switch."""
    monkeypatch.setattr("server.rollouts.shadowing.MOST_BUSY_WAITS", 2)
    key = await make(desk.client, name="held", tenant="team", roles=["infer"])
    await desk.client.put("/v1/admin/policies/team", headers=OWNER, json={"presets": ["cheer@1"]})
    made = await desk.make(rails=[ERRORS], steps=[{"shadow": 1.0}])
    with monkeypatch.context() as busy:
        busy.setattr(engine, "stats", lambda: {"waiting": 1})
        await desk.ask()
        await measured(desk)
    await desk.ask(headers=bearer(key))
    await measured(desk)
    monkeypatch.setattr("server.rollouts.shadowing.MOST_BUSY_WAITS", 1000)
    with monkeypatch.context() as busy:
        busy.setattr(engine, "stats", lambda: {"waiting": 1})
        await desk.ask()
        await desk.app.state.server.kill_switch.set(True)
    await measured(desk)
    assert not any(one.generation.guest for one in engine.completions)
    metrics = (await desk.client.get("/metrics", headers=OWNER)).text
    for result, count in (("busy", 1), ("untold", 2)):
        assert f'trimtab_rollout_shadowed_total{{result="{result}",rollout="{made["id"]}"}} {count}.0' in metrics


async def test_doses_of_both_arms_are_measured(desk: Desk, engine: ScriptedEngine) -> None:
    """In shadow and with a share, where the engine measures 3 nats under the candidate and 1 under the stable version.
    Only answers that somebody had are among the effects."""
    rails = [{"metric": "dose", "margin": 0.5, "scale": 4.0, "samples": 1}]

    async def compare(request: CompareRequest) -> Comparison:
        count, new = len(request.token_ids) - request.prompt_length, request.program.compiled[0].applied.artifact
        rows = {one.name: torch.ones(count) for one in fields(Divergence)}
        total = Divergence(**rows | {"kl": torch.full((count,), 3.0 if new == "new@1" else 1.0)})
        return Comparison(total, (total,), ResidualShift(torch.ones(count), torch.ones(count)), exact=True)

    engine.compare = compare  # type: ignore[method-assign]
    made = await desk.make(rails=rails, steps=[{"shadow": 1.0, "wait_s": 0}, {"share": 1.0}], sample=1.0)
    for n in range(5):
        await desk.ask(f"user-{n}")
        await measured(desk)
    shown = (await desk.show(made["id"]))["rails"][0]
    assert (shown["stable_mean"], shown["candidate_mean"]) == pytest.approx((1.0, 3.0))
    assert shown["stable_samples"] == shown["candidate_samples"] >= 3
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["step"] == 1
    await desk.ask()
    await measured(desk)
    after = (await desk.show(made["id"]))["rails"][0]
    assert after["candidate_samples"] == shown["candidate_samples"] + 1
    assert after["candidate_mean"] == pytest.approx(3.0)
    await desk.app.state.server.shadow.flush()
    rows = (await desk.client.get("/v1/effects", headers=OWNER, params={"group": "preset"})).json()["data"]
    assert {row["preset"]: row["completions"] for row in rows}["cheer@2"] == 1
