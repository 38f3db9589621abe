"""Rows of numbers on the device, shared by content and counted."""

import hashlib

import torch

from steering.ops.base import Row
from steering.ops.kernel import has_matrices, rank_axes
from steering.residency.shared import SharedRows

Signature = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]

def pad_rank(row: Row) -> Row:
    """Ranks rounded up to a power of two with zero rows, which do nothing, so that few pools serve all ranks."""
    ranked = rank_axes(row.kernel)
    if not ranked:
        return row
    name, axis = next(iter(ranked.items()))
    rank = row.tensors[name].shape[axis]
    target = 1 << (rank - 1).bit_length()
    if target == rank:
        return row
    return Row(row.kernel, {name: _padded(tensor, ranked[name], target) if name in ranked else tensor
                            for name, tensor in row.tensors.items()})


def _padded(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def signature(row: Row) -> Signature:
    return row.kernel, tuple(sorted((name, tuple(t.shape)) for name, t in row.tensors.items()))


class Pool:
    """All resident rows of one kernel and shape: tensors `[capacity, *shape]`, float32, growing by doubling.

    Equal rows are stored once: 50 specs that use one vector at one strength share its row.
    """

    def __init__(self, number: int, row: Row, device: torch.device) -> None:
        self.number = number
        self.kernel = row.kernel
        self.device = device
        self.tensors = {name: torch.zeros(1, *t.shape, device=device) for name, t in row.tensors.items()}
        self.has_matrices = has_matrices(row.kernel)
        self._shared = SharedRows([0])

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def num_rows(self) -> int:
        return self._shared.num_used

    @property
    def num_free(self) -> int:
        """Rows that fit before it grows."""
        return self._shared.num_free

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def acquire(self, row: Row) -> int:
        """Index of the row, uploaded if it is not there yet."""
        def write(index: int) -> None:
            for name, tensor in row.tensors.items():
                self.tensors[name][index].copy_(tensor)

        digest = _digest(row)
        while (index := self._shared.acquire(digest, write)) is None:
            self._grow()
        return index

    def release(self, index: int) -> None:
        self._shared.release(index)

    def _grow(self) -> None:
        old = self.capacity
        self.tensors = {name: torch.cat([tensor, torch.zeros_like(tensor)]) for name, tensor in self.tensors.items()}
        self._shared.grow(range(2 * old - 1, old - 1, -1))


def _digest(row: Row) -> bytes:
    state = hashlib.sha256()
    for name, tensor in sorted(row.tensors.items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.digest()
