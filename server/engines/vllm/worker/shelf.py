"""Rows of activations that a worker keeps until the engine asks for them, by tag.

Those of measuring passes stay until they are asked for, because the engine waits for them and runs few at a time. Those
of completions that may be measured later have a bound in bytes, all together: beyond it the oldest are dropped, and the
engine is told when it asks.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from server.engines.vllm.wire import PASS, Key

IntArray = npt.NDArray[np.int64]


@dataclass
class Kept:
    """Rows of one activation by position; a position that is computed again keeps its newest row."""

    parts: list[tuple[IntArray, torch.Tensor]] = field(default_factory=list)

    def joined(self) -> tuple[IntArray, torch.Tensor]:
        """Positions, rising and without repeats, and their rows."""
        positions = np.concatenate([where for where, _ in self.parts])
        rows = torch.cat([part for _, part in self.parts])
        # The last of equal positions wins: unique keeps the first of the reversed order.
        found, index = np.unique(positions[::-1], return_index=True)
        return found, rows[torch.from_numpy(len(positions) - 1 - index)]


class Shelf:
    """What is kept. `most`: bytes of completions that may be measured later.

    Attributes:
        hidden: final hidden states by tag. captured: other activations by tag and place. nbytes: those that count
        towards the bound.
    """

    def __init__(self, most: int) -> None:
        self.hidden: dict[str, Kept] = {}
        self.captured: dict[str, dict[Key, Kept]] = {}
        self._most = most
        # Completions that lost their rows for want of room, the latest of them.
        self.dropped: deque[str] = deque(maxlen=1024)
        self._bytes: OrderedDict[str, int] = OrderedDict()
        self.nbytes = 0

    def hold(self, tag: str) -> None:
        """Rows under this tag, of a completion that begins, count towards the bound."""
        self.forget(tag)
        self._bytes[tag] = 0

    def keep(self, tag: str, positions: IntArray, rows: torch.Tensor) -> None:
        """Final hidden states `[n, d_model]`, which nobody else refers to."""
        if self._has_room(tag, rows):
            self.hidden.setdefault(tag, Kept()).parts.append((positions, rows))

    def capture(self, tag: str, key: Key, positions: IntArray, rows: torch.Tensor) -> None:
        if self._has_room(tag, rows):
            self.captured.setdefault(tag, {}).setdefault(key, Kept()).parts.append((positions, rows))

    def span(self, tag: str, first: int, count: int, key: Key | None = None) -> torch.Tensor | None:
        """Rows `[count, width]` of the positions from `first` on, None where they are not all there."""
        kept = self.hidden.get(tag) if key is None else self.captured.get(tag, {}).get(key)
        if kept is None:
            return None
        positions, rows = kept.joined()
        start = int(np.searchsorted(positions, first))
        if not np.array_equal(positions[start:start + count], np.arange(first, first + count)):
            return None
        return rows[start:start + count]

    def forget(self, tag: str) -> None:
        self.hidden.pop(tag, None)
        self.captured.pop(tag, None)
        self.nbytes -= self._bytes.pop(tag, 0)

    def _has_room(self, tag: str, rows: torch.Tensor) -> bool:
        if tag not in self._bytes:
            return tag.startswith(PASS)
        self._bytes[tag] += rows.nbytes
        self.nbytes += rows.nbytes
        while self.nbytes > self._most:
            self.dropped.append(oldest := next(iter(self._bytes)))
            self.forget(oldest)
        return tag in self._bytes
