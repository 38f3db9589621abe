"""Static tables that the compiled graph reads.

Every vector of every resident program is a row of a pool of its width, stored once however many programs and layers
use it; row 0 is zeros. Each place has an index `[G, rows of a stage * depth]` into the pool and a table of scalars, and
each token of the batch a number below G: 0 is "untouched", and slot s has `VARIANTS` numbers, one for each set of its
interventions that can touch a token. Nothing is reallocated once the engine runs, as CUDA graphs need it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engines.vllm.manifest import GraphOps
from server.engines.vllm.wire import Key, Rows
from server.engines.vllm.worker.fuse import NUM_FIXED_SCALARS, GraphStage, fuse
from server.engines.vllm.worker.staging import Staging
from steering.acting.containment import UNLIMITED, StepLimit
from steering.ops.base import Row
from steering.residency.shared import SharedRows

# Distinct scopes of a program: with three there are seven ways to touch a token.
MAX_SCOPES = 3
VARIANTS = 2**MAX_SCOPES - 1
IDENTITY_SCALARS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0)
NOBODY = -1


class VectorPool:
    """Vectors of one width on the device, shared by content. Row 0 is zeros and always there.

    It never grows, because the compiled graph reads it where it is.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(num_rows + 1, width, dtype=dtype, device=device)
        self._shared = SharedRows(range(num_rows, 0, -1))

    @property
    def num_free(self) -> int:
        return self._shared.num_free

    def acquire(self, vector: Tensor) -> int | None:
        """Row of the vector `[width]`, or None when the pool is full."""
        digest = hashlib.sha256(vector.contiguous().numpy().tobytes()).digest()
        return self._shared.acquire(digest, lambda row: self.tensor[row].copy_(vector))

    def release(self, row: int) -> None:
        self._shared.release(row)


@dataclass(frozen=True)
class GraphPlace:
    """One hooked (site, layer): its pool, index and scalars, and which columns of the full width this device has.

    elementwise: only part 1 of a stage without norms is there.
    """

    pool: VectorPool
    index: Tensor
    scalars: Tensor
    elementwise: bool
    columns: slice

    @property
    def ops(self) -> GraphOps:
        return "vectors" if self.elementwise else "all"

    @property
    def rows_per_stage(self) -> int:
        return self.index.shape[1]


