"""Guards: limits on what steering may do to a completion, held while it is generated.

A guarded completion is generated in parts of `every` tokens. After each part the effect of its tokens is measured
(`Engine.compare`); over a limit the intervention with the largest share is weakened or stopped, and the completion goes
on from its tokens under the program that is left, **as if that program had acted from the start**: what a stopped
intervention left in the cache of earlier tokens is gone as well, so that it cannot go on acting through it. Tokens that
were delivered stay. Scopes, seeds and penalties count on, so a guard that finds nothing changes nothing.

Unlike a shadow run a guard is a promise: it has no budget and is never dropped. What cannot be measured is taken for a
breach of everything, and all interventions stop.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

from server.engines.base import Completion, Engine
from server.engines.data import CaptureRequest, CompareRequest, Comparison, Generation, Token, Touched
from server.engines.parts import Part
from server.engines.touching import count_touched
from server.observability.instruments import Counter, Registry
from server.requests.monitor import Limit
from steering.language.errors import TrimtabError
from steering.language.guard import Guard
from steering.language.vocabulary import Site
from steering.programs.program import Program

log = structlog.get_logger("trimtab.guard")
MAX_LOWERINGS = 3
NGRAM = 3

Reason = Literal["kl", "repetition", "monitor", "unmeasured"]
Weaken = Callable[[Sequence[float]], Awaitable[Program]]
"""The program with each intervention at a factor of its strength; 0 stops it."""


@dataclass(frozen=True)
class HeldGuard:
    """A guard, and what it reads besides."""

    guard: Guard
    limits: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Event:
    """An intervention was weakened. token: from which generated token on. factor: what is left of its strength."""

    token: int
    intervention: int
    factor: float
    reason: Reason
    kl: float | None
    repetition: float


class GuardMetrics:
    def __init__(self, registry: Registry) -> None:
        self._checks = Counter("trimtab_guard_checks", "Checks of guarded completions.", registry=registry)
        self._breaches = Counter("trimtab_guard_breaches", "Interventions that a guard weakened, by what was over its "
                                 "limit and what was done.", ["reason", "action"], registry=registry)

    def checked(self) -> None:
        self._checks.inc()

    def breached(self, event: Event) -> None:
        self._breaches.labels(event.reason, "stopped" if event.factor == 0 else "lowered").inc()


@dataclass
class GuardedCompletion(Completion):
    """A completion in parts. `events`, `parts`, `checks` tell what happened so far."""

    engine: Engine
    generation: Generation
    guards: Sequence[HeldGuard]
    weaken: Weaken
    metrics: GuardMetrics
    events: list[Event] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    checks: int = 0

    def __post_init__(self) -> None:
        program = self.generation.program
        if program is None:
            raise ValueError("nothing to guard")
        self._every = min(held.guard.every for held in self.guards)
        self._factors = [1.0] * len(program.compiled)
        self._lowered = [0] * len(program.compiled)
        self._generated: list[int] = []
        self._measured: list[list[Touched]] = []
        self._over = asyncio.Event()
        self.parts.append(Part(0, program))
        self._first = self._running = self._begin()

    async def admit(self) -> None:
        await self._running.admit()

    async def __aiter__(self) -> AsyncIterator[Token]:
        total = self.generation.sampling.max_tokens
        try:
            while True:
                async for token in self._running:
                    self._generated.append(token.token_id)
                    ended = token.finish_reason == "stop" or len(self._generated) == total
                    yield token if ended else replace(token, finish_reason=None)
                    if ended:
                        return
                if self._over.is_set():
                    return
                self._measured.append(self._running.touched())
                await self._check()
                if self._over.is_set():
                    return
                self._running = self._begin()
        finally:
            await self.cancel()

    async def cancel(self) -> None:
        self._over.set()
        await self._running.cancel()

    def cached(self) -> int | None:
        return self._first.cached()

    def touched(self) -> list[Touched]:
        """Tokens as they were first fed to the model, each under the program of its time."""
        prompt, length = self.generation.prompt_ids, len(self.generation.prompt_ids)
        counts: list[Touched] = [Touched(0, 0)] * len(self._factors)
        ids = [*prompt, *self._generated]
        for n, part in enumerate(self.parts):
            stop = self.parts[n + 1].start if n + 1 < len(self.parts) else len(self._generated)
            touch = part.program.touch(prompt, len(self._generated), self.generation.roles)
            acting = touch if part.program.acting else None
            # The last token that a part made is fed in the part after it.
            before = count_touched(part.program, acting, ids, length + part.start - 1 if n else 0)
            after = count_touched(part.program, acting, ids, length + max(stop - 1, 0))
            counts = [Touched(c.prompt + (a.prompt if n == 0 else 0), c.generation + a.generation - b.generation)
                      for c, a, b in zip(counts, after, before, strict=True)]
        running = [*self._measured, self._running.touched()]
        return [_with_steps(count, [part[j] for part in running]) for j, count in enumerate(counts)]

    def _begin(self) -> Completion:
        """The next part; all of the rest where nothing acts any more."""
        given, program = self.generation, self.parts[-1].program
        stop = given.sampling.max_tokens
        if program.acting:
            stop = min(stop, len(self._generated) + self._every)
        number = "" if not self._generated else f".{len(self._generated)}"
        # Nothing is kept, as the passes of one part tell nothing of tokens that another part made.
        return self.engine.generate(replace(
            given, request_id=f"{given.request_id}{number}", program=program, keep_from=None,
            generated_ids=tuple(self._generated), sampling=replace(given.sampling, max_tokens=stop)))

    async def _check(self) -> None:
        """Measure the last part and weaken what is over a limit."""
        self.checks += 1
        self.metrics.checked()
        start = len(self._generated) - self._every
        program, given = self.parts[-1].program, self.generation
        repeated = repetition(self._generated, start)
        try:
            found = await self.engine.compare(CompareRequest([*given.prompt_ids, *self._generated],
                                                             len(given.prompt_ids), program, given.roles))
            beyond = await self._beyond(start)
        except (TrimtabError, RuntimeError, ValueError, OSError) as error:
            # RuntimeError: what torch raises, out of memory included.
            log.warning("guard_not_measured", error=f"{type(error).__name__}: {error}"[:300])
            await self._weakened([Event(len(self._generated), j, 0.0, "unmeasured", None, repeated)
                                  for j in _acting(program)])
            return
        kl = float(found.total.kl[start:].mean())
        breach = next((b for held in self.guards if (b := over(held.guard, kl, repeated)) is not None), beyond)
        if breach is None:
            return
        guard, reason = breach
        worst = _worst(program, found, start)
        self._lowered[worst] += 1
        stopped = guard.action == "stop" or self._lowered[worst] > MAX_LOWERINGS
        factor = 0.0 if stopped else self._factors[worst] / 2
        shown = kl if math.isfinite(kl) else None
        await self._weakened([Event(len(self._generated), worst, factor, reason, shown, repeated)])

    async def _beyond(self, start: int) -> tuple[Guard, Reason] | None:
        """The guard by whose monitors the tokens from `start` on are beyond a limit, on a mean of any layer."""
        limits = [(held.guard, limit) for held in self.guards for limit in held.limits]
        if not limits:
            return None
        given, length = self.generation, len(self.generation.prompt_ids)
        sites: dict[Site, set[int]] = {}
        for _, limit in limits:
            sites.setdefault(limit.monitor.reader.site, set()).update(limit.monitor.reader.layers)
        [captured] = await self.engine.capture([CaptureRequest(
            [*given.prompt_ids, *self._generated], {site: sorted(layers) for site, layers in sites.items()},
            prompt_length=length, roles=given.roles)], self.parts[-1].program)
        for guard, limit in limits:
            reader = limit.monitor.reader
            for layer in reader.layers:
                first = max(length + start, reader.first_scored(layer))
                scores = reader.scores(layer, captured[reader.site][layer])[first:]
                if len(scores) and limit.monitor.beyond(float(scores.mean()), limit.threshold):
                    return guard, "monitor"
        return None

    async def _weakened(self, events: list[Event]) -> None:
        for event in events:
            self._factors[event.intervention] = event.factor
            self.metrics.breached(event)
        self.events += events
        self.parts.append(Part(len(self._generated), await self.weaken(self._factors)))


def _with_steps(count: Touched, parts: Sequence[Touched]) -> Touched:
    """The count of a whole completion with the steps that its parts measured; a mean is weighted by their tokens."""
    measured = [(p.prompt + p.generation, p) for p in parts if p.largest_step is not None and p.mean_step is not None]
    tokens = sum(weight for weight, _ in measured)
    if not tokens:
        return count
    return replace(count, largest_step=max(p.largest_step or 0.0 for _, p in measured),
                   mean_step=sum(weight * (p.mean_step or 0.0) for weight, p in measured) / tokens,
                   clipped=sum(p.clipped for _, p in measured))


def over(guard: Guard, kl: float, repeated: float) -> tuple[Guard, Reason] | None:
    """Which limit of the guard is exceeded. NaN counts as over it."""
    if guard.max_kl is not None and not kl <= guard.max_kl:
        return guard, "kl"
    if guard.max_repetition is not None and repeated > guard.max_repetition:
        return guard, "repetition"
    return None


def repetition(token_ids: Sequence[int], start: int) -> float:
    """Share of the 3-grams ending at `start` or later that occurred before in the text."""
    seen: set[tuple[int, ...]] = set()
    repeated = count = 0
    for end in range(NGRAM - 1, len(token_ids)):
        gram = tuple(token_ids[end - NGRAM + 1:end + 1])
        if end >= start:
            count += 1
            repeated += gram in seen
        seen.add(gram)
    return repeated / count if count else 0.0


def _acting(program: Program) -> list[int]:
    return [j for j in range(len(program.compiled)) if program.acting >> j & 1]


def _worst(program: Program, found: Comparison, start: int) -> int:
    """Of the interventions that act, the one without which the output would differ most."""
    return max(_acting(program), key=lambda j: float(found.without[j].kl[start:].mean()))
