"""What a sample of the answers of a roll-out's arms are, for its guard rails: graded behind the requests.

Answers are looked at one after the other, in a thread of low priority, from a queue that is bounded. One that finds no
room there, or that cannot be looked at, is counted and forgotten.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from server.effects.degeneration import repetition
from server.effects.outcomes import Ended, verdicts_on
from server.observability.instruments import Counter, Registry
from server.rollouts.arms import Arm
from server.rollouts.rollouts import Rollouts
from server.rollouts.terms import Rail
from vectors.evaluate.graders.named import grader_of

log = structlog.get_logger("trimtab.rollouts")
QUEUE_LENGTH = 256
# Rails that are about an answer which was given, known without looking at its text.
AT_ONCE = ("latency", "errors")
Values = dict[int, float]


@dataclass(frozen=True)
class Seen:
    """A finished answer. kl: nats a token against the untouched model; None where that was not measured."""

    ended: Ended
    token_ids: Sequence[int]
    kl: float | None


@dataclass(frozen=True)
class _Given:
    """An answer that somebody got, and the arms that it belongs to."""

    arms: tuple[Arm, ...]
    seen: Seen


@dataclass(frozen=True)
class _Pair:
    """What both versions made of one prompt."""

    rollout: str
    stable: Seen
    candidate: Seen


class Measuring:
    """`start` and `stop` belong to the server's life; everything belongs to the event loop."""

    def __init__(self, rollouts: Rollouts, apart: Callable[[Callable[[], list[Values]]], Awaitable[list[Values]]],
                 registry: Registry, seed: int | None = None) -> None:
        """apart: runs work in a thread that leaves the processor to requests."""
        self._rollouts, self._apart = rollouts, apart
        self._random = random.Random(seed)
        self._queue: asyncio.Queue[_Given | _Pair] = asyncio.Queue(QUEUE_LENGTH)
        self._task: asyncio.Task[None] | None = None
        self._dropped = Counter("trimtab_rollout_dropped", "Answers that were to be looked at for guard rails and were "
                                "not.", ["reason"], registry=registry)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def draws(self, arms: Sequence[Arm]) -> bool:
        """Whether an answer is one of the sample. Asked once for each, before it is written."""
        shares = [running.terms.sample for arm in arms if (running := self._rollouts.running(arm.rollout)) is not None
                  and any(rail.metric not in AT_ONCE for rail in running.terms.rails)]
        return self._random.random() < max(shares, default=0.0)

    def failed(self, arms: Sequence[Arm]) -> None:
        """A request of these arms ended with an error."""
        self._known(arms, {"errors": 1.0})

    def answered(self, arms: Sequence[Arm], seconds_a_token: float | None) -> None:
        self._known(arms, {"errors": 0.0} | ({} if seconds_a_token is None else {"latency": seconds_a_token}))

    def offer(self, arms: tuple[Arm, ...], seen: Seen) -> None:
        self._put(_Given(arms, seen))

    def offer_pair(self, rollout: str, stable: Seen, candidate: Seen) -> None:
        self._put(_Pair(rollout, stable, candidate))

    async def drained(self) -> None:
        """Return when nothing that was offered waits to be looked at."""
        await self._queue.join()

    def _known(self, arms: Sequence[Arm], values: dict[str, float]) -> None:
        for arm in arms:
            rails = self._rails(arm.rollout)
            self._rollouts.sample(arm.rollout, arm.arm, {n: values[rail.metric] for n, rail in enumerate(rails)
                                                         if rail.metric in values})

    def _put(self, one: _Given | _Pair) -> None:
        if self._queue.full():
            self._dropped.labels("queue").inc()
        else:
            self._queue.put_nowait(one)

    async def _work(self) -> None:
        while True:
            one = await self._queue.get()
            try:
                await self._look(one)
            except Exception as error:  # no fault of a grader may end the worker
                self._dropped.labels("failed").inc()
                log.warning("rollout_answer_not_graded", error=f"{type(error).__name__}: {error}"[:300])
            finally:
                self._queue.task_done()

    async def _look(self, one: _Given | _Pair) -> None:
        if isinstance(one, _Given):
            every = [self._rails(arm.rollout) for arm in one.arms]
            for arm, values in zip(one.arms, await self._apart(
                    lambda: [values_of(rails, one.seen) for rails in every]), strict=True):
                self._rollouts.sample(arm.rollout, arm.arm, values)
            return
        rails = self._rails(one.rollout)
        stable, candidate = await self._apart(lambda: [values_of(rails, one.stable), values_of(rails, one.candidate)])
        self._rollouts.pair(one.rollout, {n: (stable[n], candidate[n]) for n in stable.keys() & candidate.keys()})

    def _rails(self, rollout: str) -> Sequence[Rail]:
        running = self._rollouts.running(rollout)
        return () if running is None else running.terms.rails


def values_of(rails: Sequence[Rail], seen: Seen) -> Values:
    """By the number of the rail, those that this answer says something of. Blocks."""
    found: Values = {}
    outcomes: dict[str, str] = {}
    for n, rail in enumerate(rails):
        if rail.metric == "repetition":
            found[n] = repetition(seen.token_ids)
        elif rail.metric == "dose" and seen.kl is not None:
            found[n] = seen.kl
        elif rail.graded is not None:
            name, wanted = rail.graded
            if name not in outcomes:
                grader = grader_of(name)
                outcomes[name] = grader.told(verdicts_on(grader, [seen.ended])[0].outcome)
            found[n] = float(outcomes[name] == wanted)
    return found
