"""Which program is in which slot of the workers, decided in the server process."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from steering.program import Program


@dataclass
class _Resident:
    slot: int
    pins: int
    placed: "asyncio.Task[bool]"


class SlotTable:
    """Pins programs in `num_slots` slots from `first` on; the least recently used one without pins makes room.

    For one event loop.

    A slot may be given to another program as soon as nobody pins it: vLLM hears of the end or the abort of its last
    request, and then of the new program, over one ordered channel.
    """

    def __init__(self, num_slots: int, place: Callable[[int, Program], Awaitable[bool]], first: int = 1) -> None:
        self.num_slots = num_slots
        self._first = first
        self.epoch = 0
        self._place = place
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._free = list(range(first + num_slots - 1, first - 1, -1))

    async def acquire(self, program: Program) -> int | None:
        """Pin the program, uploading it if it is not there. None if every slot is pinned."""
        resident = self.reserve(program)
        return None if resident is None else await self.settled(program, resident)

    def reserve(self, program: Program) -> _Resident | None:
        """Pin the program and begin its upload, if it is not there; None if every slot is pinned.

        `settled` comes next."""
        resident = self._residents.get(program.digest)
        if resident is None:
            if not self._free and not self._evict_one():
                return None
            slot = self._free.pop()
            resident = _Resident(slot, 0, asyncio.ensure_future(self._upload(slot, program)))
            self._residents[program.digest] = resident
        resident.pins += 1
        self._residents.move_to_end(program.digest)
        return resident

    async def settled(self, program: Program, resident: _Resident) -> int:
        """The slot of a reserved program once it is uploaded; the pin is taken back if that fails."""
        try:
            await asyncio.shield(resident.placed)
        except BaseException:
            resident.pins -= 1
            failed = resident.placed.done() and (resident.placed.cancelled() or resident.placed.exception() is not None)
            if failed and self._residents.get(program.digest) is resident:
                del self._residents[program.digest]
                self._free.append(resident.slot)
            raise
        return resident.slot

    def release(self, program: Program, epoch: int) -> None:
        """Take back one pin of the given epoch; nothing is left of those before the last `clear`."""
        if epoch == self.epoch:
            self._residents[program.digest].pins -= 1

    def in_graph(self, program: Program) -> bool:
        """Whether the compiled graph carries a resident program out."""
        return self._residents[program.digest].placed.result()

    def clear(self) -> None:
        """The workers are new: nothing is resident, and a new epoch begins."""
        self.epoch += 1
        self._residents.clear()
        self._free = list(range(self._first + self.num_slots - 1, self._first - 1, -1))

    @property
    def num_pinned(self) -> int:
        return sum(resident.pins > 0 for resident in self._residents.values())

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    async def _upload(self, slot: int, program: Program) -> bool:
        return await self._place(slot, program)

    def _evict_one(self) -> bool:
        for digest, resident in self._residents.items():
            if resident.pins == 0 and resident.placed.done():
                del self._residents[digest]
                self._free.append(resident.slot)
                return True
        return False
