"""A steered completion under the kill switch: turned on meanwhile, it acts from the next token on.

What comes out of the engine after the switch was turned is thrown away, for it was made steered. The completion then
goes on from the tokens that were delivered, unsteered, as if nothing had ever acted (its cache is not the steered one);
or it ends there, where the server is set so or the engine cannot go on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import anyio

from server.engines.base import Completion, Engine
from server.engines.data import Generation, Kept, Token, Touched
from server.engines.parts import Part
from server.requests.guard import Event, GuardedCompletion
from server.requests.killswitch import KillSwitch
from steering.programs.program import Program


class SwitchedCompletion(Completion):
    """
    Attributes:
        switched_off: the first generated token that is not steered any more, or would have been; None while the switch
            has not been turned.
        ended: whether the completion ended there.
    """

    def __init__(self, engine: Engine, generation: Generation, program: Program | None,
                 begin: Callable[[], Completion], switch: KillSwitch, *, ends: bool) -> None:
        """`program`: of the generation; it acts, or there is a contrast. `begin`: starts the completion in the engine,
        guarded perhaps."""
        self.switched_off: int | None = None
        self.ended = False
        self._engine, self._generation, self._program, self._switch = engine, generation, program, switch
        wanted = generation.sampling
        self._ends = ends or "resume" not in engine.features or any(getattr(wanted, one) for one in engine.not_resumed)
        self._steered = self._running = begin()
        self._touched: list[Touched] | None = None
        self._turned = asyncio.Event()
        self._over = False

    async def admit(self) -> None:
        """A completion that waits for a slot notices the switch at once, because it needs no slot to run unsteered."""
        with self._switch.subscribe(self._look):
            self._look()
            if not self._turned.is_set():
                await self._admit_until_turned()
        if self._turned.is_set() and self.switched_off is None and not self._over:
            await self._go_on([])

    async def _admit_until_turned(self) -> None:
        admitting, turning = asyncio.ensure_future(self._running.admit()), asyncio.ensure_future(self._turned.wait())
        try:
            await asyncio.wait({admitting, turning}, return_when=asyncio.FIRST_COMPLETED)
            if not self._turned.is_set():
                admitting.result()
        finally:
            # The completion frees what it holds in the engine by itself, when it is cancelled.
            for task in (admitting, turning):
                task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.gather(admitting, turning, return_exceptions=True)

    async def _go_on(self, delivered: list[int]) -> None:
        """Go on unsteered from the tokens that were delivered, or end there."""
        self.switched_off = len(delivered)
        await self._running.cancel()
        self._touched = self._running.touched()
        if self._ends:
            self.ended = True
            return
        self._running = self._engine.generate(replace(
            self._generation, request_id=f"{self._generation.request_id}.off", program=None, keep_from=None,
            contrast=None, generated_ids=tuple(delivered)))
        await self._running.admit()

    async def __aiter__(self) -> AsyncIterator[Token]:
        delivered: list[int] = []
        try:
            await self.admit()
            with self._switch.subscribe(self._look):
                self._look()
                if not self._turned.is_set():
                    async for token in self._running:
                        if self._turned.is_set():
                            break
                        delivered.append(token.token_id)
                        yield token
                        if token.finish_reason is not None:
                            return
            if self._over:
                return
            if self.switched_off is None:
                await self._go_on(delivered)
            if self.ended:
                return
            async for token in self._running:
                yield token
        finally:
            await self.cancel()

    def _look(self) -> None:
        # The completion stays unsteered even if the switch is turned off again.
        if self._switch.on:
            self._turned.set()

    async def cancel(self) -> None:
        self._over = True
        await self._running.cancel()

    def touched(self) -> list[Touched]:
        return self._steered.touched() if self._touched is None else self._touched

    def weak_touched(self) -> list[Touched]:
        return self._steered.weak_touched()

    def cached(self) -> int | None:
        return self._steered.cached()

    def kept(self) -> Kept | None:
        """None if the switch was turned on meanwhile, because the completion was then made in two parts."""
        return self._steered.kept() if self.switched_off is None else None

    @property
    def parts(self) -> Sequence[Part]:
        """The programs it was made under, where there was more than one."""
        steered = self._guarded.parts if self._guarded is not None else ()
        if self.switched_off is None or self._program is None:
            return steered
        off = Part(self.switched_off, self._program.decided(range(len(self._program.compiled))))
        before = [part for part in steered or [Part(0, self._program)] if part.start < self.switched_off]
        return [*before, off]

    @property
    def events(self) -> Sequence[Event]:
        return self._guarded.events if self._guarded is not None else ()

    @property
    def checks(self) -> int | None:
        return self._guarded.checks if self._guarded is not None else None

    @property
    def _guarded(self) -> GuardedCompletion | None:
        return self._steered if isinstance(self._steered, GuardedCompletion) else None
