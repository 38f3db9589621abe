"""The running record: reads the metrics every few seconds, tells who follows, and writes a minute at its end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

import structlog

from server.engines.base import Engine
from server.errors import Overloaded
from server.history.interval import Interval
from server.history.reading import Reading, between, read
from server.history.store import HOUR_S, MINUTE_S, HistoryStore
from server.observability.instruments import Counter
from server.observability.metrics import Metrics
from server.threads import in_thread

log = structlog.get_logger("trimtab.history")
SAMPLE_S = 5.0
MOST_FOLLOWERS = 64
STOP_S = 5.0
# How often who follows looks whether the server goes away.
CHECK_S = 0.5


class History:
    """`start` and `stop` belong to the server's life. Used on the event loop only."""

    def __init__(self, engine: Engine, metrics: Metrics, store: HistoryStore | None,
                 now: Callable[[], float] = time.time) -> None:
        """store: None keeps nothing beyond the minute that runs."""
        self._engine, self._metrics, self._store, self._now = engine, metrics, store, now
        self._lost = Counter("trimtab_history_minutes_lost", "Minutes that could not be stored.",
                             registry=metrics.registry)
        self._before: Reading = {}
        self._minute = self._start_of(now())
        self._running = Interval()
        self._last = self._since_last = Interval()
        self._sampled = asyncio.Event()
        self._followers = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._before = read(self._metrics.registry)
        self._sample()
        self._last, self._since_last = self._since_last, Interval()
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._sample()
        await self._write(self._minute, self._running)

    async def rows(self, since: int, until: int) -> list[tuple[int, Interval]]:
        """Start and interval of what was counted in [since, until), up to now. Raises HistoryUnavailable."""
        self._sample()
        stored = [] if self._store is None else await in_thread(self._store.read, since, until)
        running = [(self._minute, Interval.of([self._running]))] if since <= self._minute < until else []
        return [*stored, *running]

    async def follow(self, ends: Callable[[], bool]) -> AsyncGenerator[Interval, None]:
        """What was counted between two samples, as they are taken: the last one at once, then each that comes.

        Args:
            ends: whether the server goes away, which ends it.

        Raises:
            Overloaded: too many follow already.
        """
        if self._followers >= MOST_FOLLOWERS:
            raise Overloaded(f"{MOST_FOLLOWERS} streams of counts are open", fix="Close some of them.",
                             retry_after_s=SAMPLE_S)
        self._followers += 1
        try:
            yield self._last
            while not ends():
                sampled = self._sampled
                try:
                    await asyncio.wait_for(sampled.wait(), CHECK_S)
                except TimeoutError:
                    continue
                yield self._last
        finally:
            self._followers -= 1

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            try:
                self._sample()
            except Exception as error:  # what cannot be read now is read the next time
                log.warning("history_not_sampled", error=f"{type(error).__name__}: {error}"[:300])
                continue
            self._last, self._since_last = self._since_last, Interval()
            self._sampled.set()
            self._sampled = asyncio.Event()
            minute, running = self._minute, self._running
            if self._start_of(self._now()) > minute:
                self._minute, self._running = self._start_of(self._now()), Interval()
                await self._write(minute, running)

    def _sample(self) -> None:
        """Add what was counted since the last look to the minute that runs and to what is told next."""
        condition = self._engine.condition()
        levels = {**self._engine.stats(), "ready": float(condition.ready), "live": float(condition.live)}
        self._metrics.refresh(self._engine)
        after = read(self._metrics.registry)
        found = between(self._before, after, levels)
        self._before = after
        self._running.add(found)
        self._since_last.add(found)

    async def _write(self, minute: int, interval: Interval) -> None:
        if self._store is None:
            return
        try:
            await in_thread(self._store.write, minute, interval)
            if minute % HOUR_S == 0:
                await in_thread(self._store.tidy, int(self._now()))
        except Exception as error:  # a database may be locked, full or gone, and then only a minute is lost
            self._lost.inc()
            log.warning("history_not_stored", minute=minute, error=f"{type(error).__name__}: {error}"[:300])

    @staticmethod
    def _start_of(now: float) -> int:
        return int(now) - int(now) % MINUTE_S
