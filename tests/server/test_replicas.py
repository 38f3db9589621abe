"""Two servers on one library behave as one: what is changed on one acts on the other as soon as it is told."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI

import server.background.board
import server.background.jobs
import server.background.sharing
import server.identity.keys
import server.requests.killswitch
import vectors.library.revision
from server.app import create_app
from server.effects.outcome_store import OutcomeCount
from server.effects.outcome_store import write as write_outcomes
from server.effects.report import EVERY, InArm
from server.effects.store import MINUTE_S, Sample
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.postgres import Cluster, needs_postgres
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.vectors.making import metadata, vector_payload
from vectors.library import Library
from vectors.library.audit.log import Wanted

pytestmark = [pytest.mark.slow, needs_postgres]
OWNER = {"Authorization": "Bearer owner"}
SPEC = {"interventions": [{"artifact": "cheerful", "layers": [1]}]}
NEVER_S = 3600.0


class Replica:
    def __init__(self, app: FastAPI, client: httpx.AsyncClient, library: Library) -> None:
        self.app, self.client, self.library = app, client, library

    async def asked(self, method: str, path: str, *, key: str = "owner", **fields: Any) -> httpx.Response:
        return await self.client.request(method, path, headers={"Authorization": f"Bearer {key}"}, **fields)

    async def done(self, method: str, path: str, **fields: Any) -> Any:
        answer = await self.asked(method, path, **fields)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    async def steered(self, key: str = "owner", **fields: Any) -> Any:
        return (await self.done("POST", "/v1/chat/completions", key=key, json=chat(**fields)))["steering"]


@pytest.fixture
async def replicas(tmp_path: Path, postgres: Cluster, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
                   ) -> AsyncIterator[tuple[Replica, Replica]]:
    """Nothing is looked for while they run, so that only what is told gets from one to the other."""
    for module, name in ((server.identity.keys, "POLL_S"), (server.requests.killswitch, "POLL_S"),
                         (vectors.library.revision, "FRESH_S")):
        monkeypatch.setattr(module, name, NEVER_S)
    url = postgres.library_url(tmp_path)
    async with AsyncExitStack() as stack:
        made = []
        for name in ("a", "b"):
            settings = Settings(served_model_name=MODEL, data_dir=tmp_path / name, database_url=url, api_key="owner",
                                blob_url=(tmp_path / "blobs").as_uri())
            library = Library.open(url, settings.library_blob_url)
            app = create_app(settings, ScriptedEngine(vocabulary), library, vocabulary, engine_name="scripted")
            await stack.enter_async_context(app.router.lifespan_context(app))
            client = await stack.enter_async_context(httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://localhost",
                timeout=60))
            made.append(Replica(app, client, library))
        await until(lambda: followed(made))
        made[0].library.create(metadata(), vector_payload(1))
        made[0].library.create(metadata(), vector_payload(2))
        yield made[0], made[1]
    postgres.clear()


async def followed(replicas: list[Replica]) -> bool:
    return all(replica.library.followed for replica in replicas)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(60):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_whatever_one_changes_acts_on_the_other(replicas: tuple[Replica, Replica]) -> None:
    here, there = replicas

    async def ref() -> str:
        found: str = (await there.steered(steering=SPEC))["applied"][0]["artifact"]
        return found

    await here.done("PUT", "/v1/artifacts/cheerful/aliases/production", json={"version": 1})
    await until(lambda: said(ref, "cheerful@1"))
    await here.done("PUT", "/v1/artifacts/cheerful/aliases/production", json={"version": 2})
    await until(lambda: said(ref, "cheerful@2"))

    await here.done("PUT", "/v1/admin/default-spec", json=SPEC)

    async def by_default() -> bool:
        return bool((await there.steered())["applied"])

    await until(by_default)
    await here.done("DELETE", "/v1/admin/default-spec")
    await until(lambda: said(by_default, False))

    made = await here.done("POST", "/v1/admin/keys", json={"name": "k", "tenant": "team", "roles": ["infer"]})

    async def status(**fields: Any) -> int:
        return (await there.asked("POST", "/v1/chat/completions", key=made["key"], json=chat(**fields))).status_code

    await until(lambda: said(status, 200))
    await here.done("PUT", "/v1/admin/policies/team", json={"artifacts": ["other*"]})
    await until(lambda: said(lambda: status(steering=SPEC), 403))
    assert await status() == 200
    await here.done("PATCH", f"/v1/admin/keys/{made['id']}", json={"blocked": True})
    await until(lambda: said(status, 401))

    await here.done("PUT", "/v1/admin/kill-switch", json={"on": True})

    async def off() -> bool:
        return bool((await there.steered(steering=SPEC))["disabled"])

    await until(off)
    await there.done("PUT", "/v1/admin/kill-switch", json={"on": False})

    async def off_here() -> bool:
        return bool((await here.steered(steering=SPEC))["disabled"])

    await until(lambda: said(off_here, False))
    metrics = (await there.asked("GET", "/metrics")).text
    assert "trimtab_library_followed 1.0" in metrics and "trimtab_library_late_total 0.0" in metrics


async def said(ask: Callable[[], Awaitable[Any]], wanted: object) -> bool:
    found: bool = await ask() == wanted
    return found


async def test_effects_and_outcomes_of_all_add_up(replicas: tuple[Replica, Replica]) -> None:
    minute = int(time.time()) // MINUTE_S
    for replica, kl, count in ((replicas[0], 0.1, 3), (replicas[1], 0.4, 1)):
        store = replica.app.state.server.effect_store
        for arm in (EVERY, InArm("ro-1", "candidate")):
            store.write([Sample(minute, "all", "all", "", 8, kl, 0.0, 0.0, 0.0, 8, 0.0, "acme", *arm)] * count)
            write_outcomes(store, [OutcomeCount(minute, "all", "", "refusal", "answered", "acme", *arm, count)])
    for replica in replicas:
        for query in ("group=all", "group=tenant", "group=arm", "rollout=ro-1&arm=candidate"):
            found = await replica.done("GET", f"/v1/effects?{query}")
            assert [one["completions"] for one in found["data"]] == [4], query
            assert found["data"][0]["kl_mean"] == pytest.approx((3 * 0.1 + 0.4) / 4)
            assert [one["answers"] for one in found["outcomes"]] == [4], query


async def test_a_response_is_continued_on_another_server(replicas: tuple[Replica, Replica]) -> None:
    here, there = replicas
    first = await here.done("POST", "/v1/responses", json={"model": MODEL, "input": "hi", "max_output_tokens": 8})
    assert (await there.done("GET", f"/v1/responses/{first['id']}"))["output"] == first["output"]


PAIRS = [{"positive": f"{good} {noun}", "negative": f"{bad} {noun}", "item": noun}
         for noun in ("day", "world", "hello", "x", "y", "z", "w", "v", "u", "t")
         for good, bad in (("good", "bad"), ("ST", "OP"))]


@pytest.mark.parametrize("end", ["stops", "hangs"])
async def test_a_job_of_a_server_that_is_gone_is_done_by_another_and_once(
        replicas: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Either the first one is told to stop, or it hangs for so long that its lease ends, and then goes on."""
    here, there = replicas
    held, go = asyncio.Event(), asyncio.Event()
    engine = here.app.state.server.engine
    capture = engine.capture

    async def slow(*arguments: Any) -> Any:
        # What measures how long a job will take comes before it.
        if here.app.state.server.jobs.held():
            held.set()
            await go.wait()
        return await capture(*arguments)

    monkeypatch.setattr(engine, "capture", slow)
    if end == "hangs":
        for module in (server.background.board, server.background.jobs, server.background.sharing):
            monkeypatch.setattr(module, "LEASE_S", 0.5)
        monkeypatch.setattr(server.background.board, "MARGIN_S", 0.2)
    monkeypatch.setattr(server.background.sharing, "BEAT_S", 0.05)
    job = await here.done("POST", "/v1/extract", json={"name": "made", "layers": [1, 2], "token": 0, "pairs": PAIRS})
    with anyio.fail_after(60):
        await held.wait()
    assert job["id"] in [one["id"] for one in (await there.done("GET", "/v1/jobs"))["data"]]
    sharing = here.app.state.sharing
    if end == "hangs":
        sharing._task.cancel()
    else:
        await sharing.stop()

    async def done() -> bool:
        return (await there.done("GET", f"/v1/jobs/{job['id']}"))["status"] == "succeeded"

    await until(done)
    go.set()
    await until(lambda: said(lambda: nothing_runs(here), True))
    assert [one.version for one in there.library.versions("made")] == [1]
    assert [one.action for one in there.library.audit.list(Wanted(target=job["id"], after=0))] == [
        "job.create", "job.resume"]
    assert "trimtab_jobs_taken_over_total 1.0" in (await there.asked("GET", "/metrics")).text

    async def told_here() -> tuple[str, Any]:
        found = await here.done("GET", f"/v1/jobs/{job['id']}")
        return found["status"], found["created_at"]

    await until(lambda: said(told_here, ("succeeded", job["created_at"])))


