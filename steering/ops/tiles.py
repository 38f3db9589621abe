"""The product of segments as one Triton kernel, for GPUs.

The tokens of every segment are cut into tiles of at most `TILE`, and a table in device memory says of each tile which
row of the pool it uses and which tokens it holds. A program of the kernel reads its line of the table and multiplies
that tile by that row's matrix where it lies; a tile without tokens ends at once. The launch depends on shapes alone and
on no value, so a graph can capture it: with a table of `most_tiles` lines at a fixed address, a step fills the table
and replays.

Products are taken in float32 (`ieee`), not in TF32: a thousandth of a vector's length would be lost there.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tensor cores take no fewer than 16 rows.
TILE, COLUMNS, DEPTH = 16, 64, 32
EMPTY = -1


@triton.jit
def _product(x, matrices, out, table, a, b, x_token, x_depth, row_stride, depth_stride, column_stride,
             TILE: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.load(table + 3 * tile)
    if row >= 0:
        token = tl.load(table + 3 * tile + 1) + tl.arange(0, TILE)
        inside = token < tl.load(table + 3 * tile + 2)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        matrix = matrices + row.to(tl.int64) * row_stride
        total = tl.full((TILE, COLUMNS), 0.0, tl.float32)
        for start in range(0, a, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            left = tl.load(x + token[:, None].to(tl.int64) * x_token + depth[None, :] * x_depth,
                           mask=inside[:, None] & (depth[None, :] < a), other=0.0)
            right = tl.load(matrix + depth[:, None] * depth_stride + column[None, :] * column_stride,
                            mask=(depth[:, None] < a) & (column[None, :] < b), other=0.0)
            total = tl.dot(left, right, acc=total, input_precision="ieee")
        tl.store(out + token[:, None].to(tl.int64) * b + column[None, :], total,
                 mask=inside[:, None] & (column[None, :] < b))


def most_tiles(tokens: int, rows: int) -> int:
    """How many tiles a batch of so many tokens can have at the most, with so many rows in use."""
    return tokens // TILE + min(tokens, rows)


def table_of(runs: Iterable[tuple[int, slice]], lines: int | None = None) -> Tensor:
    """int32 `[lines, 3]` on the host: row, first token and end of every tile; lines left over are empty.

    Args:
        runs: row and tokens of each segment.
        lines: how many the table has; without, as many as there are tiles.
    """
    tiles = [(row, start, min(start + TILE, run.stop)) for row, run in runs
             for start in range(run.start, run.stop, TILE)]
    table = torch.full((len(tiles) if lines is None else lines, 3), EMPTY, dtype=torch.int32)
    table[:len(tiles)] = torch.tensor(tiles, dtype=torch.int32)
    return table


def tiled_product(x: Tensor, matrices: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """`x [n, a]`, sorted by row, times the matrix of each one's row, of `matrices [capacity, a, b]`, all float32 and of
    any strides: `[n, b]`. Tokens of no tile keep what `out` held."""
    a, b = matrices.shape[1:]
    out = x.new_empty(len(x), b) if out is None else out
    _product[len(table), triton.cdiv(b, COLUMNS)](
        x, matrices, out, table, a, b, x.stride(0), x.stride(1), matrices.stride(0), matrices.stride(1),
        matrices.stride(2), TILE=TILE, COLUMNS=COLUMNS, DEPTH=DEPTH, enable_fp_fusion=True)
    return out
