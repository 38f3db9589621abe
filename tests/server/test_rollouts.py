"""Roll-outs over HTTP: who gets the candidate, what receipts say, who may do what, and how they end."""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from trimtab_client import Client
from typer.testing import CliRunner

from server.cli.main import app as cli
from server.observability.instruments import Registry
from server.rollouts.arms import Asking, place_of
from server.rollouts.rollouts import Rollouts
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.language.errors import TrimtabError
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, make
from tests.server.test_steering import _spec, store
from vectors.library import Library
from vectors.library.audit.log import Wanted
from vectors.storage_errors import LibraryUnavailable

URL, ROLLOUTS = "/v1/chat/completions", "/v1/admin/rollouts"
ERRORS = {"metric": "errors", "margin": 0.0, "samples": 5}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


@pytest.fixture(autouse=True)
def stored(library: Library) -> Iterator[Library]:
    """cheer@production is version 1 with the artifact old, version 2 has the artifact new."""
    store(library, "old")
    store(library, "new", 2.0)
    library.presets.create("cheer", _spec("old"))
    library.presets.set_alias("cheer", "production", 1)
    library.presets.create("cheer", _spec("new"))
    yield library


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests look themselves, so that nothing happens between their lines."""
    monkeypatch.setattr("server.rollouts.rollouts.POLL_S", 3600.0)


class Desk:
    """The owner, who makes roll-outs, and users who ask."""

    def __init__(self, client: httpx.AsyncClient, app: FastAPI) -> None:
        self.client, self.app = client, app

    @property
    def rollouts(self) -> Rollouts:
        found: Rollouts = self.app.state.server.rollouts
        return found

    async def make(self, *, publish: bool = True, headers: Any = OWNER, **terms: Any) -> dict[str, Any]:
        body = {"target": "cheer", "candidate": 2, "steps": [{"share": 0.5}], **terms}
        answer = await self.client.post(ROLLOUTS, headers=headers, json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return await self.do(found["id"], "publish") if publish else found

    async def do(self, id: str, what: str, headers: Any = OWNER, **body: Any) -> dict[str, Any]:
        answer = await self.client.post(f"{ROLLOUTS}/{id}/{what}", headers=headers,
                                        json=body if what == "return" else None)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def refused(self, id: str, what: str, headers: Any = OWNER) -> tuple[int, str]:
        answer = await self.client.post(f"{ROLLOUTS}/{id}/{what}", headers=headers)
        return answer.status_code, answer.json()["error"]["code"]

    async def show(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get(f"{ROLLOUTS}/{id}", headers=OWNER)).json()
        return found

    async def ask(self, user: str | None = "ann", headers: Any = OWNER, model: str = MODEL,
                  steering: Any = {"preset": "cheer"}, **fields: Any) -> dict[str, Any]:  # noqa: B006
        body = chat(**fields) | {"model": model} | ({} if user is None else {"user": user})
        answer = await self.client.post(URL, headers=headers, json=body | (
            {} if steering is None else {"steering": steering}))
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()["steering"]
        return receipt

    async def version(self, *args: Any, **fields: Any) -> str:
        return str((await self.ask(*args, **fields))["presets"]["preset"])


@pytest.fixture
def desk(client: httpx.AsyncClient, app: FastAPI) -> Desk:
    return Desk(client, app)


def two_users(rollout: str, share: float, tenant: str = "default") -> tuple[str, str]:
    """One user of each arm, stable first; by the stated formula, which the tests below hold to be the server's."""
    names = [f"user-{n}" for n in range(1000)]
    inside = {name: place_of(rollout, f"{tenant}\nuser:{name}") < share for name in names}
    return next(n for n in names if not inside[n]), next(n for n in names if inside[n])