async def nothing_runs(replica: Replica) -> bool:
    return not replica.app.state.server.jobs.held()


async def test_a_job_is_cancelled_through_any_server(replicas: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    here, there = replicas
    monkeypatch.setattr(server.background.sharing, "BEAT_S", 0.05)

    engine = here.app.state.server.engine
    capture = engine.capture

    async def never(*arguments: Any) -> Any:
        if here.app.state.server.jobs.held():
            await asyncio.Event().wait()
        return await capture(*arguments)

    monkeypatch.setattr(engine, "capture", never)
    job = await here.done("POST", "/v1/extract", json={"name": "made", "layers": [1], "token": 0, "pairs": PAIRS})
    await there.done("POST", f"/v1/jobs/{job['id']}/cancel")

    async def status() -> str:
        found: str = (await there.done("GET", f"/v1/jobs/{job['id']}"))["status"]
        return found

    await until(lambda: said(status, "cancelled"))


async def test_the_kill_switch_works_with_the_database_gone(replicas: tuple[Replica, Replica], postgres: Cluster
                                                            ) -> None:
    here, there = replicas
    assert (await here.steered(steering=SPEC))["disabled"] is False
    postgres.stop()
    try:
        answer = await here.done("PUT", "/v1/admin/kill-switch", json={"on": True})
        assert (answer["on"], answer["stored"]) == (True, False)
        assert (await here.steered(steering=SPEC))["disabled"] is True
    finally:
        postgres.start()

    async def off() -> bool:
        return bool((await there.done("GET", "/v1/admin/kill-switch"))["on"])

    # It is stored as soon as that can be, and told to the other.
    here.app.state.server.kill_switch.wake()
    await until(off)
