"""A completion in the engine: its program, what it touches, and the tokens on their way to the caller."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from server.engines.base import Completion
from server.engines.data import Generation, Token, Touched
from server.engines.keeping import KeptRows
from server.engines.measured import Measured
from server.engines.slots import Lease
from server.engines.touching import count_touched
from server.engines.transformers.tally import Tally
from steering.acting.containment import Fault
from steering.language.errors import EngineUnavailable, TrimtabError
from steering.programs.program import Program
from steering.programs.touch import Touch

# What the name of a companion has behind that of its request.
COMPANION = "/weak"


@dataclass(frozen=True)
class Drawn:
    """What the sampler reports of one token, before the engine knows whether it ends the completion."""

    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass
class Running:
    """State of one completion, shared by the event loop (admission, delivery) and the engine's thread (steps).

    lease, base: where the program and the touch bits are while it runs; no lease for an unsteered one.
    processed: tokens that went through the model at least once. measured: its steps, once it is over.
    tally: of its tokens, where its sampling has penalties. matcher: xgrammar's, where its text is held to a grammar.
    drawn: what the sampler reported, one per generated token.
    before: generated tokens that the loop was given as part of the prompt. delivered: of those that it generates
    itself, how many were handed over.
    epoch: the loop that it was given to. moves: how often it was taken over by another one.
    cached: tokens of its prompt that it found in the cache when it was first looked for there.
    weak: the weak run of its contrast, its companion in every step.
    """

    generation: Generation
    program: Program | None
    touch: Touch | None
    seed: int
    lease: Lease | None = None
    base: int = 0
    processed: int = 0
    measured: Measured | None = None
    tally: Tally | None = None
    matcher: Any = None
    token_ids: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    before: int = 0
    delivered: int = 0
    epoch: int | None = None
    moves: int = 0
    cached: int | None = None
    weak: "Running | None" = None

    @classmethod
    def build(cls, generation: Generation, seed: int) -> "Running":
        """Raises InvalidSpec if a scope does not fit the prompt."""
        contrast, weak = generation.contrast, None
        if contrast is not None:
            weak = cls.build(replace(generation, request_id=generation.request_id + COMPANION, program=contrast.weak,
                                     contrast=None, keep_from=None), seed)
        program = generation.program if generation.program is not None and generation.program.acting else None
        touch = None
        if program is not None:
            touch = program.touch(generation.prompt_ids, generation.sampling.max_tokens, generation.roles)
            touch.settle(generation.generated_ids)
        # Earlier tokens have their place among the choices, as the sampler goes by their number.
        return cls(generation, program, touch, seed, token_ids=[*generation.prompt_ids, *generation.generated_ids],
                   drawn=[Drawn(None, ())] * len(generation.generated_ids), before=len(generation.generated_ids),
                   weak=weak)

    @property
    def runs(self) -> "tuple[Running, ...]":
        """Itself, and its companion where it has one."""
        return (self,) if self.weak is None else (self, self.weak)

    @property
    def slot(self) -> int:
        """Slot 0 leaves tokens untouched."""
        return 0 if self.lease is None else self.lease.slot

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def whole(self) -> bool:
        """Whether every token that was drawn has been handed over, so that it can go on from there."""
        return len(self.drawn) == self.before + self.delivered

    def rewind(self, token_ids: list[int]) -> None:
        """Forget what was drawn after these tokens. The same numbers will be drawn for them again."""
        if self.matcher is not None and len(self.token_ids) > len(token_ids):
            self.matcher.rollback(len(self.token_ids) - len(token_ids))
        del self.token_ids[len(token_ids):]
        del self.drawn[len(token_ids) - len(self.generation.prompt_ids):]
        self.tally = None

    def touched(self, processed: int, measured: Measured | None) -> list[Touched]:
        """Per intervention of the request's program, tokens acted on among the first `processed` ones; an intervention
        without rows has none. With the steps that were measured."""
        touched = count_touched(self.generation.program, self.touch, self.token_ids, processed)
        return touched if measured is None else measured.add_to(touched)


@dataclass(frozen=True)
class Overflow:
    """Values of a completion stopped being finite behind its interventions, or without any. layer: the first one that
    shows it; None if only the logits do."""

    position: int
    layer: int | None


@dataclass(frozen=True)
class OfWeak:
    """What went wrong in the weak run of a completion."""

    failure: Fault | Overflow


# Why a completion is given up; a sentence where it is the engine's fault.
Failure = TrimtabError | Fault | Overflow | OfWeak


class SaltedIds(list[int]):
    """Token ids whose full pages carry, when hashed, what a program did to them.

    The cache hashes page by page, each chained to the one before. A page with touched tokens gets the program's digest
    and its touch bits appended, so equal programs share it and nothing else does; pages before the first touched token
    stay shared with everybody. A request with a salt of its own has it on every page.
    """

    def __init__(self, token_ids: list[int], running: Running) -> None:
        super().__init__(token_ids)
        self._bits, self._digest = np.zeros(0, dtype=np.uint32), b""
        if running.touch is not None and running.program is not None:
            # A token forced in after a recompute may lie past the map only if it will never be read back.
            self._bits = running.touch.bits_of(token_ids[:len(running.touch.on)])
            self._digest = running.program.digest.encode()
        salt = running.generation.cache_salt
        self._own = None if salt is None else hashlib.sha256(salt.encode()).digest()

    def __getitem__(self, index):
        page = super().__getitem__(index)
        if not isinstance(index, slice):
            return page
        bits = self._bits[index]
        touched = bits.any()
        if not touched and self._own is None:
            return page
        salt = hashlib.sha256((self._own or b"") + (self._digest + bits.tobytes() if touched else b"")).digest()
        return [*page, *np.frombuffer(salt, dtype=np.int32).tolist()]


class EngineCompletion(Completion):
    """Hands tokens from the engine's thread to the caller."""

    def __init__(self, running: Running, start: Callable[["EngineCompletion"], Coroutine[Any, Any, None]],
                 leave: Callable[[Running], None], touched: Callable[[Running], list[Touched]],
                 explain: Callable[[Running, Failure], Awaitable[TrimtabError]], kept: KeptRows | None) -> None:
        """`kept`: rows of its passes, where it is to be compared. They are freed with the completion, so nothing else
        holds on to them once it is over."""
        self.running = running
        self._kept = kept
        self._touched = touched
        self._explain = explain
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token | Failure] = asyncio.Queue()
        self._start = start
        self._leave = leave
        self._admitted: asyncio.Task[None] | None = None
        self._over = False

    async def admit(self) -> None:
        if self._over:
            raise EngineUnavailable("this completion was cancelled")
        if self._admitted is None:
            self._admitted = asyncio.create_task(self._start(self))
        await asyncio.shield(self._admitted)

    def deliver(self, tokens: list[Token]) -> None:
        """Called on the event loop."""
        for token in tokens:
            self._queue.put_nowait(token)

    def fail(self, failure: Failure) -> None:
        """Called on the event loop: the completion ends with this, after the tokens that are there."""
        self._queue.put_nowait(failure)

    async def __aiter__(self) -> AsyncIterator[Token]:
        try:
            await self.admit()
            while True:
                item = await self._queue.get()
                if not isinstance(item, Token):
                    raise await self._explain(self.running, item)
                if item.finish_reason is not None:
                    self._over = True
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            await self.cancel()

    async def cancel(self) -> None:
        if self._over:
            return
        self._over = True
        if self._admitted is not None and not self._admitted.done():
            # Still waiting for a slot: it must not get one for nobody.
            self._admitted.cancel()
            await asyncio.wait({self._admitted})
        self._leave(self.running)

    def touched(self) -> list[Touched]:
        return self._touched(self.running)

    def weak_touched(self) -> list[Touched]:
        return [] if self.running.weak is None else self._touched(self.running.weak)

    def cached(self) -> int | None:
        return self.running.cached

    def kept(self) -> KeptRows | None:
        return self._kept
