"""Quotas: what a tenant and a key may use, how it is told, and what happens where it is counted elsewhere."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from openai import AsyncOpenAI, RateLimitError
from pydantic import SecretStr

from server.identity.quotas import Quotas, bounds, spelled
from server.requests.admission.fairness import LAST, FairQueue
from server.requests.admission.queue import _weight_of
from server.settings import Settings
from steering.artifacts.payload import Payload
from steering.language.spec import Spec
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, code, make
from tests.server.test_steering import store
from vectors.artifact import Metadata
from vectors.library import Library
from vectors.storage_errors import LibraryFull

URL = "/v1/chat/completions"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


class Team:
    """A key of the tenant `team`, under quotas, at a time that stands still."""

    def __init__(self, client: httpx.AsyncClient, key: dict[str, Any], quotas: Quotas) -> None:
        self.client, self.key, self.quotas = client, key, quotas
        self.at = 600.0
        quotas.now = lambda: self.at

    async def quota(self, key_id: str | None = None, **quota: Any) -> None:
        answer = await self.client.put("/v1/admin/policies/team", headers=OWNER, json={"quota": quota},
                                       params={} if key_id is None else {"key_id": key_id})
        assert answer.status_code == 200, answer.text

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.client.post(URL, headers=bearer(self.key), json=chat(**fields))

    async def used(self) -> dict[str, int]:
        told = (await self.client.get("/v1/key", headers=bearer(self.key))).json()
        return {f"{one['of'].split()[0]}: {one['limit']}": one["used"] for one in told["limits"]}


@pytest.fixture
async def team(client: httpx.AsyncClient, app: FastAPI) -> Team:
    return Team(client, await make(client, "infer", "library_write", tenant="team"), app.state.server.quotas)


def limits(answer: httpx.Response) -> dict[str, str]:
    return {name.removeprefix("x-ratelimit-"): value for name, value in answer.headers.items()
            if name.startswith("x-ratelimit-")}


async def test_requests_a_minute(team: Team) -> None:
    await team.quota(requests_per_minute=2)
    for remaining in (1, 0):
        answer = await team.ask()
        assert answer.status_code == 200
        assert limits(answer) == {"limit-requests": "2", "remaining-requests": str(remaining), "reset-requests": "1m0s"}
    team.at += 15.5
    refused = await team.ask(stream=True)
    assert code(refused) == (429, "rate_limit_exceeded") and refused.headers["retry-after"] == "45"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["message"] == ("the quota of tenant team is 2 requests a minute. Try again in 44s.")
    assert limits(refused)["remaining-requests"] == "0"
    # What was refused was not counted, what is counted begins anew with the minute, and others have their own.
    assert await team.used() == {"tenant: requests a minute": 2}
    other = await make(team.client, "infer", name="other", tenant="other")
    assert limits(await team.client.post(URL, headers=bearer(other), json=chat())) == {}
    team.at += 45
    assert (await team.ask()).status_code == 200


async def test_tenant_and_key_both_count(team: Team) -> None:
    sibling = await make(team.client, "infer", name="sibling", tenant="team")
    await team.quota(requests_per_minute=3)
    await team.quota(team.key["id"], requests_per_minute=1)
    assert (await team.ask()).status_code == 200
    refused = await team.ask()
    assert code(refused) == (429, "rate_limit_exceeded") and f"key {team.key['id']}" in refused.text
    # What the key was refused has not been taken from the tenant.
    assert await team.used() == {"tenant: requests a minute": 1, "key: requests a minute": 1}
    for status in (200, 200, 429):
        assert (await team.client.post(URL, headers=bearer(sibling), json=chat())).status_code == status


async def test_tokens_are_counted_by_what_a_request_took(team: Team, engine: ScriptedEngine) -> None:
    engine.script = lambda generation: [65, 66, 67]
    await team.quota(tokens_per_minute=1000, tokens_per_period=5000)
    answer = (await team.ask(max_tokens=100)).json()
    took = answer["usage"]["total_tokens"]
    assert answer["usage"]["completion_tokens"] == 4 and took < 100
    assert await team.used() == {"tenant: tokens a minute": took, "tenant: tokens a month": took}
    stream = await team.ask(max_tokens=100, stream=True)
    assert stream.status_code == 200 and limits(stream)["limit-tokens"] == "1000"
    assert await team.used() == {"tenant: tokens a minute": 2 * took, "tenant: tokens a month": 2 * took}
    # Before it is generated, a request counts with what it may generate (512 at most).
    assert limits(stream)["remaining-tokens"] == str(1000 - took - (took - 4) - 100)
    for _ in range(2):
        assert (await team.ask(max_tokens=2, n=2)).status_code == 200
    refused = await team.ask(max_tokens=200, n=16)
    assert code(refused) == (429, "rate_limit_exceeded") and "1000 tokens a minute" in refused.text
    assert refused.json()["error"]["message"].endswith("Ask for fewer tokens at a time.")


async def test_tokens_of_a_period(team: Team) -> None:
    await team.quota(tokens_per_period=200, period="day")
    while (answer := await team.ask()).status_code == 200:
        assert int(limits(answer)["remaining-tokens"]) < 200
    assert code(answer) == (429, "quota_exceeded") and "200 tokens a day" in answer.text
    assert int(answer.headers["retry-after"]) == 86400 - 600
    team.at += 86400
    assert (await team.ask()).status_code == 200


async def test_requests_at_once(team: Team, engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    await team.quota(parallel_requests=2)
    running = [asyncio.create_task(team.ask(stream=bool(n))) for n in range(2)]
    async with asyncio.timeout(30):
        while len(engine.completions) < 2:
            await asyncio.sleep(0.005)
    refused = await team.ask()
    assert code(refused) == (429, "rate_limit_exceeded") and "2 requests at once" in refused.text
    engine.gate.set()
    assert [one.status_code for one in await asyncio.gather(*running)] == [200, 200]
    assert (await team.ask()).status_code == 200
    # A request that fails gives its place back, too.
    for _ in range(3):
        assert (await team.ask(max_tokens=-1)).status_code == 400
    assert (await team.ask()).status_code == 200


async def test_every_way_in_is_counted_and_nothing_else(team: Team, library: Library) -> None:
    await team.quota(requests_per_minute=100)
    rows = torch.eye(8)
    library.create(Metadata(name="scope", kind="sae", op="sae", site="resid_post"), Payload.build("sae", {1: {
        "encoder": rows, "encoder_bias": rows[0], "decoder": rows.clone(), "decoder_bias": rows[1]}}))
    said = [{"role": "user", "content": "hi"}]
    ways = {"/v1/chat/completions": {"messages": said}, "/v1/completions": {"prompt": "hi"},
            "/v1/responses": {"input": "hi"}, "/v1/messages": {"messages": said, "max_tokens": 4},
            "/v1/lens": {"input": "hi"}, "/v1/features": {"input": "hi", "artifact": "scope"}}
    for n, (path, body) in enumerate(ways.items(), 1):
        await team.client.post(path, headers=bearer(team.key), json=body | {"model": MODEL})
        assert await team.used() == {"tenant: requests a minute": n}, path
    for path in ("/v1/models", "/v1/files", "/v1/capabilities"):
        answer = await team.client.get(path, headers=bearer(team.key))
        assert answer.status_code == 200 and limits(answer) == {}
    assert await team.used() == {"tenant: requests a minute": len(ways)}


async def test_clients_of_openai_and_anthropic_know_the_error(team: Team, app: FastAPI) -> None:
    await team.quota(requests_per_minute=1)
    assert (await team.ask()).status_code == 200
    transport = httpx.ASGITransport(app=app)
    async with AsyncOpenAI(api_key=team.key["key"], base_url="http://localhost/v1", max_retries=0,
                           http_client=httpx.AsyncClient(transport=transport)) as openai:
        with pytest.raises(RateLimitError) as refused:
            await openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert refused.value.code == "rate_limit_exceeded"
    answer = await team.client.post("/v1/messages", headers=bearer(team.key), json={
        "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")


async def test_lines_of_a_batch_wait_for_their_turn(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that a quota refuses is asked again, and none is lost."""
    monkeypatch.setattr("server.batches.lines.LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr("server.batches.batches.TRIES", 10_000)
    await team.quota(requests_per_minute=2)
    lines = "\n".join(json.dumps({"custom_id": str(n), "method": "POST", "url": URL, "body": chat()}) for n in range(3))
    headers = bearer(team.key)
    file = await team.client.post("/v1/files", headers=headers, data={"purpose": "batch"},
                                  files={"file": ("a.jsonl", lines.encode())})
    batch = (await team.client.post("/v1/batches", headers=headers, json={
        "input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "24h"})).json()
    async with asyncio.timeout(60):
        while batch["status"] != "completed":
            await asyncio.sleep(0.01)
            batch = (await team.client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
            if batch["request_counts"]["completed"] == 2:
                team.at = 1200.0
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


def test_what_a_tenant_may_store(library: Library) -> None:
    def stored(name: str, value: float = 1.0) -> None:
        store(library, name, value)

    stored("team/a")
    library.policies.set("team", "", {"quota": {"library_names": 2}})
    stored("team/b")
    stored("team/b", 2.0)
    with pytest.raises(LibraryFull, match="tenant team holds 2 names"):
        stored("team/c")
    with pytest.raises(LibraryFull, match="tenant team holds 2 names"):
        library.presets.create("team/p", Spec(interventions=[]))
    stored("teams/c")
    stored("c")
    library.policies.set("team", "", {"quota": {"library_bytes": 1}})
    with pytest.raises(LibraryFull, match="over its quota of 1"):
        stored("team/a", 3.0)
    # The same again is there already, and what shrinks is let through.
    stored("team/a")
    library.delete("team/b")
    library.policies.set("default", "", {"quota": {"library_names": 1}})
    with pytest.raises(LibraryFull, match="tenant default holds 1 names"):
        stored("shared/d")
    library.policies.delete("team", "")
    stored("team/c")


async def test_quotas_that_cannot_be(team: Team) -> None:
    for wrong in ({"requests_per_minute": 0}, {"weight": 0}, {"tokens": 1}, {"period": "year"}):
        answer = await team.client.put("/v1/admin/policies/team", headers=OWNER, json={"quota": wrong})
        assert code(answer) == (400, "invalid_request"), wrong
    answer = await team.client.put("/v1/admin/policies/team", headers=OWNER, json={"quota": {"library_names": 1}},
                                   params={"key_id": team.key["id"]})
    assert code(answer) == (400, "invalid_request")


@pytest.mark.parametrize(("weights", "shares"), [({}, (1, 1)), ({("b", ""): 3.0}, (1, 3)), ({("a", ""): 0.5}, (1, 2))])
def test_tenants_are_given_tokens_by_their_weights(weights: dict[tuple[str, str], float], shares: tuple[int, int]
                                                   ) -> None:
    """However many keys a tenant has, and however many of its requests wait."""
    queue: FairQueue[str] = FairQueue(1, lambda client: _weight_of(lambda *of: weights.get(of, 1.0), client))
    for n in range(400):
        queue.push(("a", f"key {n % 50}", "host", "1"), f"a{n}", 10)
        queue.push(("b", "key", "host", "1"), f"b{n}", 10)
    given: Counter[str] = Counter()
    for _ in range(120):
        found = queue.pop()
        assert found is not None
        given[found[0][0]] += 1
        queue.done(found[0], 10, 10)
    assert given["b"] / given["a"] == pytest.approx(shares[1] / shares[0], rel=0.05)


def test_keys_have_weights_within_their_tenant_and_batches_those_of_theirs() -> None:
    weights = {("a", ""): 2.0, ("a", "k"): 4.0}

    def weight(*client: str) -> float:
        return _weight_of(lambda *of: weights.get(of, 1.0), client)

    assert weight("a") == 2 and weight("a", "k") == 4 and weight("a", "k", "host") == 1
    assert weight("a", "") == 1 and weight("b") == 1
    assert weight(LAST) == 1 and weight(LAST, "a") == 2 and weight(LAST, "a", "k") == 1


async def test_weights_are_those_of_the_policies(team: Team, app: FastAPI) -> None:
    await team.quota(weight=5.0)
    assert app.state.server.keys.weight("team") == 5 and app.state.server.keys.weight("other") == 1
    assert app.state.server.queue._fair._weight(("team",)) == 5


def test_times_of_the_clock() -> None:
    assert bounds("minute", 119.9) == (60, 120)
    assert bounds("day", 86400 * 3 + 5) == (86400 * 3, 86400 * 4)
    # February of 1972 had 29 days, and December ends with the year.
    assert bounds("month", 68_000_000) == (65_750_400, 68_256_000)
    assert bounds("month", 31_500_000) == (28_857_600, 31_536_000)
    assert [spelled(s) for s in (0.1204, 6, 60, 90.4, 7205)] == ["120ms", "6s", "1m0s", "1m30s", "2h0m5s"]
