"""Which program is in which slot of an engine, and who waits for one.

Requests of one program share its slot. A request whose program is resident is served at once. Any other takes a free
slot, or the slot of the program that has been unused for longest. If every slot is in use it waits, first come, first
served. Because a popular program could hold its slot for ever, one resident is drained for each program that waits. It
is the one with the fewest requests, and its new requests wait their turn like all others.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from steering.language.errors import SlotsExhausted
from steering.programs.program import Program


@dataclass(eq=False)
class _Resident:
    digest: str
    slot: int
    placed: "asyncio.Future[bool]"
    pins: int = 0
    draining: bool = False


@dataclass(eq=False)
class _Waiter:
    program: Program
    given: "asyncio.Future[_Resident]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Lease:
    """The slot of a program, for one request. For the event loop of its table."""

    def __init__(self, table: "SlotTable", resident: _Resident) -> None:
        self.slot = resident.slot
        self._table = table
        self._resident: _Resident | None = resident

    def release(self) -> None:
        """Give it back. Does nothing the second time, or when the table has been cleared since."""
        resident, self._resident = self._resident, None
        if resident is not None:
            self._table._unpin(resident)

    def distrust(self) -> None:
        """Say that the slot does not hold the program, so that it is placed anew for the next request."""
        if self._resident is not None:
            self._table._drop(self._resident)


class SlotTable:
    """`num_slots` slots from `first` on. For one event loop; nothing is awaited between a decision and its effect.

    A slot may be given to another program as soon as nobody holds it. vLLM hears of the end or the abort of its last
    request, and then of the new program, over one ordered channel; in the embedded engine its last request has left the
    batch before it gives the slot back.

    Args:
        place: puts a program into a slot, in the place of what was there. What it returns is told by `in_graph`.
        max_waiting: requests that may wait for a slot; one more is refused.
        wait_s: how long one may wait; None for as long as it likes.
    """

    def __init__(self, num_slots: int, place: Callable[[int, Program], Coroutine[Any, Any, bool]], *, first: int = 1,
                 max_waiting: int = 1024, wait_s: float | None = None) -> None:
        self.num_slots, self.wait_s = num_slots, wait_s
        self._first, self._place, self._max_waiting = first, place, max_waiting
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        # Residents that take no more requests, but still have some.
        self._dropped: set[_Resident] = set()
        self._waiting: list[_Waiter] = []
        self._free: list[int] = []
        self.clear()

    async def lease(self, program: Program) -> Lease:
        """A slot that holds the program, uploaded.

        Raises:
            SlotsExhausted: too many wait for a slot already, or none came free in time.
        """
        resident = self._shared(program) or (self._settled(program) if not self._waiting else None)
        if resident is None:
            try:
                async with asyncio.timeout(self.wait_s):
                    resident = await self._turn(program)
            except TimeoutError:
                raise SlotsExhausted(
                    f"all {self.num_slots} slots were held by other specs for {self.wait_s:g} s", param="steering",
                    retry_after_s=5,
                    fix="Try again, use fewer distinct specs at a time, or raise the setting slots.") from None
        try:
            await asyncio.shield(resident.placed)
        except BaseException:
            self._unpin(resident)
            raise
        return Lease(self, resident)

    def interrupt(self, error: Exception) -> None:
        """All requests that wait get `error`, because none can be served."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.given.done():
                waiter.given.set_exception(error)

    def clear(self) -> None:
        """Begin anew with slots that hold nothing. Leases that were given before have no effect any more."""
        self._residents.clear()
        self._dropped.clear()
        self._free = list(range(self._first + self.num_slots - 1, self._first - 1, -1))
        self._serve()

    def in_graph(self, program: Program) -> bool:
        """Whether the compiled graph carries a resident program out."""
        return self._residents[program.identity].placed.result()

    @property
    def num_pinned(self) -> int:
        return sum(resident.pins > 0 for resident in self._residents.values()) + len(self._dropped)

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def _turn(self, program: Program) -> _Resident:
        if len(self._waiting) >= self._max_waiting:
            raise SlotsExhausted(
                f"all {self.num_slots} slots are held by other specs, {len(self._waiting)} requests wait for one",
                param="steering", retry_after_s=5,
                fix="Try again, use fewer distinct specs at a time, or raise the settings slots or slot_queue.")
        waiter = _Waiter(program)
        self._waiting.append(waiter)
        self._serve()
        try:
            return await waiter.given
        except BaseException:
            if waiter.given.done() and not waiter.given.cancelled() and waiter.given.exception() is None:
                # The slot was given in the same moment in which this request left.
                self._unpin(waiter.given.result())
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
                self._serve()
            raise

    def _shared(self, program: Program) -> _Resident | None:
        """The resident of a program that may take one more, pinned."""
        resident = self._residents.get(program.identity)
        if resident is None or resident.draining:
            return None
        resident.pins += 1
        self._residents.move_to_end(program.identity)
        return resident

    def _settled(self, program: Program) -> _Resident | None:
        """A new resident in a slot that nobody uses, pinned and on its way there."""
        if program.identity in self._residents or not (self._free or self._evict_one()):
            return None
        slot = self._free.pop()
        resident = _Resident(program.identity, slot, asyncio.create_task(self._place(slot, program)), pins=1)
        self._residents[program.identity] = resident
        resident.placed.add_done_callback(lambda placed: self._arrived(resident, placed))
        return resident

    def _arrived(self, resident: _Resident, placed: "asyncio.Future[bool]") -> None:
        """An upload is over. A slot whose upload failed holds no program, and others may wait for the slot."""
        if placed.cancelled() or placed.exception() is not None:
            self._drop(resident)
        self._serve()

    def _unpin(self, resident: _Resident) -> None:
        resident.pins -= 1
        if resident.pins == 0 and resident in self._dropped:
            self._dropped.discard(resident)
            self._free.append(resident.slot)
        self._serve()

    def _drop(self, resident: _Resident) -> None:
        """Hand a resident out no more; its slot is free when its last request has left."""
        if self._residents.get(resident.digest) is not resident:
            return
        del self._residents[resident.digest]
        if resident.pins:
            self._dropped.add(resident)
        else:
            self._free.append(resident.slot)

    def _evict_one(self) -> bool:
        for resident in self._residents.values():
            if resident.pins == 0 and resident.placed.done():
                self._drop(resident)
                return True
        return False

    def _serve(self) -> None:
        """Give what there is to those that wait, in order, and drain a slot for each program that goes on waiting."""
        draining = [resident for resident in self._residents.values() if resident.draining]
        if not self._waiting and not draining:
            return
        wanted: set[str] = set()
        missing = 0
        left: list[_Waiter] = []
        for waiter in self._waiting:
            program = waiter.program
            if waiter.given.done():
                continue
            if not wanted and (own := self._residents.get(program.identity)) is not None and own.draining:
                # No program waits before this one, so its own slot need not be drained for others.
                own.draining = False
                draining.remove(own)
            resident = None if program.identity in wanted else (
                self._shared(program) or (None if wanted else self._settled(program)))
            if resident is not None:
                waiter.given.set_result(resident)
                continue
            left.append(waiter)
            # A program that waits because its own slot is drained does not need a second slot to be drained.
            missing += program.identity not in wanted and program.identity not in self._residents
            wanted.add(program.identity)
            if len(draining) < missing:
                draining += self._drain_one()
        self._waiting = left
        spared = draining[missing:]
        for resident in spared:
            resident.draining = False
        if spared and left:
            self._serve()

    def _drain_one(self) -> list[_Resident]:
        least = min((resident for resident in self._residents.values() if resident.pins and not resident.draining),
                    key=lambda resident: resident.pins, default=None)
        if least is None:
            return []
        least.draining = True
        return [least]
