"""Shadow arms: a candidate that nobody is answered by is run on prompts of the stable version, behind the requests.

One prompt after the other is tried, and only while no request waits. What finds no room in the queue, or no quiet
moment in time, is counted and forgotten.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from server.errors import Overloaded, RequestTimeout, ShuttingDown
from server.observability.instruments import Counter, Registry
from server.rollouts.arms import Arm
from server.rollouts.measuring import Measuring, Seen
from server.rollouts.rollouts import Rollouts
from steering.language.errors import EngineUnavailable, SlotsExhausted, TrimtabError
from vectors.storage_errors import LibraryUnavailable

log = structlog.get_logger("trimtab.rollouts")
QUEUE_LENGTH = 64
LONGEST_S = 300.0
BUSY_WAIT_S, MOST_BUSY_WAITS = 0.05, 100
# What says nothing of the candidate, because it happens to every request at such a time.
NOT_ITS_FAULT = (Overloaded, RequestTimeout, ShuttingDown, SlotsExhausted, EngineUnavailable, LibraryUnavailable)


@dataclass(frozen=True)
class Trial:
    """run: what the candidate makes of the same prompt; None where that cannot be told."""

    rollout: str
    stable: Seen
    run: Callable[[], Awaitable[Seen | None]]


class ShadowArms:
    """`start` and `stop` belong to the server's life; everything belongs to the event loop."""

    def __init__(self, rollouts: Rollouts, measuring: Measuring, busy: Callable[[], bool], registry: Registry,
                 seed: int | None = None) -> None:
        """busy: whether a request waits."""
        self._rollouts, self._measuring, self._busy = rollouts, measuring, busy
        self._random = random.Random(seed)
        self._queue: asyncio.Queue[Trial] = asyncio.Queue(QUEUE_LENGTH)
        self._task: asyncio.Task[None] | None = None
        self._tried = Counter("trimtab_rollout_shadowed", "Prompts that a candidate was run on without being answered, "
                              "or was not.", ["rollout", "result"], registry=registry)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def draws(self, arms: Sequence[Arm]) -> str | None:
        """The roll-out whose candidate an answer's prompt is tried on too. Asked once for each, before it is written.
        """
        for arm in arms:
            running = self._rollouts.running(arm.rollout)
            if arm.arm == "stable" and running is not None and self._random.random() < running.step.shadow:
                return arm.rollout
        return None

    def offer(self, trial: Trial) -> None:
        if self._queue.full():
            self._count(trial, "queue")
        else:
            self._queue.put_nowait(trial)

    async def drained(self) -> None:
        """Return when nothing that was offered waits to be tried."""
        await self._queue.join()

    async def _work(self) -> None:
        while True:
            trial = await self._queue.get()
            try:
                if self._rollouts.running(trial.rollout) is None:
                    continue
                if await self._quiet():
                    await self._try(trial)
                else:
                    self._count(trial, "busy")
            finally:
                self._queue.task_done()

    async def _quiet(self) -> bool:
        for _ in range(MOST_BUSY_WAITS):
            if not self._busy():
                return True
            await asyncio.sleep(BUSY_WAIT_S)
        return False

    async def _try(self, trial: Trial) -> None:
        failed = 1.0
        try:
            async with asyncio.timeout(LONGEST_S):
                candidate = await trial.run()
            if candidate is None:
                self._count(trial, "untold")
                return
            self._measuring.offer_pair(trial.rollout, trial.stable, candidate)
            failed = 0.0
        except (*NOT_ITS_FAULT, TimeoutError) as error:
            self._count(trial, "busy")
            log.info("rollout_not_shadowed", rollout=trial.rollout, error=str(error)[:300])
            return
        except TrimtabError as error:
            log.info("rollout_candidate_failed", rollout=trial.rollout, code=error.code, error=str(error)[:300])
        except Exception as error:  # no fault of a trial may end the worker, and it is the candidate's
            log.warning("rollout_candidate_failed", rollout=trial.rollout,
                        error=f"{type(error).__name__}: {error}"[:300])
        self._count(trial, "failed" if failed else "run")
        running = self._rollouts.running(trial.rollout)
        if running is not None:
            self._rollouts.pair(trial.rollout, {n: (0.0, failed) for n, rail in enumerate(running.terms.rails)
                                                if rail.metric == "errors"})

    def _count(self, trial: Trial, result: str) -> None:
        # A roll-out that has ended gets no name in the metrics again.
        if self._rollouts.running(trial.rollout) is not None:
            self._tried.labels(trial.rollout, result).inc()
