"""Activations that a dictionary is trained on: in a file, so that memory holds one batch."""

import math
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vectors.scratch import ScratchFolder

CHUNK = 4096


class ActivationRows:
    """`[count, width]` float32, at most `most` of them, in a file that goes with the block."""

    def __init__(self, most: int, width: int) -> None:
        """Raises StorageFull: there is no room for so many."""
        self.count, self.width = 0, width
        self._folder = ScratchFolder()
        self._data: npt.NDArray[np.float32] = self._folder.array("rows", np.float32, (most, width))
        self._total, self._squares = torch.zeros(width, dtype=torch.float64), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        del self._data
        self._folder.cleanup()

    @property
    def is_full(self) -> bool:
        return self.count == len(self._data)

    def add(self, h: Tensor) -> None:
        """`h [n, width]`, as much of it as there is room for."""
        h = h[:len(self._data) - self.count]
        self._data[self.count:self.count + len(h)] = h.float().numpy()
        self.count += len(h)
        self._total += h.double().sum(dim=0)
        self._squares += float(h.double().square().sum())

    @property
    def mean(self) -> Tensor:
        """`[width]` float64."""
        return self._total / self.count

    @property
    def scale(self) -> float:
        """What the distance from the mean is divided by to have the root of the width as its mean square root."""
        spread = self._squares / self.count - float(self.mean.square().sum())
        return math.sqrt(max(spread, 1e-30) / self.width)

    def drawn(self, size: int, seed: int, step: int) -> Tensor:
        """`[size]`, rising: which rows a step sees, the same for equal seeds and steps, whatever came before."""
        generator = torch.Generator().manual_seed((seed % 2**31 << 32) + step)
        return torch.randint(self.count, (size,), generator=generator).sort().values

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        """`[size, width]`: the drawn rows, round 0 and scaled."""
        found = torch.from_numpy(self._data[self.drawn(size, seed, step).numpy()])
        return (found - self.mean.float()) / self.scale

    def chunks(self) -> Iterator[Tensor]:
        """All rows as they are, `[n, width]` at a time."""
        for start in range(0, self.count, CHUNK):
            yield torch.from_numpy(np.array(self._data[start:min(start + CHUNK, self.count)]))

    def taken(self, found: Iterator[tuple[int, Mapping[int, Tensor]]], layer: int) -> Self:
        """With the activations of texts, the first token of each left out, until it is full."""
        for _, captured in found:
            self.add(captured[layer][1:])
            if self.is_full:
                break
        return self
