"""Planning one step of the engine: from the slot and the bits of each token to what each hook must do."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steering.ops.segments import Segments
from steering.programs.touch import Bits
from steering.residency.pool import Pool
from steering.residency.row_table import NO_ROW, Key, RowTable

Slots = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Stage:
    """Tokens that one kernel acts on at one (site, layer), with the row of each.

    tokens: positions in the flat batch, or None for all of it, in order. rows: int64 of the same length.
    segments: the runs of equal rows, if the tokens are sorted by row. They are for kernels that multiply by matrices,
    and wherever all tokens use one row. key, intervention: the (site, layer), and the index of the intervention in its
    programs. positions: `tokens` on the host.
    """

    pool: Pool
    tokens: torch.Tensor | None
    rows: torch.Tensor
    segments: Segments | None = None
    key: Key | None = None
    intervention: int = 0
    positions: npt.NDArray[np.int64] | None = None


StepPlan = dict[Key, list[Stage]]


def plan_step(bank: RowTable, slots: Slots, bits: Bits) -> StepPlan:
    """What to do in a step over a flat batch of T tokens.

    Args:
        slots: int32 `[T]`, slot of each token, 0 for untouched ones.
        bits: uint32 `[T]`, bit j set where intervention j of the token's program acts.

    Python work is per (site, layer) and per depth of stacking, never per token or request.
    """
    pairs = _pairs(slots, bits)
    if pairs is None:
        return {}
    tokens, depth = pairs
    slot = slots[tokens]
    device_copies: dict[bytes, torch.Tensor] = {}

    def to_device(array: npt.NDArray[np.int64]) -> torch.Tensor:
        content = array.tobytes()
        if content not in device_copies:
            device_copies[content] = torch.from_numpy(array).to(bank.device)
        return device_copies[content]

    plan: StepPlan = {}
    with bank.lock:
        for key, cell in bank.cells.items():
            pools = cell.pool[slot, depth]
            present = np.flatnonzero(pools != NO_ROW)
            if not present.size:
                continue
            rows = cell.row[slot[present], depth[present]].astype(np.int64)
            stages = []
            for part in _runs(depth[present], pools[present]):
                pool = bank.pools[int(pools[present[part[0]]])]
                chosen, row = tokens[present[part]], rows[part]
                whole = chosen.size == slots.size
                segments = None
                if (row == row[0]).all():
                    segments = Segments([int(row[0])], [row.size], bank.device)
                elif pool.has_matrices:
                    if (row[1:] < row[:-1]).any():
                        order, whole = np.argsort(row, kind="stable"), False
                        chosen, row = chosen[order], row[order]
                    segments = Segments.of(row, bank.device)
                stages.append(Stage(pool, None if whole else to_device(chosen), to_device(row), segments, key,
                                    int(depth[present[part[0]]]), None if whole else chosen))
            plan[key] = stages
    return plan


def _pairs(slots: Slots, bits: Bits) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """(token, intervention) pairs that act, sorted by intervention, then token."""
    acting = np.where(slots > 0, bits, np.uint32(0))
    union = int(np.bitwise_or.reduce(acting)) if acting.size else 0
    if union == 0:
        return None
    found = [(j, np.flatnonzero(acting & np.uint32(1 << j))) for j in range(union.bit_length()) if union >> j & 1]
    return (np.concatenate([where for _, where in found]),
            np.concatenate([np.full(where.size, j, dtype=np.int64) for j, where in found]))


def _runs(depth: npt.NDArray[np.int64], pools: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
    """Index arrays of equal (depth, pool), by rising depth."""
    code = depth * (int(pools.max()) + 1) + pools
    kinds = np.unique(code)
    if kinds.size == 1:
        return [np.arange(code.size)]
    return [np.flatnonzero(code == kind) for kind in kinds]
