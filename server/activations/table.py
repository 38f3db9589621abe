"""A safetensors file of known shapes that is written row by row, in any order, with nothing held in memory."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vectors.storage_errors import storing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int32": torch.int32}
# As the format writes them.
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
# The header is filled up with spaces, so that the numbers begin at a multiple of so many bytes.
ALIGNED = 8
# What a disk that fails is the reason of.
FAILED = "the activations cannot be stored"


@dataclass(frozen=True)
class Column:
    """One tensor of a table: `[rows, width]`, or `[rows]` where there is no width."""

    dtype: torch.dtype
    rows: int
    width: int | None = None

    @property
    def shape(self) -> list[int]:
        return [self.rows] if self.width is None else [self.rows, self.width]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (1 if self.width is None else self.width)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Table:
    """Methods block, and raise StorageUnavailable and StorageFull. A file that is left half written is the caller's to
    remove."""

    def __init__(self, path: Path, columns: Mapping[str, Column], told: Mapping[str, str]) -> None:
        """Takes the whole space on the disk, so that no row comes upon a full one.

        Args:
            told: metadata of the file, as the format has them.
        """
        header, starts = _header(columns, told)
        self._columns, self._starts = dict(columns), starts
        with storing(FAILED):
            self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(self._file, 0, size_of(columns, told))
                self._write(header, 0)
            except BaseException:
                os.close(self._file)
                raise

    def put(self, name: str, first: int, rows: Tensor) -> None:
        """Write `rows`, `[n, width]` or `[n]`, from row `first` on, in the column's own type of number."""
        column = self._columns[name]
        if list(rows.shape[1:]) != column.shape[1:] or first + len(rows) > column.rows:
            raise ValueError(f"{list(rows.shape)} from {first} on do not fit into {name} of {column.shape}")
        data = rows.to(column.dtype).contiguous().view(torch.uint8).numpy().data
        with storing(FAILED):
            self._write(data.cast("B"), self._starts[name] + first * column.row_bytes)

    def close(self) -> None:
        """What was written is on the disk."""
        with storing(FAILED):
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written


def size_of(columns: Mapping[str, Column], told: Mapping[str, str]) -> int:
    """Bytes of the whole file."""
    return len(_header(columns, told)[0]) + sum(column.nbytes for column in columns.values())


def _header(columns: Mapping[str, Column], told: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where in it each column begins."""
    described: dict[str, object] = {"__metadata__": dict(told)}
    offsets, end = {}, 0
    for name, column in columns.items():
        offsets[name], end = end, end + column.nbytes
        described[name] = {"dtype": NAMES[column.dtype], "shape": column.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % ALIGNED)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + offset for name, offset in offsets.items()}
