"""Where quotas are counted: in this process, or in a Redis that the replicas share.

Redis is a side channel. A request waits for it no longer than `timeout_s`; where it does not answer, each server counts
by itself for a while, and then asks again. So limits hold per server, and not together, while Redis is away.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.errors import StorageError

from server.observability.instruments import Counter, Gauge, Registry

log = structlog.get_logger("trimtab.quotas")
T = TypeVar("T")
# For how long Redis is not asked after it failed.
PAUSE_S = 5.0
# How long a connection is kept after another has taken its place. No request waits for Redis longer.
CLOSE_S = 10.0
# How long a place counts whose server says nothing any more, and how often one says that its places are taken still.
LEASE_S, RENEW_S = 30, 10.0
# A place is taken where fewer than ARGV[2] are, by the clock of Redis, and lapses with its lease.
TAKE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
RENEW = """
local now = tonumber(redis.call('TIME')[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""


@dataclass(frozen=True)
class Counted:
    """total: with what was added. shared: whether all replicas have counted it."""

    total: int
    shared: bool


class Counters(Protocol):
    async def add(self, key: str, amount: int, seconds: int) -> Counted:
        """Add to a counter that is forgotten so many seconds after its first use."""

    async def give(self, key: str, amount: int, seconds: int, counted: Counted) -> None:
        """Add more, or less than nothing, to what was counted before, where it was counted."""

    async def take(self, key: str, place: str, most: int) -> bool:
        """Take a place where fewer than `most` are taken."""

    async def leave(self, key: str, place: str) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def follow(self, url: str, timeout_s: float) -> None:
        """Count in this Redis from now on, where any is asked."""


class LocalCounters:
    """Of one server. They begin anew with it."""

    def __init__(self) -> None:
        self._memory: MemoryStorage | None = None
        self._places: defaultdict[str, set[str]] = defaultdict(set)

    async def start(self) -> None:
        # It belongs to the event loop that runs now.
        self._memory = MemoryStorage()

    async def stop(self) -> None:
        self._memory = None

    def follow(self, url: str, timeout_s: float) -> None:
        return

    async def add(self, key: str, amount: int, seconds: int) -> Counted:
        assert self._memory is not None
        return Counted(await self._memory.incr(key, seconds, amount), shared=False)

    async def give(self, key: str, amount: int, seconds: int, counted: Counted) -> None:
        if amount:
            await self.add(key, amount, seconds)

    async def take(self, key: str, place: str, most: int) -> bool:
        if len(self._places[key]) >= most:
            return False
        self._places[key].add(place)
        return True

    async def leave(self, key: str, place: str) -> None:
        self._places[key].discard(place)
        if not self._places[key]:
            del self._places[key]


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
        await self._local.start()
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
            for key, places in list(self._held.items()):
                for place in list(places):
                    await self.leave(key, place)
            await self._ask(self._client().aclose)
        await self._local.stop()

    async def add(self, key: str, amount: int, seconds: int) -> Counted:
        redis = self._redis
        assert redis is not None
        total = await self._ask(lambda: redis.incr(key, seconds, amount))
        return await self._local.add(key, amount, seconds) if total is None else Counted(int(total), shared=True)

    async def give(self, key: str, amount: int, seconds: int, counted: Counted) -> None:
        redis = self._redis
        assert redis is not None
        if not counted.shared:
            await self._local.give(key, amount, seconds, counted)
        elif amount:
            await self._ask(lambda: redis.incr(key, seconds, amount))

    async def take(self, key: str, place: str, most: int) -> bool:
        taken = await self._ask(lambda: self._client().eval(TAKE, 1, _places(key), place, most, LEASE_S))
        if taken is None:
            return await self._local.take(key, place, most)
        if taken:
            self._held[key].add(place)
        return bool(taken)

    async def leave(self, key: str, place: str) -> None:
        if place not in self._held[key]:
            await self._local.leave(key, place)
        else:
            self._held[key].discard(place)
            # One that is not given back lapses with its lease.
            await self._ask(lambda: self._client().zrem(_places(key), place))
        if not self._held[key]:
            del self._held[key]

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
