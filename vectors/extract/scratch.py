"""Numbers of all texts on disk, so that memory holds one layer at a time."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from vectors.scratch import ScratchFolder


class Scratch:
    """One row of float32 per text and layer, `[num_layers, num_texts, width]`, in a file that goes with the block."""

    def __init__(self, layers: Sequence[int], num_texts: int, width: int) -> None:
        self.layers, self.width = tuple(layers), width
        self._folder = ScratchFolder()
        # Layer first: fitting reads one layer of all texts at once.
        self._data: npt.NDArray[np.float32] = self._folder.array(
            "rows", np.float32, (len(self.layers), num_texts, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        del self._data
        self._folder.cleanup()

    def put(self, layer: int, text: int, row: torch.Tensor) -> None:
        self._data[self.layers.index(layer), text] = row.float().numpy()

    def layer(self, layer: int) -> npt.NDArray[np.float32]:
        """All rows of one layer, `[num_texts, width]`, as they lie on the disk."""
        rows: npt.NDArray[np.float32] = self._data[self.layers.index(layer)]
        return rows

    def rows(self, layer: int, texts: Sequence[int], units: slice = slice(None)) -> torch.Tensor:
        """`[len(texts), width]` float64 of one layer, `units` of the width."""
        return torch.from_numpy(self._data[self.layers.index(layer)][list(texts), units]).double()
