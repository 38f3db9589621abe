"""Counting in Redis: together with other servers, and by oneself while it is away. A real redis-server runs."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.app import create_app
from server.errors import RateLimited
from server.identity.counters import Amount, LocalCounters, Place
from server.identity.policy import Held, Policy
from server.identity.principal import Principal
from server.identity.quotas import Quotas
from server.identity.shared_counters import PAUSE_S, SharedCounters
from server.observability.instruments import Registry
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.redis_server import Redis, needs_redis
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, code, make
from vectors.library import Library

pytestmark = needs_redis
# Long, so that a busy machine is not taken for a Redis that is away.
TIMEOUT_S = 20.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    found = Redis(tmp_path)
    found.start()
    yield found
    found.stop()


def redis_client(redis: Redis) -> Any:
    from redis import Redis as Client

    return Client.from_url(redis.url)


class Server:
    """The quotas of one of several servers. clock: of the pause after a failure."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, renew_s: float = 10.0) -> None:
        self.registry, self.clock = Registry(), 0.0
        self.counters = SharedCounters(url, self.registry, timeout_s=timeout_s, renew_s=renew_s,
                                       clock=lambda: self.clock)
        self.quotas = Quotas(self.counters, self.registry, now=lambda: 600.0)
        self._n = 0

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(name)

    @asynccontextmanager
    async def request(self, tokens: int = 0, **quota: int) -> AsyncIterator[None]:
        self._n += 1
        held = Held("tenant team", Policy.model_validate({"quota": quota}), "team/")
        who = Principal("k", "team", frozenset({"infer"}), "k", (held,))
        async with self.quotas.holding(who, f"req-{id(self)}-{self._n}") as asked:
            assert asked is not None
            await asked.enter()
            if tokens:
                await asked.tokens(tokens)
                asked.used = SimpleNamespace(prompt_tokens=tokens // 2, completion_tokens=tokens // 2)
            yield

    async def passes(self, tokens: int = 0, **quota: int) -> bool:
        try:
            async with self.request(tokens, **quota):
                return True
        except RateLimited:
            return False


@asynccontextmanager
async def two(url: str, renew_s: float = 10.0) -> AsyncIterator[tuple[Server, Server]]:
    first, second = Server(url, renew_s=renew_s), Server(url, renew_s=renew_s)
    for one in (first, second):
        await one.quotas.start()
    try:
        yield first, second
    finally:
        for one in (first, second):
            await one.quotas.stop()


async def test_another_redis_can_take_its_place(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Redis(tmp_path / "other")
    other.start()
    try:
        async with two(redis.url, renew_s=0.05) as (first, second):
            assert [await one.passes(requests_per_minute=1) for one in (first, second)] == [True, False]
            async with first.request(parallel_requests=1):
                for one in (first, second):
                    one.counters.follow(other.url, TIMEOUT_S)
                # The place moves along with the server.
                async with asyncio.timeout(60):
                    while await second.passes(parallel_requests=1):
                        await asyncio.sleep(0.05)
            assert await second.passes(parallel_requests=1)
            assert [await one.passes(requests_per_minute=1) for one in (first, second)] == [True, False]
            assert second.metric("trimtab_quota_store_failures_total") == 0
    finally:
        other.stop()


async def test_servers_count_together(redis: Redis) -> None:
    async with two(redis.url) as (first, second):
        passed = [await one.passes(requests_per_minute=4) for one in (first, second) * 3]
        assert passed == [True] * 4 + [False] * 2
        # At once from both sides it is no more.
        found = await asyncio.gather(*(one.passes(requests_per_minute=20) for one in (first, second) * 20))
        assert sum(found) == 16
        async with first.request(parallel_requests=2), second.request(parallel_requests=2):
            assert not await first.passes(parallel_requests=2) and not await second.passes(parallel_requests=2)
        assert await second.passes(parallel_requests=2)
        assert first.metric("trimtab_quotas_local") == 0 == first.metric("trimtab_quota_store_failures_total")


async def test_all_limits_of_a_request_are_one_question_and_count_all_or_none(redis: Redis) -> None:
    client = redis_client(redis)

    def questions() -> int:
        told: Any = client.info("commandstats")
        return sum(told.get(name, {"calls": 0})["calls"] for name in ("cmdstat_eval", "cmdstat_evalsha"))

    async with two(redis.url) as (first, second):
        limits = {"requests_per_minute": 3, "parallel_requests": 2, "tokens_per_minute": 100, "tokens_per_period": 150}
        assert await first.passes(tokens=10, **limits)
        before = questions()
        assert await first.passes(tokens=10, **limits)
        assert questions() - before == 3
        # What is over for the period is not counted for the minute, nor is its place or its request kept.
        async with second.request(parallel_requests=1):
            assert not await first.passes(parallel_requests=1, requests_per_minute=3)
        counted = {key.decode().partition("/counts/")[2]: int(client.get(key)) for key in client.keys("*/counts/*")}
        assert counted.pop("team//requests/minute/600") == 2
        assert not await first.passes(tokens=135, **{**limits, "tokens_per_minute": 1000})
        assert {key: int(client.get(f"trimtab/counts/{key}")) for key in counted} == counted
        assert set(counted.values()) == {20}
        assert all(client.ttl(f"trimtab/counts/{key}") > 0 for key in counted)


async def test_what_is_given_back_to_a_counter_that_is_gone_makes_no_new_one(redis: Redis) -> None:
    client = redis_client(redis)
    async with two(redis.url) as (first, _):
        booked = await first.counters.book((), [Amount("a", 5, 60, 10)])
        assert (list(booked.totals), booked.over, booked.shared) == ([5], None, True)
        await first.counters.settle((), [Amount("a", -2, 60)], shared=True)
        assert client.get("trimtab/counts/a") == b"3"
        client.delete("trimtab/counts/a")
        await first.counters.settle((), [Amount("a", -2, 60)], shared=True)
        assert client.get("trimtab/counts/a") is None


async def test_counters_of_one_server_are_forgotten_after_their_time() -> None:
    at = 0.0
    counters = LocalCounters(clock=lambda: at)
    for n in range(1000):
        assert (await counters.book((), [Amount(str(n), 4, 60, 5)])).over is None
    assert (await counters.book((), [Amount("0", 4, 60, 5)])).over == 0
    at = 60.5
    assert list((await counters.book((), [Amount("0", 4, 60, 5)])).totals) == [4]
    assert len(counters._totals) == 1


async def test_a_place_and_a_count_are_taken_together() -> None:
    counters = LocalCounters()
    place = Place("team", "a", 1)
    assert (await counters.book([place], [Amount("n", 1, 60, 0)])).over == 1
    assert (await counters.book([place], [Amount("n", 1, 60, 1)])).over is None
    assert (await counters.book([Place("team", "b", 1)], [Amount("n", 1, 60, 5)])).over == 0
    await counters.settle([place], (), shared=False)
    assert (await counters.book([Place("team", "b", 1)], [Amount("n", 1, 60, 2)])).totals == [2]


async def test_a_request_is_answered_while_redis_is_away(redis: Redis) -> None:
    """Each server then counts by itself, and together again when Redis is back."""
    async with two(redis.url) as (first, second):
        assert await first.passes(requests_per_minute=2) and await second.passes(requests_per_minute=2)
        held = first.request(parallel_requests=1)
        await held.__aenter__()
        redis.stop()
        for one in (first, second):
            assert [await one.passes(requests_per_minute=2) for _ in range(3)] == [True, True, False]
            assert one.metric("trimtab_quotas_local") == 1 == one.metric("trimtab_quota_store_failures_total")
        # It is not asked again for every request, and a place that was taken there is given up without it.
        await held.__aexit__(None, None, None)
        assert await first.passes(parallel_requests=1)
        assert first.metric("trimtab_quota_store_failures_total") == 1
        first.clock += PAUSE_S
        assert not await first.passes(requests_per_minute=2)
        assert first.metric("trimtab_quota_store_failures_total") == 2
        redis.start()
        for one in (first, second):
            one.clock += 2 * PAUSE_S
        passed = [await one.passes(requests_per_minute=2) for one in (first, second, first)]
        assert passed == [True, True, False] and first.metric("trimtab_quotas_local") == 0


async def test_no_request_waits_for_one_that_hangs() -> None:
    """What takes connections and says nothing, as behind a broken network."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        server = Server(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", timeout_s=0.05)
        await server.quotas.start()
        async with asyncio.timeout(60):
            assert [await server.passes(requests_per_minute=2, parallel_requests=5) for _ in range(3)] == [
                True, True, False]
        # One wait, and then none for a while.
        assert server.metric("trimtab_quota_store_failures_total") == 1
        async with asyncio.timeout(60):
            await server.quotas.stop()


async def test_places_of_a_server_that_died_lapse_and_those_of_one_that_lives_do_not(
        redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.identity.shared_counters.LEASE_S", 2)
    dead, alive = Server(redis.url, renew_s=1000), Server(redis.url, renew_s=0.2)
    await dead.quotas.start()
    await alive.quotas.start()
    async with alive.request(parallel_requests=2):
        held = dead.request(parallel_requests=2)
        await held.__aenter__()
        assert not await alive.passes(parallel_requests=2)
        async with asyncio.timeout(60):
            # Its own place is renewed all the while, so one becomes free and not two.
            while not await alive.passes(parallel_requests=2):
                await asyncio.sleep(0.1)
        async with alive.request(parallel_requests=2):
            assert not await alive.passes(parallel_requests=2)
        await held.__aexit__(None, None, None)
    await dead.quotas.stop()
    await alive.quotas.stop()


async def test_two_servers_hold_one_limit(redis: Redis, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """The setting, the routes and the header."""
    url = f"sqlite:///{tmp_path / 'library.db'}"
    clients, key = [], None
    async with asyncio.timeout(120), _opened(redis, tmp_path, url, vocabulary, "a") as first, _opened(
            redis, tmp_path, url, vocabulary, "b") as second:
        clients = [first, second]
        key = await make(first, "infer", tenant="team")
        await first.put("/v1/admin/policies/team", headers=OWNER, json={"quota": {"requests_per_minute": 1000}})
        while (await second.get("/v1/key", headers=bearer(key))).json().get("limits", []) == []:
            await asyncio.sleep(0.05)
        remaining = []
        for one in clients * 2:
            answer = await one.post("/v1/chat/completions", headers=bearer(key), json=chat())
            assert answer.status_code == 200
            remaining.append(int(answer.headers["x-ratelimit-remaining-requests"]))
        # A minute may end in between.
        assert len(set(remaining)) >= 2 and remaining[:2] in ([999, 998], [999, 999])
        await first.put("/v1/admin/policies/team", headers=OWNER, json={"quota": {"requests_per_minute": 1}})
        answers = [await first.post("/v1/chat/completions", headers=bearer(key), json=chat()) for _ in range(3)]
        assert (429, "rate_limit_exceeded") in [code(one) for one in answers if one.status_code != 200]


@asynccontextmanager
async def _opened(redis: Redis, folder: Path, url: str, vocabulary: Vocabulary, name: str
                  ) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(served_model_name=MODEL, data_dir=folder / name, api_key=SecretStr("owner-s-key"),
                        quota_store_url=SecretStr(redis.url), quota_store_timeout_s=10)
    app = create_app(settings, ScriptedEngine(vocabulary), Library.open(url, str(folder / "blobs")), vocabulary)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://localhost",
            timeout=60) as client:
        yield client
