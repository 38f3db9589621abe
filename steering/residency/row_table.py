"""Where the rows of resident programs are: for each site and layer, the pool and the row of intervention j in slot s.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steering.language.fields import MAX_INTERVENTIONS
from steering.language.vocabulary import Site
from steering.ops.base import Row
from steering.residency.pool import Pool, Signature, pad_rank, signature

Key = tuple[Site, int]
NO_ROW = -1


@dataclass
class Cell:
    """Rows of one (site, layer): pool number and row index of intervention j of the program in slot s, or NO_ROW."""

    pool: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Placed:
    """A row of a program that is there: where it acts, and which row of which pool it is."""

    key: Key
    intervention: int
    pool: Pool
    index: int


class RowTable:
    """Rows of up to `num_slots` programs. Slot 0 is "untouched". Who gets which slot is decided elsewhere."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        self.cells: dict[Key, Cell] = {}
        self.pools: list[Pool] = []
        self.version = 0
        self.lock = threading.RLock()
        self._pool_of: dict[Signature, Pool] = {}
        self._placed: dict[int, list[_Placed]] = {}

    @property
    def nbytes(self) -> int:
        """Device bytes of all pools."""
        return sum(pool.nbytes for pool in self.pools)

    def place(self, slot: int, rows: Sequence[Mapping[Key, Row]]) -> None:
        """Upload the rows of a program, one mapping per intervention, in the place of what is in the slot. If that
        fails, the slot is empty."""
        with self.lock:
            self.clear(slot)
            placed = self._placed[slot] = []
            try:
                for j, by_key in enumerate(rows):
                    for key, plain in by_key.items():
                        row = pad_rank(plain)
                        cell, pool = self._cell(key), self._pool(row)
                        index = pool.acquire(row)
                        placed.append(_Placed(key, j, pool, index))
                        cell.pool[slot, j], cell.row[slot, j] = pool.number, index
            except BaseException:
                # The device may be out of memory, for example. A program is placed whole or not at all.
                self.clear(slot)
                raise
            self.version += 1

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        with self.lock:
            for row in self._placed.pop(slot, ()):
                row.pool.release(row.index)
                self.cells[row.key].pool[slot, row.intervention] = NO_ROW
            self.version += 1

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