async def test_a_draft_acts_on_nothing(desk: Desk) -> None:
    made = await desk.make(publish=False, steps=[{"share": 1.0}])
    assert (made["status"], made["stable"], made["candidate"], made["approved_by"]) == ("draft", 1, 2, None)
    receipt = await desk.ask()
    assert receipt["presets"] == {"preset": "cheer@1"} and receipt["rollouts"] == []


async def test_each_user_keeps_an_arm_and_the_receipt_says_which(desk: Desk) -> None:
    made = await desk.make()
    stable, candidate = two_users(made["id"], 0.5)
    for _ in range(3):
        receipt = await desk.ask(candidate)
        assert receipt["presets"] == {"preset": "cheer@2"} and receipt["applied"][0]["artifact"] == "new@1"
        assert receipt["rollouts"] == [{"rollout": made["id"], "target": "cheer@production", "arm": "candidate",
                                        "ref": "cheer@2"}]
        assert (await desk.ask(stable))["rollouts"][0] | {"rollout": ""} == {
            "rollout": "", "target": "cheer@production", "arm": "stable", "ref": "cheer@1"}
    # By the model's name and by the alias it is the same; a version that is named is that version.
    assert (await desk.ask(candidate, model=f"{MODEL}:cheer", steering=None))["presets"] == {"model": "cheer@2"}
    assert await desk.version(candidate, steering={"preset": "cheer@production"}) == "cheer@2"
    assert await desk.version(candidate, steering={"preset": "cheer@1"}) == "cheer@1"
    metrics = (await desk.client.get("/metrics", headers=OWNER)).text
    assert f'trimtab_rollout_requests_total{{arm="candidate",rollout="{made["id"]}",target="cheer@production"}} 5.0' \
        in metrics


async def test_a_session_sticks_where_no_user_is_named(desk: Desk) -> None:
    made = await desk.make()
    for n in range(20):
        wanted = "cheer@2" if place_of(made["id"], f"default\nsession:s{n}") < 0.5 else "cheer@1"
        assert await desk.version(None, headers={**OWNER, "X-Trimtab-Session": f"s{n}"}) == wanted
    # Who names neither is drawn anew each time.
    assert len({await desk.version(None) for _ in range(40)}) == 2


async def test_anthropics_users_stick_too(desk: Desk) -> None:
    made = await desk.make()
    for user, arm in zip(two_users(made["id"], 0.5), ("stable", "candidate"), strict=True):
        answer = await desk.client.post("/v1/messages", headers=OWNER, json={
            "model": f"{MODEL}:cheer", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}],
            "metadata": {"user_id": user}})
        assert answer.json()["steering"]["rollouts"][0]["arm"] == arm


