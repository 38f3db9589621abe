"""Shadow runs: the same tokens again, untouched and with all but one of the interventions, in spare capacity.

Completions that asked for a report are measured before they are answered. Of the others a sample is measured
afterwards, within a budget, and only while no request waits. Whatever goes wrong here is counted and logged; it never
reaches the request.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import structlog

from server.effects.budget import Budget
from server.effects.by_part import compare_parts
from server.effects.degeneration import degeneration
from server.effects.metrics import EffectMetrics
from server.effects.report import EVERY, ChoiceEffect, Effects, InArm, choice_effect
from server.effects.store import MINUTE_S, EffectStore, Sample
from server.engines.base import Engine
from server.engines.data import CompareRequest, Kept
from server.engines.parts import Part
from server.observability.tracing import Event, evaluation, record
from server.threads import in_thread
from steering.language.errors import path_text
from steering.language.finite import not_finite
from steering.programs.program import Program
from vectors.library.audit.notes import maker

log = structlog.get_logger("trimtab.effects")
QUEUE_LENGTH = 256
# How many tokens the completions that wait to be measured may have together, because they are held in memory.
QUEUE_TOKENS = 2**20
FLUSH_S = 5.0
BUSY_WAIT_S = 0.05
MOST_BUSY_WAITS = 100
MOST_UNWRITTEN = 10_000


@dataclass(frozen=True)
class Finished:
    """One steered completion that has been generated. `preset` names it in metrics, "" for none. `parts`: of a guarded
    one, the programs it was made under. kept: by the engine, of its own passes. drawn: whether it was drawn to be
    measured before it ran; None where that is still to be done. then: is told the effect of one that nobody waits for,
    once, or that there is none. engine: with the adapter that was on the model; None for that of the measurements.
    arms: of roll-outs, that it belongs to."""

    index: int
    program: Program
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    roles: Sequence[str] | None
    ended: bool
    preset: str
    parts: Sequence[Part] = ()
    kept: Kept | None = None
    drawn: bool | None = None
    then: Callable[[ChoiceEffect | None], None] = lambda effect: None
    engine: Engine | None = None
    arms: Sequence[InArm] = ()
    # Of the request: what is logged, traced and stored of its measurement, which comes after it, belongs to it.
    context: Context = field(default_factory=copy_context, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def cost(self) -> int:
        """Tokens of all passes that measuring takes: untouched, one less each for stacks, and steered where nothing was
        kept."""
        count = len(self.program.compiled)
        steered = self.kept is None or self.kept.lost is not None
        return self.num_tokens * (1 + steered + (count if count > 1 else 0)) * max(len(self.parts), 1)


class Shadow:
    """`start` and `stop` belong to the server's life. `measure` is for requests that wait, `offer` for the rest."""

    def __init__(self, engine: Engine, metrics: EffectMetrics, store: EffectStore | None, *, sample: float,
                 budget: float, decode: Callable[[Sequence[int]], str], end_ids: tuple[int, ...] = (),
                 seed: int | None = None) -> None:
        """`store` None: nothing is kept but metrics. `sample`: share of steered completions, 0 to 1. `end_ids`: tokens
        that end a text."""
        self._engine = engine
        self._metrics = metrics
        self._store = store
        self._sample = sample
        self._budget = Budget(budget)
        self._decode = decode
        self._end_ids = end_ids
        self._random = random.Random(seed)
        self._queue: asyncio.Queue[Finished] = asyncio.Queue(QUEUE_LENGTH)
        self._queued_tokens = 0
        self._unwritten: list[Sample] = []
        self._left_out: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []

    def follow(self, sample: float, budget: float) -> None:
        """Measure another share from now on."""
        self._sample = sample
        self._budget.share = budget

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._flush_regularly())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.flush()

    def served(self, tokens: int) -> None:
        """Count the tokens of an answered request. They earn the budget."""
        self._budget.served(tokens)

    def draws(self) -> bool:
        """Whether a completion that nobody waits for is one of the sample. Asked once for each, before it runs, so that
        the engine can keep what measuring it needs."""
        return self._random.random() < self._sample

    async def measure(self, completions: Sequence[Finished], *, per_token: bool) -> Effects:
        """Effects of a request's completions, for its response."""
        if not completions:
            return Effects(status="unsteered", reason="nothing was applied")
        effects = []
        for finished in completions:
            if not finished.generated_ids:
                continue
            effect = await self._measured(finished, per_token)
            if isinstance(effect, str):
                return Effects(status="failed", reason=effect)
            effects.append(effect)
        return Effects(status="measured", choices=effects)

    async def looked_at(self, finished: Finished) -> ChoiceEffect | None:
        """The effect of a completion that nobody was answered with, which is counted nowhere; None where it could not
        be measured."""
        effect = await self._measured(finished, per_token=False, kept=False)
        return effect if isinstance(effect, ChoiceEffect) else None

    def offer(self, completions: Sequence[Finished]) -> None:
        """Completions that nobody waits for: a sample of them is measured later."""
        for finished in completions:
            if not finished.generated_ids or not (self.draws() if finished.drawn is None else finished.drawn):
                finished.then(None)
                continue
            if not self._budget.take(finished.cost):
                self._drop("budget")
                finished.then(None)
                continue
            if self._queue.full() or self._queued_tokens + finished.num_tokens > QUEUE_TOKENS:
                self._drop("queue")
                finished.then(None)
                continue
            self._queued_tokens += finished.num_tokens
            self._queue.put_nowait(finished)

    async def drained(self) -> None:
        """Return when nothing that was offered waits to be measured."""
        await self._queue.join()

    async def flush(self) -> None:
        """Write what was measured so far. What cannot be written is lost and counted."""
        samples, self._unwritten = self._unwritten, []
        if self._store is None or not samples:
            return
        try:
            refused = await in_thread(self._store.write, samples)
            if refused:
                self._lose(refused, ValueError("numbers that are not finite, or that the database refuses"))
        except Exception as error:  # a database may be locked, full or gone, and then only records are lost
            self._lose(len(samples), error)

    async def _work(self) -> None:
        while True:
            finished = await self._queue.get()
            self._queued_tokens -= finished.num_tokens
            effect = None
            try:
                if await self._idle():
                    effect = await asyncio.create_task(self._measured(finished, per_token=False),
                                                       context=finished.context)
                else:
                    self._drop("busy")
                finished.then(effect if isinstance(effect, ChoiceEffect) else None)
            finally:
                self._queue.task_done()

    async def _idle(self) -> bool:
        """Wait for a moment in which no request waits; give up after a few seconds."""
        for _ in range(MOST_BUSY_WAITS):
            if self._engine.stats().get("waiting", 0) == 0:
                return True
            await asyncio.sleep(BUSY_WAIT_S)
        return False

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
            if self._left_out:
                log.info("effects_not_measured", **self._left_out)
                self._left_out.clear()

    def _drop(self, reason: str) -> None:
        self._metrics.dropped(reason)
        self._left_out[reason] += 1

    def _lose(self, records: int, error: Exception) -> None:
        self._metrics.lost(records)
        log.warning("effects_not_stored", records=records, error=f"{type(error).__name__}: {error}"[:300])

    async def _measured(self, finished: Finished, per_token: bool, kept: bool = True) -> ChoiceEffect | str:
        """The effect, or why there is none. kept: whether it is to be counted and stored."""
        ids, began = [*finished.prompt_ids, *finished.generated_ids], time.time_ns()
        try:
            request = CompareRequest(ids, len(finished.prompt_ids), finished.program, finished.roles, self._end_ids,
                                     finished.kept)
            comparison = await compare_parts(finished.engine or self._engine, request, list(finished.parts))
            signs = degeneration(finished.generated_ids, self._decode(finished.generated_ids), finished.ended)
            effect = choice_effect(finished.index, comparison, finished.program, signs, per_token=per_token)
            self._metrics.ran(finished.cost)
            if comparison.rerun is not None:
                self._metrics.rerun(comparison.rerun)
            wrong = [path_text(path) for path in not_finite(effect.model_dump())]
            if wrong:
                self._drop("not_finite")
                log.warning("effect_not_finite", preset=finished.preset, fields=wrong[:10])
                return f"the measurement gave numbers that are not finite: {wrong[0]}"
            if not kept:
                return effect
            self._metrics.measured(finished.preset, effect, finished.arms)
        except Exception as error:  # no fault of a measurement may reach a request or end the worker
            self._drop("failed")
            log.warning("shadow_failed", error=f"{type(error).__name__}: {error}"[:300])
            return "the measurement failed; the server's log says why"
        self._keep(finished, effect)
        record("effect.measure", began, attributes={"trimtab.preset": finished.preset, "trimtab.tokens": len(ids)},
               events=_evaluations(effect))
        log.info("effect", preset=finished.preset, kl=round(effect.total.kl.mean, 4), tokens=effect.tokens,
                 top1_changed=round(effect.total.top1_changed, 3), repetition=round(effect.text.repetition, 3),
                 interventions=[[i.artifact, i.op, round(i.shift.kl.mean, 4)] for i in effect.interventions])
        return effect

    def _keep(self, finished: Finished, effect: ChoiceEffect) -> None:
        minute, tenant = int(time.time()) // MINUTE_S, maker()
        samples = [
            Sample(minute, share.artifact, share.op, finished.preset, effect.tokens, share.kl, share.entropy_change,
                   share.top1_changed, effect.text.repetition, effect.text.length, effect.text.base_ended, tenant,
                   rollout, arm)
            for share in effect.shares() for rollout, arm in (EVERY, *finished.arms)]
        if len(self._unwritten) >= MOST_UNWRITTEN:
            self._lose(len(samples), RuntimeError("the database does not keep up"))
        else:
            self._unwritten += samples


def _evaluations(effect: ChoiceEffect) -> list[Event]:
    """The effect as a trace tells it: of the whole spec, and of each intervention beside the others."""
    return [evaluation("trimtab.kl", value=effect.total.kl.mean),
            evaluation("trimtab.top1_changed", value=effect.total.top1_changed),
            evaluation("trimtab.repetition", value=effect.text.repetition),
            *(evaluation("trimtab.kl", value=one.shift.kl.mean, artifact=str(one.artifact or "inline"), op=str(one.op))
              for one in effect.interventions)]