class GraphTables:
    """All static tables of a worker.

    Args:
        num_slots: programs resident at a time.
        num_rows: vectors a pool holds.
        depth, rank: stages at one place, directions in one stage. limit: on each one's relative step.
        token: `[max tokens]` int32, the number of every token of the batch.
        owners: `[G, places * depth]`, which intervention of its program each stage is, or NOBODY.
        poisoning: see `poisoned`.
    """

    def __init__(self, num_slots: int, *, num_rows: int, depth: int, rank: int, max_tokens: int, dtype: torch.dtype,
                 device: torch.device, limit: StepLimit = UNLIMITED, poisoning: bool = False) -> None:
        self.depth, self.rank, self.limit, self.poisoning = depth, rank, limit, poisoning
        self.size = 1 + num_slots * VARIANTS
        self.num_rows, self.dtype, self.device = num_rows, dtype, device
        self.token = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.places: dict[Key, GraphPlace] = {}
        self.owners = np.full((self.size, 0), NOBODY, dtype=np.int8)
        self._pools: dict[int, VectorPool] = {}
        self._staging = Staging(self.token)
        self._held: dict[int, list[tuple[VectorPool, int]]] = {}
        self._scopes: dict[int, list[int]] = {}

    def add_place(self, key: Key, width: int, *, elementwise: bool, columns: slice) -> GraphPlace:
        """Make the tables of a place; `width` is that on this device."""
        if width not in self._pools:
            self._pools[width] = VectorPool(self.num_rows, width, self.dtype, self.device)
        per_stage = 2 if elementwise else 3 + 2 * self.rank
        index = torch.zeros(self.size, per_stage * self.depth, dtype=torch.int32, device=self.device)
        identity = torch.tensor([*IDENTITY_SCALARS, *[0.0] * self.rank])
        scalars = identity.repeat(self.size, self.depth).to(self.device)
        self.places[key] = GraphPlace(self._pools[width], index, scalars, elementwise, columns)
        self.owners = np.full((self.size, len(self.places) * self.depth), NOBODY, dtype=np.int8)
        return self.places[key]

    @property
    def nbytes(self) -> int:
        return (sum(pool.tensor.nbytes for pool in self._pools.values())
                + sum(place.index.nbytes + place.scalars.nbytes for place in self.places.values()))

    # Programs.

    def place(self, slot: int, rows: Rows) -> bool:
        """Write a program into the tables of `slot`, which is empty. False if the graph cannot carry it out: then
        nothing is changed."""
        scopes = rows.scopes
        acting = [j for j, by_key in enumerate(rows.rows) if by_key]
        groups = list(dict.fromkeys(scopes[j] for j in acting))
        keys = {key for by_key in rows.rows for key in by_key}
        if not groups or len(groups) > MAX_SCOPES or not keys <= self.places.keys():
            return False
        if not rows.limited and self.limit != UNLIMITED:
            # The limit is part of the graph.
            return False
        fused: list[tuple[Key, int, list[int], list[GraphStage]]] = []
        for variant in range(1, 2**len(groups)):
            on = [j for j in acting if variant >> groups.index(scopes[j]) & 1]
            for key in keys:
                here = [j for j in on if key in rows.rows[j]]
                stages = self._fused(key, [rows.rows[j][key] for j in here])
                if stages is None:
                    return False
                fused.append((key, 1 + (slot - 1) * VARIANTS + variant - 1, here, stages))
        self._held[slot] = []
        order = {key: n for n, key in enumerate(self.places)}
        for key, number, here, stages in fused:
            if not self._write(slot, self.places[key], number, stages):
                self.clear(slot)
                return False
            first = order[key] * self.depth
            self.owners[number, first:first + len(here)] = here
        self._scopes[slot] = [next(j for j in acting if scopes[j] == group) for group in groups]
        return True

    def clear(self, slot: int) -> None:
        """Forget what is in `slot`."""
        if slot not in self._held:
            return
        for pool, row in self._held.pop(slot):
            pool.release(row)
        self._scopes.pop(slot, None)
        numbers = slice(1 + (slot - 1) * VARIANTS, 1 + slot * VARIANTS)
        self.owners[numbers] = NOBODY
        identity = torch.tensor([*IDENTITY_SCALARS, *[0.0] * self.rank]).repeat(self.depth).to(self.device)
        for place in self.places.values():
            place.index[numbers] = 0
            place.scalars[numbers] = identity

    def variants(self, slot: int, bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Numbers of tokens of the program in `slot` that are touched as `bits` say."""
        variant = np.zeros_like(bits)
        for g, j in enumerate(self._scopes[slot]):
            variant |= (bits >> np.uint32(j) & np.uint32(1)) << np.uint32(g)
        return np.where(variant > 0, np.uint32((slot - 1) * VARIANTS) + variant, np.uint32(0))

    def _fused(self, key: Key, rows: Sequence[Row]) -> list[GraphStage] | None:
        return fuse(rows, depth=self.depth, rank=self.rank, elementwise=self.places[key].elementwise)

    def _write(self, slot: int, place: GraphPlace, number: int, stages: Sequence[GraphStage]) -> bool:
        per_stage = place.rows_per_stage // self.depth
        index = torch.zeros(place.rows_per_stage, dtype=torch.int32)
        for d, stage in enumerate(stages):
            for n, vector in _vectors(stage, self.rank, place.elementwise).items():
                mine = vector[place.columns].float()
                # The opaque op holds in float32 what the pool's dtype cannot hold.
                row = place.pool.acquire(mine) if bool(mine.to(place.pool.tensor.dtype).isfinite().all()) else None
                if row is None:
                    return False
                self._held[slot].append((place.pool, row))
                index[d * per_stage + n] = row
        place.index[number] = index.to(self.device)
        width = NUM_FIXED_SCALARS + self.rank
        for d, stage in enumerate(stages):
            place.scalars[number, d * width:(d + 1) * width] = stage.scalars(self.rank).to(self.device)
        return True

    # Steps.

    def fill(self, numbers: npt.NDArray[np.uint32]) -> None:
        """Set the number of every token of the coming step; rows behind them are untouched."""
        self._staging.put(numbers)

    def idle(self) -> None:
        if self._staging.filled:
            self.fill(np.zeros(0, dtype=np.uint32))


def _vectors(stage: GraphStage, rank: int, elementwise: bool) -> Mapping[int, Tensor]:
    """Vectors of a stage by their column of the index, those that do nothing left out."""
    found: dict[int, Tensor] = {}
    for n, vector in ((0, stage.scale), (1, stage.offset)):
        if vector is not None:
            found[n] = vector
    if not elementwise:
        if stage.polarity is not None:
            found[2] = stage.polarity
        for r in range(0 if stage.down is None or stage.up is None else len(stage.down)):
            assert stage.down is not None and stage.up is not None
            found[3 + r], found[3 + rank + r] = stage.down[r], stage.up[r]
    return {n: vector for n, vector in found.items() if bool(vector.any())}