def test_the_share_is_kept_and_only_grows() -> None:
    """Of 20 000 users the candidate's share is within five standard deviations, and 10 % holds all of 1 %."""
    places = [place_of("ro-1", f"t\nuser:{n}") for n in range(20_000)]
    for share in (0.01, 0.1, 0.5):
        count = sum(place < share for place in places)
        assert abs(count - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
    # Two roll-outs draw apart from each other.
    others = [place_of("ro-2", f"t\nuser:{n}") for n in range(20_000)]
    both = sum(a < 0.5 and b < 0.5 for a, b in zip(places, others, strict=True))
    assert abs(both - 5000) < 5 * (20_000 * 0.25 * 0.75) ** 0.5


async def test_two_servers_of_a_library_say_the_same(desk: Desk, library: Library) -> None:
    made = await desk.make()
    asking = [Asking(f"default\nuser:{n}") for n in range(50)]
    second = Rollouts(library.rollouts, Registry())
    await second.refresh()
    for one in asking:
        found = [each.behind("preset", "cheer") for each in (desk.rollouts, second)]
        assert found[0] is not None and found[1] is not None
        assert found[0].arm(one) == found[1].arm(one)
    # A return is known to the other one once it reads again.
    await desk.do(made["id"], "return", why="enough")
    assert second.behind("preset", "cheer") is not None
    await second.refresh()
    assert second.behind("preset", "cheer") is None


async def test_named_keys_always_get_the_candidate(desk: Desk) -> None:
    key = await make(desk.client, name="early", tenant="team", roles=["infer"])
    other = await make(desk.client, name="late", tenant="team", roles=["infer"])
    await desk.make(steps=[{"share": 0.0}], keys=[key["id"]])
    assert {await desk.version(f"u{n}", headers=bearer(key)) for n in range(5)} == {"cheer@2"}
    assert {await desk.version(f"u{n}", headers=bearer(other)) for n in range(5)} == {"cheer@1"}


async def test_policies_hold_over_a_roll_out(desk: Desk) -> None:
    """A key whose policy does not let it have the candidate stays with the stable version."""
    key = await make(desk.client, name="held", tenant="team", roles=["infer"])
    rule = await desk.client.put("/v1/admin/policies/team", headers=OWNER, json={"presets": ["cheer@1"]})
    assert rule.status_code == 200
    await desk.make(steps=[{"share": 1.0}])
    receipt = await desk.ask(headers=bearer(key))
    assert receipt["presets"] == {"preset": "cheer@1"} and receipt["rollouts"][0]["arm"] == "stable"
    assert await desk.version() == "cheer@2"
    # The same of an artifact that the preset's candidate names: the whole request is held to the policy.
    await desk.client.put("/v1/admin/policies/team", headers=OWNER, json={"artifacts": ["old"]})
    answer = await desk.client.post(URL, headers=bearer(key), json=chat(user="x") | {"steering": {"preset": "cheer"}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "policy_violation")


async def test_the_kill_switch_holds_over_a_roll_out(desk: Desk) -> None:
    await desk.make(steps=[{"share": 1.0}])
    await desk.client.put("/v1/admin/kill-switch", headers=OWNER, json={"on": True})
    receipt = await desk.ask()
    assert receipt["disabled"] and receipt["rollouts"] == [] and receipt["applied"] == []


async def test_artifacts_are_rolled_out_too(desk: Desk, library: Library) -> None:
    """Where a preset or a request names the alias, also as the default spec does."""
    store(library, "calm", 1.0)
    library.set_alias("calm", "production", 1)
    store(library, "calm", 3.0)
    library.switches.set_default_spec(_spec("calm"))
    made = await desk.make(collection="artifact", target="calm@production", steps=[{"share": 1.0}])
    receipt = await desk.ask(steering={"interventions": [{"artifact": "calm"}, {"artifact": "calm@1"}]})
    assert [one["artifact"] for one in receipt["applied"]] == ["calm@2", "calm@2", "calm@1"]
    assert [one["arm"] for one in receipt["rollouts"]] == ["candidate"]
    await desk.do(made["id"], "return")
    receipt = await desk.ask(steering={"interventions": [{"artifact": "calm"}]})
    assert [one["artifact"] for one in receipt["applied"]] == ["calm@1", "calm@1"]


async def test_from_draft_to_production(desk: Desk, library: Library) -> None:
    operator = await make(desk.client, name="olga", tenant="default", roles=["operate"])
    made = await desk.make(publish=False)
    published = await desk.do(made["id"], "publish", bearer(operator))
    assert (published["status"], published["approved_by"]) == ("published", "default/olga")
    done = await desk.do(made["id"], "promote")
    assert done["status"] == "production"
    assert [(one["what"], one["by"]) for one in done["history"]] == [
        ("created", "owner"), ("published", "olga"), ("promoted", "owner")]
    assert library.presets.resolve("cheer").version == 2
    receipt = await desk.ask()
    assert receipt["presets"] == {"preset": "cheer@2"} and receipt["rollouts"] == []
    for what in ("publish", "promote"):
        assert await desk.refused(made["id"], what) == (409, "conflict")
    # To return what has ended changes nothing.
    assert (await desk.do(made["id"], "return"))["status"] == "production"


async def test_publishing_may_need_a_second_person(desk: Desk, settings: Settings) -> None:
    state = desk.app.state.server
    desk.app.state.server = replace(state, settings=settings.model_copy(update={"rollout_two_people": True}))
    one = await make(desk.client, name="one", tenant="default", roles=["operate"])
    two = await make(desk.client, name="two", tenant="default", roles=["operate"])
    made = await desk.make(publish=False, headers=bearer(one))
    assert await desk.refused(made["id"], "publish", bearer(one)) == (409, "conflict")
    assert (await desk.do(made["id"], "publish", bearer(two)))["approved_by"] == "default/two"


async def test_nothing_is_pulled_away_under_a_roll_out(desk: Desk) -> None:
    made = await desk.make()
    client, presets = desk.client, "/v1/presets/cheer"
    for answer in (await client.put(f"{presets}/aliases/production", headers=OWNER, json={"version": 2}),
                   await client.delete(f"{presets}/aliases/production", headers=OWNER),
                   await client.delete(f"{presets}@2", headers=OWNER, params={"force": "true"}),
                   await client.delete(presets, headers=OWNER, params={"force": "true"}),
                   await client.delete(f"{ROLLOUTS}/{made['id']}", headers=OWNER)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict"), answer.text
    second = await desk.make(publish=False)
    assert await desk.refused(second["id"], "publish") == (409, "conflict")
    await desk.do(made["id"], "return")
    assert (await client.delete(f"{presets}@2", headers=OWNER)).status_code == 200
    # What it would have tried is gone.
    assert await desk.refused(second["id"], "publish") == (404, "not_found")
    for id in (made["id"], second["id"]):
        assert (await client.delete(f"{ROLLOUTS}/{id}", headers=OWNER)).status_code == 204
    assert (await client.get(ROLLOUTS, headers=OWNER)).json() == {"data": []}


@pytest.mark.parametrize(("terms", "code"), [
    ({"steps": []}, 400), ({"steps": [{"share": 0.0}]}, 400), ({"steps": [{"share": 0.5}, {"share": 0.1}]}, 400),
    ({"then": "promote"}, 400), ({"rails": [ERRORS, ERRORS]}, 400), ({"candidate": 1}, 400),
    ({"rails": [{"metric": "outcome", "margin": 0.1}]}, 400), ({"rails": [{"metric": "errors", "margin": 1.0}]}, 400),
    ({"rails": [{"metric": "outcome", "grader": "refusal", "outcome": "nice", "margin": 0.1}]}, 400),
    ({"rails": [{"metric": "outcome", "grader": "nobody", "outcome": "nice", "margin": 0.1}]}, 400),
    ({"rails": [{"metric": "errors", "margin": 0.1, "scale": 2.0}]}, 400), ({"alpha": 0.0}, 400),
    ({"candidate": 9}, 404), ({"target": "cheer@canary"}, 404), ({"target": "nobody"}, 404)])
async def test_terms_that_make_no_sense_are_refused(desk: Desk, terms: dict[str, Any], code: int) -> None:
    body = {"target": "cheer", "candidate": 2, "steps": [{"share": 0.5}], **terms}
    answer = await desk.client.post(ROLLOUTS, headers=OWNER, json=body)
    assert answer.status_code == code, answer.text
    assert answer.json()["error"]["param"], answer.text


async def test_a_candidate_that_does_not_run_is_not_published(desk: Desk, engine: ScriptedEngine) -> None:
    made = await desk.make(publish=False)
    engine.fails_at = 0
    answer = await desk.client.post(f"{ROLLOUTS}/{made['id']}/publish", headers=OWNER)
    assert answer.status_code >= 400 and answer.json()["error"]["param"] == "candidate"
    assert (await desk.show(made["id"]))["status"] == "draft"


async def test_a_roll_out_goes_on_after_a_restart(desk: Desk, library: Library) -> None:
    made = await desk.make(rails=[ERRORS], steps=[{"share": 0.5, "wait_s": 0}, {"share": 1.0, "wait_s": 0}])
    for user in two_users(made["id"], 0.5) * 3:
        await desk.ask(user)
    await desk.rollouts.look()
    again = Rollouts(library.rollouts, Registry())
    await again.refresh()
    found = again.running(made["id"])
    assert found is not None and found.stored.step == 0
    state, = found.tallies.states()
    assert (state.stable_count, state.candidate_count, state.stable_mean) == (3, 3, 0.0)


async def test_steps_wait_for_their_time_and_their_samples(desk: Desk, library: Library) -> None:
    made = await desk.make(rails=[ERRORS | {"samples": 2}], then="promote", steps=[
        {"share": 0.5, "wait_s": 0}, {"share": 0.6, "wait_s": 0}])
    stable, candidate = two_users(made["id"], 0.5)
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["step"] == 0
    for user in (stable, candidate, stable, candidate):
        await desk.ask(user)
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["step"] == 1
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["status"] == "published"
    stable, candidate = two_users(made["id"], 0.6)
    for user in (stable, candidate, stable, candidate):
        await desk.ask(user)
    await desk.rollouts.look()
    done = await desk.show(made["id"])
    assert done["status"] == "production" and library.presets.resolve("cheer").version == 2
    assert [one["by"] for one in done["history"]] == ["owner", "owner", "roll-out", "roll-out"]


async def test_a_step_lasts_as_long_as_it_says(desk: Desk) -> None:
    made = await desk.make(steps=[{"share": 0.5, "wait_s": 3600.0}, {"share": 1.0}])
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["step"] == 0


async def test_a_candidate_that_fails_is_returned_by_itself(desk: Desk, engine: ScriptedEngine, library: Library
                                                            ) -> None:
    """The engine fails on what the candidate makes of a prompt; within a few dozen requests nobody gets it any more."""
    made = await desk.make(rails=[ERRORS], steps=[{"share": 0.5}])
    stable, candidate = two_users(made["id"], 0.5)
    good, failure = engine.script, TrimtabError("it does not get through")
    new = library.source("new@1")

    def script(generation: Any) -> Any:
        if generation.program is not None and generation.program.compiled[0].applied.artifact == new.ref:
            raise failure
        return good(generation)

    engine.script = script
    answers: Counter[int] = Counter()
    for _ in range(10):
        for user in (stable, candidate):
            body = chat(user=user) | {"steering": {"preset": "cheer"}}
            answers[(await desk.client.post(URL, headers=OWNER, json=body)).status_code] += 1
    assert answers == {200: 10, 500: 10}
    running = desk.rollouts.running(made["id"])
    assert running is not None
    desk.rollouts._judge(running)
    of_it = f'trimtab_rollout_least_samples{{rail="errors",rollout="{made["id"]}"}}'
    assert f"{of_it} 10.0" in (await desk.client.get("/metrics", headers=OWNER)).text
    await desk.rollouts.look()
    assert of_it not in (await desk.client.get("/metrics", headers=OWNER)).text
    [alert] = (await desk.client.get("/v1/alerts", headers=OWNER)).json()["data"]
    assert (alert["name"], alert["state"], alert["value"]) == ("TrimtabRolloutReturned", "firing", 1.0)
    ended = await desk.show(made["id"])
    assert ended["status"] == "returned" and "errors" in ended["history"][-1]["why"]
    assert ended["history"][-1]["by"] == "roll-out"
    assert (ended["rails"][0]["candidate_mean"], ended["rails"][0]["stable_mean"]) == (1.0, 0.0)
    assert ended["rails"][0]["evidence"] >= 1
    assert await desk.version(candidate) == "cheer@1"
    record = library.audit.list(Wanted(action="rollout.returned"))[0]
    assert (record.target, record.key_name) == (made["id"], "roll-out")


async def test_a_return_acts_at_once_while_the_library_is_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await desk.make(rails=[ERRORS], steps=[{"share": 0.5}])
    _, candidate = two_users(made["id"], 0.5)
    for _ in range(20):
        desk.rollouts.sample(made["id"], "stable", {0: 0.0})
        desk.rollouts.sample(made["id"], "candidate", {0: 1.0})

    def away(*_: object, **__: object) -> None:
        raise LibraryUnavailable("it is gone")

    with monkeypatch.context() as gone:
        for name in ("add", "tallies", "give_back"):
            gone.setattr(f"vectors.library.rollouts.Rollouts.{name}", away)
        await desk.rollouts.look()
        assert desk.rollouts.failure is not None
        assert await desk.version(candidate) == "cheer@1"
    assert (await desk.show(made["id"]))["status"] == "published"
    await desk.rollouts.look()
    assert desk.rollouts.failure is None
    ended = await desk.show(made["id"])
    assert ended["status"] == "returned" and ended["rails"][0]["candidate_samples"] == 20


async def test_what_was_read_before_a_change_does_not_undo_it(desk: Desk, library: Library,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the library that began before a roll-out was returned, and comes back after that."""
    made = await desk.make(steps=[{"share": 1.0}])
    read, go, running = threading.Event(), threading.Event(), type(library.rollouts).running

    def slow(self: Any) -> Any:
        found = running(self)
        if not read.is_set():
            read.set()
            assert go.wait(60)
        return found

    monkeypatch.setattr("vectors.library.rollouts.Rollouts.running", slow)
    look = asyncio.create_task(desk.rollouts.refresh())
    assert await asyncio.to_thread(read.wait, 60)
    returning = asyncio.create_task(desk.do(made["id"], "return"))
    # It is answered at once, or waits for the look.
    await asyncio.wait({returning}, timeout=0.5)
    go.set()
    await asyncio.gather(look, returning)
    assert await desk.version() == "cheer@1"


async def test_no_request_waits_for_the_library(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever roll-outs ask of the library fails here, and requests find their arms all the same."""
    made = await desk.make()
    stable, candidate = two_users(made["id"], 0.5)

    def away(*_: object, **__: object) -> None:
        raise LibraryUnavailable("it is gone")

    for name in ("running", "add", "tallies", "give_back", "advance", "find"):
        monkeypatch.setattr(f"vectors.library.rollouts.Rollouts.{name}", away)
    assert await desk.version(stable) == "cheer@1" and await desk.version(candidate) == "cheer@2"


async def test_answers_are_graded_and_measured_for_the_rails(desk: Desk, engine: ScriptedEngine, vocabulary: Vocabulary,
                                                            library: Library) -> None:
    """The candidate refuses and repeats itself. What the rails see of it is what was said."""
    rails = [{"metric": "refusals", "margin": 0.1}, {"metric": "repetition", "margin": 0.1},
             {"metric": "latency", "margin": 0.01}]
    made = await desk.make(rails=rails, sample=1.0)
    stable, candidate = two_users(made["id"], 0.5)
    say = {1.0: "The bread is done when it sounds hollow.", 2.0: "I cannot help with that."}

    def script(generation: Any) -> Any:
        program = generation.program
        which = 2.0 if program.compiled[0].applied.artifact == "new@1" else 1.0
        return vocabulary.encode(say[which], special_tokens=False)

    engine.script = script
    for user in (stable, candidate) * 3:
        await desk.ask(user, max_tokens=64)
    server = desk.app.state.server
    async with asyncio.timeout(60):
        await server.shadow.drained()
        await server.rollout_measuring.drained()
    refusals, repetition, latency = (await desk.show(made["id"]))["rails"]
    assert (refusals["stable_samples"], refusals["stable_mean"]) == (3, 0.0)
    assert (refusals["candidate_samples"], refusals["candidate_mean"]) == (3, 1.0)
    assert repetition["candidate_samples"] == 3 and repetition["stable_mean"] < 0.2
    assert latency["stable_samples"] == 3 and latency["stable_mean"] > 0


async def test_how_many_are_at_work_is_bounded(desk: Desk, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vectors.library.rollouts.MOST_PUBLISHED", 1)
    monkeypatch.setattr("vectors.library.rollouts.MOST_KEPT", 3)
    library.presets.set_alias("cheer", "other", 1)
    first = await desk.make()
    second = await desk.make(publish=False, target="cheer@other")
    assert await desk.refused(second["id"], "publish") == (409, "conflict")
    await desk.do(first["id"], "return")
    await desk.do(second["id"], "publish")
    await desk.make(publish=False)
    # The one that ended makes room, and what has not ended does not.
    await desk.make(publish=False)
    assert first["id"] not in {one["id"] for one in (await desk.client.get(ROLLOUTS, headers=OWNER)).json()["data"]}
    answer = await desk.client.post(ROLLOUTS, headers=OWNER, json={
        "target": "cheer", "candidate": 2, "steps": [{"share": 0.5}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "library_full")


async def test_two_servers_take_one_step_together(desk: Desk, library: Library) -> None:
    made = await desk.make(steps=[{"share": 0.1, "wait_s": 0}, {"share": 0.5, "wait_s": 0}, {"share": 1.0}])
    second = Rollouts(library.rollouts, Registry())
    await second.refresh()
    # Both see step 0 and want to go on from it.
    for _ in range(2):
        library.rollouts.advance(made["id"], 0)
    assert library.rollouts.find(made["id"]).step == 1
    library.rollouts.give_back(made["id"], "one")
    library.rollouts.give_back(made["id"], "two")
    ended = library.rollouts.find(made["id"])
    assert ended.status == "returned" and [one["why"] for one in ended.history if one["what"] == "returned"] == ["one"]
    # Samples that come late change nothing.
    second.sample(made["id"], "stable", {})
    await second.look()
    assert second.failure is None and second.running(made["id"]) is None


async def test_a_grader_that_fails_costs_a_sample(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await desk.make(rails=[{"metric": "refusals", "margin": 0.1}], sample=1.0)

    def fails(*_: object) -> None:
        raise ValueError("no")

    with monkeypatch.context() as broken:
        broken.setattr("server.rollouts.measuring.verdicts_on", fails)
        await desk.ask()
        await measured(desk)
    assert (await desk.show(made["id"]))["rails"][0]["stable_samples"] == 0
    assert 'trimtab_rollout_dropped_total{reason="failed"} 1.0' in (
        await desk.client.get("/metrics", headers=OWNER)).text
    for user in two_users(made["id"], 0.5):
        await desk.ask(user)
    await measured(desk)
    rail = (await desk.show(made["id"]))["rails"][0]
    assert (rail["stable_samples"], rail["candidate_samples"]) == (1, 1)


async def measured(desk: Desk) -> None:
    state = desk.app.state.server
    async with asyncio.timeout(60):
        await state.shadow.drained()
        await state.shadow_arms.drained()
        await state.rollout_measuring.drained()


async def test_the_page_and_the_command_line(address: str, app: FastAPI, tmp_path: Path) -> None:
    """The terms of docs/rollouts.md are taken as they stand, and each command does what it says."""
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text()
    terms = tmp_path / "terms.json"
    terms.write_text(page.split("```json\n")[1].split("```")[0])

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, ["rollout", *words, "--url", address, "--api-key", "owner-s-key"])
        assert result.exit_code == 0, result.output
        return result.output

    def work() -> None:
        made = run("create", "cheer@production", "2", "--terms", str(terms))
        made = re.findall("ro-[0-9a-f]+", made)[0]
        assert "published, step 1 of 3" in run("publish", made)
        shown = run("show", made)
        assert "refusals" in shown and "refusal: broken" in shown and "published by owner" in shown
        assert '"then": "hold"' in run("show", made, "--json")
        assert made in run("list")
        assert "returned by owner: too bold" in run("return", made, "--why", "too bold")
        run("delete", made)
        made = run("create", "cheer", "2", "--share", "0.1", "--share", "1")
        made = re.findall("ro-[0-9a-f]+", made)[0]
        run("publish", made)
        assert "production" in run("promote", made)

    await asyncio.to_thread(work)


async def test_both_kinds_of_the_python_client(address: str) -> None:
    def work() -> None:
        with Client(address, api_key="owner-s-key") as client:
            made = client.create_rollout("cheer", 2, steps=[{"share": 0.5}], rails=[ERRORS])
            assert client.get_rollout(made.id).status == "draft"
            assert client.publish_rollout(made.id).rails[0].evidence == 0
            assert [one.id for one in client.rollouts()] == [made.id]
            receipt = client.chat("hi", model=MODEL, steering={"preset": "cheer"}, user="ann").steering
            assert receipt.rollouts[0]["rollout"] == made.id
            assert client.return_rollout(made.id, "enough").status == "returned"
            client.delete_rollout(made.id)

    await asyncio.to_thread(work)


async def test_another_tenant_sees_and_sways_nothing(desk: Desk, library: Library) -> None:
    """Neither the roll-out itself, nor its guard rails by requests that fail because the name is not theirs."""
    for value in (1.0, 2.0):
        store(library, "team/calm", value)
    library.set_alias("team/calm", "production", 1)
    mine = await make(desk.client, name="mine", tenant="team", roles=["operate", "infer"])
    other = await make(desk.client, name="other", tenant="rival", roles=["operate", "infer"])
    body = {"collection": "artifact", "target": "team/calm", "candidate": 2, "steps": [{"share": 1.0}],
            "rails": [ERRORS]}
    assert (await desk.client.post(ROLLOUTS, headers=bearer(other), json=body)).status_code == 404
    made = (await desk.client.post(ROLLOUTS, headers=bearer(mine), json=body)).json()
    await desk.do(made["id"], "publish", bearer(mine))
    asks = {"steering": {"interventions": [{"artifact": "team/calm"}]}, "user": "u"}
    assert (await desk.client.post(URL, headers=bearer(other), json=chat() | asks)).status_code == 404
    assert (await desk.client.get(ROLLOUTS, headers=bearer(other))).json() == {"data": []}
    for what in ("promote", "publish"):
        assert await desk.refused(made["id"], what, bearer(other)) == (404, "not_found")
    # Nor does what the other one changes make the server forget it.
    for value in (1.0, 2.0):
        store(library, "rival/calm", value)
    library.set_alias("rival/calm", "production", 1)
    theirs = (await desk.client.post(ROLLOUTS, headers=bearer(other), json=body | {"target": "rival/calm"})).json()
    await desk.do(theirs["id"], "publish", bearer(other))
    answer = await desk.client.post(URL, headers=bearer(mine), json=chat() | asks)
    assert answer.json()["steering"]["applied"][0]["artifact"] == "team/calm@2"
    rail = (await desk.show(made["id"]))["rails"][0]
    assert (rail["candidate_samples"], rail["candidate_mean"]) == (1, 0.0)
    # What is the house's is read by all, and changed by the house alone.
    house = await desk.make(publish=False)
    assert await desk.refused(house["id"], "publish", bearer(mine)) == (403, "foreign_name")


async def test_a_server_looks_as_soon_as_it_is_woken(desk: Desk, library: Library) -> None:
    """The half second is an hour in these tests, so only the wake can have told it."""
    made = await desk.make(steps=[{"share": 1.0}])
    library.rollouts.give_back(made["id"], "by another server")
    desk.rollouts.wake()
    async with asyncio.timeout(60):
        while desk.rollouts.behind("preset", "cheer") is not None:
            await asyncio.sleep(0.01)
