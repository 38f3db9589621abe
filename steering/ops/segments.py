"""Tokens grouped by the row they use, and each group multiplied by its matrix where that lies.

A copy of its matrix for every token would take `[n, r, width]`. Sorted tokens need none: the tokens of one row are a
segment, and a product takes the pool as it is. So memory is `[n, width]`, and every matrix is read once, not once a
token. This is how multi-adapter LoRA is served (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

A token's result does not depend on the other segments. It may depend on how long its own one is, by rounding alone.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

# `grouped_mm` looks at every row of the pool up to the last one in use. Where fewer than one in so many of them is in
# use, a loop over those costs less.
SPARSE = 4
# `grouped_mm` needs matrices whose strides are a multiple of 16 bytes, which is so many numbers.
ALIGNED = 4


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of equal rows among those of n sorted tokens.

    rows: the distinct ones, rising. ends: where the run of each ends, so the last is n.
    """

    rows: list[int]
    ends: list[int]
    device: torch.device

    @classmethod
    def of(cls, rows: npt.NDArray[np.int64], device: torch.device) -> "Segments":
        """Of rows `[n]`, n > 0, that do not fall."""
        last = np.append(np.flatnonzero(rows[1:] != rows[:-1]), rows.size - 1)
        return cls(rows[last].tolist(), (last + 1).tolist(), device)

    @property
    def only(self) -> int | None:
        """The row of all tokens, if they have the same one."""
        return self.rows[0] if len(self.rows) == 1 else None

    def runs(self) -> Iterator[tuple[int, slice]]:
        """(row, its tokens)."""
        for row, start, stop in zip(self.rows, [0, *self.ends], self.ends, strict=False):
            yield row, slice(start, stop)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 `[last row + 1]`: where the run of each row of the pool ends; it is empty for those not in use."""
        ends = np.zeros(self.rows[-1] + 1, dtype=np.int32)
        ends[self.rows] = self.ends
        return torch.from_numpy(np.maximum.accumulate(ends)).to(self.device)

    @cached_property
    def table(self) -> Tensor | None:
        """The tiles of the segments, on the device, where Triton's kernel is there for it; see `tiles`."""
        tiles = _tiles() if self.device.type == "cuda" else None
        return None if tiles is None else tiles.table_of(self.runs()).to(self.device)


class Segmented(Mapping[str, Tensor]):
    """Rows of a pool for the n tokens of some segments. `self[name]` is what a kernel reads of one row for every token,
    `[n, ...]`, or `[1, ...]` where all have the same; what has a matrix in every row is asked for by `down` and `up`.

    Args:
        pool: tensors `[capacity, ...]`.
        rows: int64 `[n]`, on the device of the pool.
        segments: given if the tokens are sorted by row.
    """

    def __init__(self, pool: Mapping[str, Tensor], rows: Tensor, segments: Segments | None) -> None:
        self._pool, self._rows, self.segments = pool, rows, segments

    def __getitem__(self, name: str) -> Tensor:
        if self.segments is not None and (only := self.segments.only) is not None:
            return self._pool[name][only:only + 1]
        # Several times faster on a CPU than an index in brackets.
        return self._pool[name].index_select(0, self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pool)

    def __len__(self) -> int:
        return len(self._pool)

    def whole(self, name: str) -> Tensor:
        """The pool's tensor, `[capacity, ...]`, by the rows that `segments` name."""
        return self._pool[name]


def down(h: Tensor, rows: Mapping[str, Tensor], name: str) -> Tensor:
    """matrix h: `[n, r]` for `h [n, width]` and matrices `[r, width]`."""
    if isinstance(rows, Segmented) and rows.segments is not None:
        return product(h, rows.whole(name).transpose(1, 2), rows.segments)
    matrix = rows[name]
    return h @ matrix[0].T if len(matrix) == 1 else torch.einsum("nrd,nd->nr", matrix, h)


def up(inner: Tensor, rows: Mapping[str, Tensor], name: str) -> Tensor:
    """matrix^T inner: `[n, width]` for `inner [n, r]` and matrices `[r, width]`."""
    if isinstance(rows, Segmented) and rows.segments is not None:
        return product(inner, rows.whole(name), rows.segments)
    matrix = rows[name]
    return inner @ matrix[0] if len(matrix) == 1 else torch.einsum("nr,nrd->nd", inner, matrix)


def product(x: Tensor, matrices: Tensor, segments: Segments) -> Tensor:
    """`x [n, a]`, sorted by row, times the matrix of each one's row, of `matrices [capacity, a, b]`: `[n, b]`."""
    if (only := segments.only) is not None:
        return x @ matrices[only]
    if segments.table is not None:
        tiles = _tiles()
        assert tiles is not None
        tiled: Tensor = tiles.tiled_product(x, matrices, segments.table)
        return tiled
    is_sparse = segments.rows[-1] >= SPARSE * len(segments.rows)
    if x.device.type != "cpu" or is_sparse or matrices.stride(0) % ALIGNED or max(matrices.stride()[1:]) % ALIGNED:
        return _looped(x, matrices, segments)
    if x.stride(1) != 1 or x.stride(0) % ALIGNED:
        # With ranks 1 and 2 the rows of `x` are shorter than the strides that `grouped_mm` needs.
        x = F.pad(x, (0, -x.shape[1] % ALIGNED)).contiguous()[:, :x.shape[1]]
    return F.grouped_mm(x, matrices[:segments.rows[-1] + 1], offs=segments.offsets)


@cache
def _tiles() -> ModuleType | None:
    """The module of Triton's kernel, which comes with torch for GPUs alone."""
    return importlib.import_module("steering.ops.tiles") if importlib.util.find_spec("triton") else None


def _looped(x: Tensor, matrices: Tensor, segments: Segments) -> Tensor:
    out = x.new_empty(len(x), matrices.shape[2])
    for row, run in segments.runs():
        torch.mm(x[run], matrices[row], out=out[run])
    return out
