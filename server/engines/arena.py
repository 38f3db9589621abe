"""Touch bits of all running requests in one flat array, so that a step gathers them without a loop over requests."""

import numpy as np
import numpy.typing as npt


class Arena:
    """uint32 pairs (on, off) by position, allocated in blocks of powers of two and reused by size."""

    def __init__(self) -> None:
        self.on = np.zeros(1024, dtype=np.uint32)
        self.off = np.zeros(1024, dtype=np.uint32)
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def put(self, on: npt.NDArray[np.uint32], off: npt.NDArray[np.uint32]) -> int:
        """Store the bits of one request and return where they begin."""
        size = _size(len(on))
        stack = self._free.get(size)
        base = stack.pop() if stack else self._extend(size)
        self.on[base:base + len(on)] = on
        self.off[base:base + len(off)] = off
        return base

    def drop(self, base: int, length: int) -> None:
        """Give back what `put` handed out for `length` positions."""
        self._free.setdefault(_size(length), []).append(base)

    @property
    def num_used(self) -> int:
        """Positions that are handed out."""
        return self._end - sum(size * len(stack) for size, stack in self._free.items())

    def _extend(self, size: int) -> int:
        base = self._end
        self._end += size
        while self._end > len(self.on):
            self.on = np.concatenate([self.on, np.zeros_like(self.on)])
            self.off = np.concatenate([self.off, np.zeros_like(self.off)])
        return base


def _size(length: int) -> int:
    return 1 << max(length - 1, 0).bit_length()
