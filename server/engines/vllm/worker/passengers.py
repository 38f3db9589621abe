"""Requests in a worker that are steered, kept or captured, and where they are in the batch of a step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engines.vllm.wire import Key
from steering.programs.touch import Touch

IntArray = npt.NDArray[np.int64]


@dataclass
class Passenger:
    """One request in the engine that is steered, kept or captured.

    slot, base: its program and where its bits begin in the arena; slot 0 for an unsteered one. touch:
    which tokens it acts on. digest: of the program.
    in_graph: its program is carried out by the compiled graph, else by the opaque op.
    keep: where its final hidden states go, from position `keep_from` on. capture: which activations to copy.
    """

    slot: int
    base: int
    touch: Touch | None
    digest: str | None = None
    in_graph: bool = False
    keep: str | None = None
    keep_from: int = 0
    capture: str | None = None
    keys: frozenset[Key] = frozenset()
    positions: IntArray | None = None


@dataclass(frozen=True)
class Stretch:
    """Tokens of one request in the flat batch: rows [start, stop), of which the first is at `position`."""

    passenger: Passenger
    start: int
    stop: int
    position: int

    def rows(self, wanted: IntArray | None, lowest: int = 0) -> tuple[IntArray, IntArray]:
        """(positions, rows) of this stretch that are wanted."""
        positions = np.arange(self.position, self.position + self.stop - self.start)
        chosen = positions >= lowest
        if wanted is not None:
            chosen &= np.isin(positions, wanted)
        return positions[chosen], np.flatnonzero(chosen) + self.start
