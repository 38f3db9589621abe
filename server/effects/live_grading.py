"""Grading of a sample of the answers in production.

Answers are graded in a thread of low priority, one after the other, from a queue that is bounded. One that finds no
room there, or whose grading fails, is counted and forgotten; no request waits for any of this.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import product
from typing import Any

import structlog

from server.effects.metrics import OutcomeMetrics
from server.effects.outcome_store import OutcomeCount, OutcomeTotal, totals, write
from server.effects.outcomes import Ended, verdicts_on
from server.effects.report import ALL, EVERY, UNTOUCHED
from server.effects.store import MINUTE_S, EffectStore
from server.observability.tracing import evaluation, record
from server.threads import in_thread
from vectors.evaluate.graders.contract import Grader, Verdict
from vectors.evaluate.graders.named import name_of
from vectors.library.audit.notes import maker

log = structlog.get_logger("trimtab.outcomes")
QUEUE_LENGTH = 256
FLUSH_S = 5.0
MOST_UNWRITTEN = 10_000
Found = list[tuple[Grader, Verdict]]


class LiveGrading:
    """Grades a sample of the answers that are served. `start` and `stop` belong to the server's life."""

    def __init__(self, metrics: OutcomeMetrics, store: EffectStore | None, graders: Sequence[Grader],
                 apart: Callable[[Callable[[], Found]], Awaitable[Found]], *, sample: float, measured: float,
                 seed: int | None = None) -> None:
        """apart: runs work in a thread that leaves the processor to requests. sample: share of answers that are graded.
        measured: share of steered ones whose effect is measured; these are graded first, because they are graded
        better."""
        self._metrics, self._store, self._graders, self._apart = metrics, store, graders, apart
        self.follow(sample, measured)
        self._random = random.Random(seed)
        self._queue: asyncio.Queue[Ended] = asyncio.Queue(QUEUE_LENGTH)
        self._unwritten: Counter[tuple[int, str, str, str, str, str, str, str]] = Counter()
        self._tasks: list[asyncio.Task[None]] = []

    def follow(self, sample: float, measured: float) -> None:
        """Grade another share from now on."""
        self._sample, self._measured = sample if self._graders else 0.0, measured

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._flush_regularly())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.flush()

    def draws(self, *, steered: bool, measured: bool) -> bool:
        """Whether an answer is one of the sample. Asked once for each, before it is written.

        Of steered ones those that are measured come first, so that the whole share is `sample` either way.
        """
        share = self._sample
        if steered:
            if measured:
                share = min(self._sample / self._measured, 1.0) if self._measured else 1.0
            else:
                share = max(self._sample - self._measured, 0.0) / (1 - self._measured) if self._measured < 1 else 0.0
        return self._random.random() < share

    def offer(self, ended: Ended) -> None:
        if self._queue.full():
            self._metrics.dropped("queue")
            return
        self._queue.put_nowait(ended)

    async def drained(self) -> None:
        """Return when nothing that was offered waits to be graded."""
        await self._queue.join()

    async def flush(self) -> None:
        """Write what was counted so far. What cannot be written is lost and counted."""
        counted, self._unwritten = self._unwritten, Counter()
        if self._store is None or not counted:
            return
        rows = [OutcomeCount(*key, answers) for key, answers in counted.items()]
        try:
            await in_thread(write, self._store, rows)
        except Exception as error:  # a database may be locked, full or gone, and then only counts are lost
            self._metrics.lost(sum(counted.values()))
            log.warning("outcomes_not_stored", answers=sum(counted.values()),
                        error=f"{type(error).__name__}: {error}"[:300])

    async def totals(self, **asked: Any) -> list[OutcomeTotal]:
        """What graded answers were, as `outcome_store.totals` tells it, the last ones included.

        Raises:
            EffectsUnavailable.
        """
        await self.flush()
        return [] if self._store is None else await in_thread(lambda: totals(self._store, **asked))  # type: ignore[arg-type]

    async def _work(self) -> None:
        while True:
            ended = await self._queue.get()
            try:
                await asyncio.create_task(self._graded(ended), context=ended.context)
            finally:
                self._queue.task_done()

    async def _graded(self, ended: Ended) -> None:
        try:
            await self._grade(ended)
        except Exception as error:  # no fault of a grader may end the worker
            self._metrics.dropped("failed")
            log.warning("live_grading_failed", error=f"{type(error).__name__}: {error}"[:300])

    async def _grade(self, ended: Ended) -> None:
        began = time.time_ns()
        found = await self._apart(lambda: [(grader, verdicts_on(grader, [ended])[0]) for grader in self._graders])
        record("outcome.grade", began, attributes={"trimtab.preset": ended.preset}, events=[
            evaluation(name_of(grader), label=grader.told(verdict.outcome)) for grader, verdict in found])
        minute, tenant = int(time.time()) // MINUTE_S, maker()
        names = (ALL, *dict.fromkeys(ended.artifacts)) if ended.artifacts else (UNTOUCHED,)
        for grader, verdict in found:
            outcome = grader.told(verdict.outcome)
            self._metrics.graded(ended.preset, names, name_of(grader), outcome, ended.arms,
                                 measured=ended.excess is not None)
            for name, (rollout, arm) in product(names, (EVERY, *ended.arms)):
                key = minute, name, ended.preset, name_of(grader), outcome, tenant, rollout, arm
                if key not in self._unwritten and len(self._unwritten) >= MOST_UNWRITTEN:
                    self._metrics.lost(1)
                    continue
                self._unwritten[key] += 1

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
