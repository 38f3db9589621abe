"""Counters of all replicas, in Redis.

Redis is a side channel. A request waits for it no longer than `timeout_s`; where it does not answer, each server counts
by itself for a while, and then asks again. So limits hold per server, and not together, while Redis is away.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import structlog
from limits.aio.storage import RedisStorage
from limits.errors import StorageError

from server.identity.counters import Amount, Booked, LocalCounters, Place
from server.observability.instruments import Counter, Gauge, Registry

log = structlog.get_logger("trimtab.quotas")
T = TypeVar("T")
# For how long Redis is not asked after it failed.
PAUSE_S = 5.0
# How long a connection is kept after another has taken its place. No request waits for Redis longer.
CLOSE_S = 10.0
# How long a place counts whose server says nothing any more, and how often one says that its places are taken still.
LEASE_S, RENEW_S = 30, 10.0
# KEYS: of the places, then of the counters. ARGV: how many places; the lease; holder and most of each place; amount,
# seconds and most (-1 for no limit) of each counter. Answers with the number of the first that is over (0 for none) and
# the totals. Places are taken by the clock of Redis, and lapse with their lease.
BOOK = """
local now, places, lease = tonumber(redis.call('TIME')[1]), tonumber(ARGV[1]), tonumber(ARGV[2])
local found = {0}
for i = 1, places do
    redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
    if redis.call('ZCARD', KEYS[i]) >= tonumber(ARGV[2 * i + 2]) then return {i} end
