"""What an engine keeps of the passes that made a completion, so that measuring it need not run them again.

The number of bytes that all completions keep at a time is bounded. A completion that finds no room loses what it has,
and is measured by running its tokens again.
"""

import threading

import torch
from torch import Tensor

from server.engines.data import Kept, Lost


class Room:
    """Bytes that may be kept at a time. Safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        return self._left

    def take(self, nbytes: int) -> bool:
        """Take so many bytes, or say that they are not there."""
        with self._lock:
            if nbytes > self._left:
                return False
            self._left -= nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._left += nbytes


# Steps whose rows may be views of what all completions of these steps keep, before a completion has copies of its own.
MOST_VIEWS = 16


class KeptRows(Kept):
    """The final hidden states of one completion and the last layer's residual stream, from the position `first` on.

    Rows come in order of position. A position that is computed again, because its request was taken out of the batch
    meanwhile, keeps the row that its token was chosen from. The bytes are given back when nobody refers to the rows.
    """

    def __init__(self, first: int, room: Room) -> None:
        self.first = self.stop = first
        self._room = room
        self._taken = 0
        self._lost: Lost | None = None
        self._hidden: list[Tensor] = []
        self._residual: list[Tensor] = []
        self._views = 0

    def __del__(self) -> None:
        self._room.give_back(self._taken)

    @property
    def lost(self) -> Lost | None:
        return self._lost

    def add(self, position: int, hidden: Tensor, residual: Tensor) -> None:
        """Rows `[n, d_model]` of the positions from `position` on, which may be views of the rows of several."""
        if self._lost is not None:
            return
        if position != self.stop:
            self.lose("incomplete")
            return
        nbytes = hidden.nbytes + residual.nbytes
        if not self._room.take(nbytes):
            self.lose("memory")
            return
        self._taken += nbytes
        self._hidden.append(hidden)
        self._residual.append(residual)
        self._views += 1
        self.stop += len(hidden)
        if self._views == MOST_VIEWS:
            self.settle()

    def settle(self) -> None:
        """Copy what are views, because they hold the rows of others as well. To be called at the end of a completion;
        copying every row as it comes would take a multiple of the time."""
        if self._views:
            for rows in (self._hidden, self._residual):
                rows[-self._views:] = [torch.cat(rows[-self._views:])]
            self._views = 0

    def lose(self, why: Lost) -> None:
        """Let go of the rows, and keep no more of them."""
        self._lost = why
        self._hidden, self._residual, self._views = [], [], 0
        self._room.give_back(self._taken)
        self._taken = 0

    def rows(self, count: int) -> tuple[Tensor, Tensor] | None:
        """The first `count` rows, `[count, d_model]` hidden and residual, or None where they are not all there."""
        if self._lost is not None or self.stop - self.first < count:
            return None
        return torch.cat(self._hidden)[:count], torch.cat(self._residual)[:count]
