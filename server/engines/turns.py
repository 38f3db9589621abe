"""Who waits for a slot, and in which order: first come, first served, in a queue that is bounded."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from steering.language.errors import SlotsExhausted
from steering.programs.program import Program

# How long requests may go before the first in the queue because their program is in use and takes no slot from it.
# Without this a popular program would wait behind a rare one; without a limit it would keep its slot for ever.
SHARING_S = 2.0


class Slots(Protocol):
    """`steering.residency.bank.Bank`, as far as it is used here."""

    num_slots: int

    def acquire(self, program: Program) -> int | None: ...

    def release(self, program: Program) -> None: ...

    def in_use(self, program: Program) -> bool: ...


@dataclass(eq=False)
class _Waiter:
    program: Program
    slot: "asyncio.Future[int]"
    since: float


class Turns:
    """Used on one event loop. A slot that comes free is handed to the first that waits, so that no wake-up is lost and
    none is in vain."""

    def __init__(self, slots: Slots, *, most_waiting: int, wait_s: float | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            most_waiting: requests that may wait; one more is refused.
            wait_s: how long one may wait; None for as long as it likes.
        """
        self._slots, self._most_waiting, self._wait_s, self._clock = slots, most_waiting, wait_s, clock
        self._queue: deque[_Waiter] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    async def take(self, program: Program) -> int:
        """A slot with the program in it, pinned for the caller.

        Raises:
            SlotsExhausted: the queue is full, or no slot came free in time.
        """
        if not self._queue or self._may_share(program):
            slot = self._slots.acquire(program)
            if slot is not None:
                return slot
        if len(self._queue) >= self._most_waiting:
            raise SlotsExhausted(
                f"all {self._slots.num_slots} slots are held by other specs, {len(self._queue)} requests wait for one",
                param="steering", retry_after_s=5,
                fix="Try again, use fewer distinct specs at a time, or raise the settings slots or slot_queue.")
        waiter = _Waiter(program, asyncio.get_running_loop().create_future(), self._clock())
        self._queue.append(waiter)
        try:
            async with asyncio.timeout(self._wait_s):
                return await waiter.slot
        except BaseException as error:
            if waiter in self._queue:
                self._queue.remove(waiter)
            elif not waiter.slot.cancelled() and waiter.slot.exception() is None:
                # It was given a slot in the moment in which it left.
                self._slots.release(program)
            # Those behind it may have what it could not.
            self.freed()
            if isinstance(error, TimeoutError):
                raise SlotsExhausted(
                    f"all {self._slots.num_slots} slots are held by other specs, none came free in {self._wait_s:g} s",
                    param="steering", retry_after_s=5,
                    fix="Try again, use fewer distinct specs at a time, or raise the setting slots.") from None
            raise

    def freed(self) -> None:
        """To be called after every release: hands out what is free."""
        while self._queue:
            first = self._queue[0]
            try:
                slot = self._slots.acquire(first.program)
            except Exception as error:  # the program cannot be placed: that is its request's fault, not the next one's
                self._queue.popleft()
                if not first.slot.done():
                    first.slot.set_exception(error)
                continue
            if slot is None:
                return
            self._queue.popleft()
            if first.slot.done():
                # It has left and will be gone from here in a moment.
                self._slots.release(first.program)
                continue
            first.slot.set_result(slot)
            self._share(first.program)

    def _may_share(self, program: Program) -> bool:
        return self._slots.in_use(program) and self._clock() - self._queue[0].since < SHARING_S

    def _share(self, program: Program) -> None:
        """The slot that the program now has serves all that wait for the same."""
        for waiter in [w for w in self._queue if w.program.digest == program.digest and not w.slot.done()]:
            slot = self._slots.acquire(program)
            if slot is not None:
                self._queue.remove(waiter)
                waiter.slot.set_result(slot)