end
for i = places + 1, #KEYS do
    local at = 3 + 2 * places + 3 * (i - places - 1)
    local total, most = tonumber(redis.call('GET', KEYS[i]) or '0') + tonumber(ARGV[at]), tonumber(ARGV[at + 2])
    found[#found + 1] = total
    if most >= 0 and total > most and found[1] == 0 then found[1] = i end
end
if found[1] > 0 then return found end
for i = 1, places do
    redis.call('ZADD', KEYS[i], now + lease, ARGV[2 * i + 1])
    redis.call('EXPIRE', KEYS[i], lease)
end
for i = places + 1, #KEYS do
    local at = 3 + 2 * places + 3 * (i - places - 1)
    local is_new = redis.call('EXISTS', KEYS[i]) == 0
    redis.call('INCRBY', KEYS[i], ARGV[at])
    if is_new then redis.call('EXPIRE', KEYS[i], ARGV[at + 1]) end
end
return found
"""
# KEYS as above. ARGV: how many places; the holder of each place; the amount of each counter.
SETTLE = """
for i, key in ipairs(KEYS) do
    if i <= tonumber(ARGV[1]) then
        redis.call('ZREM', key, ARGV[i + 1])
    elseif redis.call('EXISTS', key) == 1 then
        redis.call('INCRBY', key, ARGV[i + 1])
    end
end
return 1
"""
RENEW = """
local now = tonumber(redis.call('TIME')[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""


class SharedCounters:
    """Of all servers that name the same Redis."""

    def __init__(self, url: str, registry: Registry, *, timeout_s: float, pause_s: float = PAUSE_S,
                 renew_s: float = RENEW_S, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: timeout_s: how long a request waits for Redis. clock: never goes back."""
        self._url, self._timeout_s, self._pause_s, self._clock = url, timeout_s, pause_s, clock
        self._renew_s = renew_s
        self._local = LocalCounters()
        self._errors: tuple[type[Exception], ...] = (StorageError,)
        self._redis: RedisStorage | None = None
        self._asked_from = float("-inf")
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        self._renewing: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._failures = Counter("trimtab_quota_store_failures", "Times that Redis did not count for a quota, so that "
                                 "this server counted by itself.", registry=registry)
        Gauge("trimtab_quotas_local", "1 while quotas are counted by this server alone, because Redis is away.",
              registry=registry).set_function(lambda: float(self._clock() < self._asked_from))

    async def start(self) -> None:
        # Not before a server asks for it, because the package takes a while to import.
        from redis.exceptions import RedisError

        self._errors = (StorageError, RedisError, OSError, TimeoutError)
        self._redis = self._opened()
        self._renewing = asyncio.create_task(self._renew())

    def _opened(self) -> RedisStorage:
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {
            "socket_timeout": self._timeout_s, "socket_connect_timeout": self._timeout_s,
            # Once, for a connection that Redis closed meanwhile.
            "retry": Retry(NoBackoff(), 1)}
        url = self._url if self._url.startswith("async+") else f"async+{self._url}"
        return RedisStorage(url, implementation="redispy", key_prefix="trimtab", wrap_exceptions=True, **options)

    def follow(self, url: str, timeout_s: float) -> None:
        """Places that are taken are renewed in the other Redis, and lapse in this one."""
        if (url, timeout_s) == (self._url, self._timeout_s):
            return
        before = self._client()
        self._url, self._timeout_s = url, timeout_s
        self._redis, self._asked_from = self._opened(), float("-inf")
        self._closing.add(task := asyncio.create_task(self._close(before)))
        task.add_done_callback(self._closing.discard)

    async def _close(self, client: Any) -> None:
        """Close a connection once those that still wait for it have been answered."""
        try:
            await asyncio.sleep(CLOSE_S)
        finally:
            await client.aclose()

    async def stop(self) -> None:
        if self._renewing is not None:
            for task in (self._renewing, *self._closing):
                task.cancel()
            await asyncio.gather(self._renewing, *self._closing, return_exceptions=True)
        if self._redis is not None:
            places = [Place(key, holder, 0) for key, holders in self._held.items() for holder in holders]
            await self.settle(places, (), shared=True)
            await self._ask(self._client().aclose)

    async def book(self, places: Sequence[Place], amounts: Sequence[Amount]) -> Booked:
        given: list[Any] = [len(places), LEASE_S]
        for place in places:
            given += (place.holder, place.most)
        for one in amounts:
            given += (one.amount, one.seconds, -1 if one.most is None else one.most)
        found = await self._run(BOOK, places, amounts, given)
        if found is None:
            return await self._local.book(places, amounts)
        over, *totals = found
        if not over:
            for place in places:
                self._held[place.key].add(place.holder)
        return Booked(totals, over - 1 if over else None, shared=True)

    async def settle(self, places: Sequence[Place], amounts: Sequence[Amount], *, shared: bool) -> None:
        there = [place for place in places if place.holder in self._held.get(place.key, ())]
        for place in there:
            self._held[place.key].discard(place.holder)
            if not self._held[place.key]:
                del self._held[place.key]
        here = [place for place in places if place not in there]
        await self._local.settle(here, () if shared else amounts, shared=False)
        given = amounts if shared else ()
        if there or given:
            # A place that is not given back lapses with its lease.
            await self._run(SETTLE, there, given, [len(there), *(place.holder for place in there),
                                                   *(one.amount for one in given)])

    async def _run(self, script: str, places: Sequence[Place], amounts: Sequence[Amount], given: Sequence[Any]) -> Any:
        keys = [*(_places(place.key) for place in places), *(f"trimtab/counts/{one.key}" for one in amounts)]
        return await self._ask(lambda: self._client().register_script(script)(keys, given))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            for key, places in list(self._held.items()):
                await self._ask(partial(self._client().eval, RENEW, 1, _places(key), LEASE_S, *places))

    def _client(self) -> Any:
        assert self._redis is not None
        bridge: Any = self._redis.bridge
        return bridge.get_connection()

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """What Redis says; None where it does not, or did not lately."""
        if self._clock() < self._asked_from:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work()
        except self._errors as error:
            self._asked_from = self._clock() + self._pause_s
            self._failures.inc()
            log.warning("quota_store_away", error=f"{type(error).__name__}: {error}"[:200])
            return None


def _places(key: str) -> str:
    return f"trimtab/places/{key}"
