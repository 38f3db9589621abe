"""The kill switch: held in memory, so that it acts at once and needs no database; kept in the library for the others.

A change acts in this process first and is stored afterwards, for as long as it takes. Other servers of the library, and
this one after a restart, know it once it is stored.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

import anyio
import structlog

from server.observability.instruments import Gauge, Registry
from server.threads import contained
from vectors.library.audit.notes import ACTOR
from vectors.library.switches import Switches, Turn, Turned

Result = TypeVar("Result")
log = structlog.get_logger("trimtab.switches")
# Seconds until this server learns of a change that another one stored, and between two tries to store one.
POLL_S = 0.5
# Longest a change waits to be stored before it is answered, and before the server stops.
STORE_S = 2.0
# Turns that wait to be recorded while the library is away; of more, the oldest are forgotten.
MOST_TURNS = 1000


class KillSwitch:
    """`reason` may be read from any thread; everything else belongs to the event loop.

    Attributes:
        generation: raised by one with every change.
        turned: who turned it last, None where nobody did.
        unstored: the state that the library does not know yet, None where it knows.
        failure: why the last try to reach the library failed, None after one that did not.
    """

    def __init__(self, switches: Switches, registry: Registry, *, always: bool) -> None:
        """`always`: on for the life of the process, whatever the library says."""
        self.generation = 0
        self.turned: Turned | None = None
        self.unstored: bool | None = None
        self.failure: str | None = None
        self._switches = switches
        self._always = always
        self._on = False
        self._turns: deque[Turn] = deque(maxlen=MOST_TURNS)
        self._listeners: dict[object, Callable[[], None]] = {}
        self._wake = asyncio.Event()
        self._tried = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # A thread of its own: those that requests wait for may all be taken.
        self._thread = anyio.CapacityLimiter(1)
        Gauge("trimtab_kill_switch", "1 while all steering is off.", registry=registry).set_function(
            lambda: float(self.on))
        Gauge("trimtab_kill_switch_unstored", "1 while the library does not know this server's kill switch.",
              registry=registry).set_function(lambda: float(self.unstored is not None))

    @property
    def on(self) -> bool:
        return self._on or self._always

    @property
    def reason(self) -> str | None:
        """Why all steering is off, None where it is on."""
        if self._always:
            return "the kill switch is set in the server's settings"
        return "the kill switch is on" if self._on else None

    async def start(self) -> None:
        """Read the library's state, then follow it. Raises LibraryUnavailable."""
        self._apply(*await self._in_thread(self._switches.kill_switch_turned))
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is None:
            return
        await self._stored(STORE_S)
        if self.unstored is not None:
            log.error("kill_switch_not_stored", on=self.unstored, error=self.failure)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def set(self, on: bool) -> None:
        """Turn it on or off. It acts at once. The call returns when the state is stored, or when it could not be stored
        yet."""
        self.unstored = on
        turn = Turn(on, ACTOR.get(), datetime.now(UTC))
        self._turns.append(turn)
        # Whoever turns it to what it is already has not turned it.
        self._apply(on, self.turned if on == self._on else Turned.of(turn.by, turn.at))
        self._tried = asyncio.Event()
        self._wake.set()
        await self._stored(STORE_S)

    def wake(self) -> None:
        """Look now for what other servers changed."""
        self._wake.set()

    @contextmanager
    def subscribe(self, changed: Callable[[], None]) -> Iterator[None]:
        """Call `changed` in the event loop after every change, within the context. It must return at once."""
        key = object()
        self._listeners[key] = changed
        try:
            yield
        finally:
            del self._listeners[key]

    def _apply(self, on: bool, turned: Turned | None) -> None:
        self.turned = turned
        if on == self._on:
            return
        self._on = on
        self.generation += 1
        log.warning("kill_switch", on=self.on, by=None if turned is None else turned.by)
        for changed in list(self._listeners.values()):
            try:
                changed()
            except Exception as error:  # one listener must not keep the switch from the others
                log.error("kill_switch_listener_failed", exc_info=error)

    async def _stored(self, at_most_s: float) -> None:
        """Return when the state is stored, or when that was tried in vain."""
        if self.unstored is not None:
            with anyio.move_on_after(at_most_s):
                await self._tried.wait()

    async def _follow(self) -> None:
        while True:
            with anyio.move_on_after(POLL_S):
                await self._wake.wait()
            self._wake.clear()
            await self._exchange()

    async def _exchange(self) -> None:
        """Store what the library does not know, or else learn what it says."""
        wanted, tried, turns = self.unstored, self._tried, list(self._turns)
        try:
            if wanted is None:
                found = await self._in_thread(self._switches.kill_switch_turned)
                if self.unstored is None:
                    self._apply(*found)
            else:
                await self._in_thread(self._switches.set_kill_switch, wanted, turns)
                self._turns = deque((turn for turn in self._turns if turn not in turns), maxlen=MOST_TURNS)
                # If it was turned again meanwhile, the newer state is stored next.
                if self._tried is tried:
                    self.unstored = None
            self.failure = None
        except Exception as error:  # any error of a database, because the switch has to act without it
            if self.failure is None:
                log.warning("kill_switch_out_of_step", unstored=wanted, error=str(error)[:300])
            self.failure = f"{type(error).__name__}: {error}"[:300]
        tried.set()

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await anyio.to_thread.run_sync(contained(work), *arguments, abandon_on_cancel=True, limiter=self._thread)
