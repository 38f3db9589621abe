"""Relative steps of running completions, summed up as they are taken, without a loop over tokens or requests."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from server.engines.data import Touched
from steering.acting.containment import StepLimit
from steering.language.fields import MAX_INTERVENTIONS

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """Of one completion, per intervention: largest step, sum and number of steps, and how many were clipped."""

    largest: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    count: Indices
    clipped: Indices

    def add_to(self, touched: list[Touched]) -> list[Touched]:
        """The counts with the steps beside them."""
        return [replace(item, largest_step=float(self.largest[j]), mean_step=float(self.total[j] / self.count[j]),
                        clipped=int(self.clipped[j])) if self.count[j] else item for j, item in enumerate(touched)]

    def strongest(self) -> int | None:
        """The intervention with the largest step."""
        return int(self.largest.argmax()) if self.count.any() else None


class MeasuredTable:
    """One row per running completion; rows are handed out elsewhere."""

    def __init__(self, rows: int) -> None:
        self._largest = np.zeros((rows, MAX_INTERVENTIONS))
        self._total = np.zeros((rows, MAX_INTERVENTIONS))
        self._count = np.zeros((rows, MAX_INTERVENTIONS), dtype=np.int64)
        self._clipped = np.zeros((rows, MAX_INTERVENTIONS), dtype=np.int64)

    def grow(self) -> None:
        """Twice the rows."""
        for name in ("_largest", "_total", "_count", "_clipped"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))

    def reset(self, row: int) -> None:
        for table in (self._largest, self._total, self._count, self._clipped):
            table[row] = 0

    def add(self, rows: Indices, interventions: Indices, steps: npt.NDArray[np.float32], limit: StepLimit) -> None:
        """Steps `[m]` with the row and the intervention of each. Those that are not finite are no steps."""
        fine = np.isfinite(steps)
        where = rows[fine], interventions[fine]
        values = steps[fine].astype(np.float64)
        np.maximum.at(self._largest, where, values)
        np.add.at(self._total, where, values)
        np.add.at(self._count, where, 1)
        if limit.action == "clip":
            np.add.at(self._clipped, where, values > limit.largest)

    def of(self, row: int) -> Measured:
        return Measured(self._largest[row].copy(), self._total[row].copy(), self._count[row].copy(),
                        self._clipped[row].copy())
