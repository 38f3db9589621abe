"""Slots: which programs are resident on the device, and where their rows are."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from steering.ops.base import Row
from steering.pool import Pool, Signature, pad_rank, signature
from steering.program import Program
from steering.spec import MAX_INTERVENTIONS, Site

Key = tuple[Site, int]
NO_ROW = -1


@dataclass
class Cell:
    """Rows of one (site, layer): pool number and row index of intervention j of the program in slot s, or NO_ROW."""

    pool: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]


@dataclass
class _Resident:
    program: Program
    slot: int
    pins: int
    rows: list[tuple[Key, int, Pool, int]] = field(default_factory=list)


class Bank:
    """`num_slots` slots for programs. Slot 0 is "untouched" and always there; programs live in 1..num_slots.

    A slot is pinned while requests use it. Unpinned ones keep their program until another needs the room; the least
    recently used goes first. Thread-safe.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        self.cells: dict[Key, Cell] = {}
        self.pools: list[Pool] = []
        self.version = 0
        self.lock = threading.RLock()
        self._pool_of: dict[Signature, Pool] = {}
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._free = list(range(num_slots, 0, -1))

    def acquire(self, program: Program) -> int | None:
        """Pin the program and return its slot, or None if every slot is pinned."""
        with self.lock:
            resident = self._residents.get(program.digest)
            if resident is None:
                if not self._free and not self._evict_one():
                    return None
                resident = self._load(program, self._free.pop())
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

    @property
    def num_pinned(self) -> int:
        with self.lock:
            return sum(resident.pins > 0 for resident in self._residents.values())

    @property
    def num_resident(self) -> int:
        return len(self._residents)

    @property
    def nbytes(self) -> int:
        """Device bytes of all pools."""
        return sum(pool.nbytes for pool in self.pools)

    def _load(self, program: Program, slot: int) -> _Resident:
        resident = _Resident(program, slot, pins=0)
        for j, item in enumerate(program.compiled):
            for key, plain in item.rows.items():
                row = pad_rank(plain)
                pool = self._pool(row)
                index = pool.acquire(row)
                cell = self._cell(key)
                cell.pool[slot, j], cell.row[slot, j] = pool.number, index
                resident.rows.append((key, j, pool, index))
        self._residents[program.digest] = resident
        self.version += 1
        return resident

    def _evict_one(self) -> bool:
        victim = next((r for r in self._residents.values() if r.pins == 0), None)
        if victim is None:
            return False
        for key, j, pool, index in victim.rows:
            pool.release(index)
            self.cells[key].pool[victim.slot, j] = NO_ROW
        del self._residents[victim.program.digest]
        self._free.append(victim.slot)
        self.version += 1
        return True

    def _pool(self, row: Row) -> Pool:
        name = signature(row)
        if name not in self._pool_of:
            self._pool_of[name] = Pool(len(self.pools), row, self.device)
            self.pools.append(self._pool_of[name])
        return self._pool_of[name]

    def _cell(self, key: Key) -> Cell:
        if key not in self.cells:
            shape = (self.num_slots + 1, MAX_INTERVENTIONS)
            self.cells[key] = Cell(np.full(shape, NO_ROW, np.int32), np.zeros(shape, np.int32))
        return self.cells[key]
