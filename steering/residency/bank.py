"""Which programs hold a slot on the device, on the embedded engine."""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from steering.programs.program import Program
from steering.residency.row_table import Held, RowTable


@dataclass
class _Resident:
    program: Program
    slot: int
    pins: int
    rows: Held


class Bank(RowTable):
    """`num_slots` slots for programs. Slot 0 is "untouched" and always there; programs live in 1..num_slots.

    A slot is pinned while requests use it. Unpinned ones keep their program until another needs the room; the least
    recently used goes first. Thread-safe.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        super().__init__(num_slots, device)
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._free = list(range(num_slots, 0, -1))

    def acquire(self, program: Program) -> int | None:
        """Pin the program and return its slot, or None if every slot is pinned."""
        with self.lock:
            resident = self._residents.get(program.digest)
            if resident is None:
                if not self._free and not self._evict_one():
                    return None
                resident = self._load(program)
            resident.pins += 1
            self._residents.move_to_end(program.digest)
            return resident.slot

    def release(self, program: Program) -> None:
        """Take one pin back."""
        with self.lock:
            resident = self._residents[program.digest]
            if resident.pins == 0:
                raise ValueError("released a slot that is not pinned")
            resident.pins -= 1

    def in_use(self, program: Program) -> bool:
        """Whether the program has a slot that is pinned, so that to acquire it takes none from others."""
        with self.lock:
            resident = self._residents.get(program.digest)
            return resident is not None and resident.pins > 0

    @property
    def num_pinned(self) -> int:
        with self.lock:
            return sum(resident.pins > 0 for resident in self._residents.values())

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    def _load(self, program: Program) -> _Resident:
        slot = self._free[-1]
        resident = _Resident(program, slot, 0, self.place(slot, [item.rows for item in program.compiled]))
        self._free.pop()
        self._residents[program.digest] = resident
        return resident

    def _evict_one(self) -> bool:
        victim = next((r for r in self._residents.values() if r.pins == 0), None)
        if victim is None:
            return False
        self.remove(victim.slot, victim.rows)
        del self._residents[victim.program.digest]
        self._free.append(victim.slot)
        return True
