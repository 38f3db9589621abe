"""Directions at a site, split into what its readers see and what not (Makelov et al. 2023, arXiv 2311.17030)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A part of a direction that is shorter than so much of it is rounding.
NOTHING = 1e-4


@dataclass(frozen=True)
class Split:
    """Orthonormal rows `[r, width]` float64: the directions, their visible part and their invisible part, each of which
    may be empty.

    row_norm, null_norm: root mean square length of the two parts of a direction of length 1.
    seen: dimensions of the space that the readers see.
    """

    whole: Tensor
    row: Tensor
    null: Tensor
    row_norm: float
    null_norm: float
    seen: int


def row_space(readers: Sequence[Tensor], tolerance: float) -> Tensor:
    """Orthonormal rows `[k, width]` float64 of what readers `[out, width]` see together.

    Each reader counts by its largest singular value, and a direction is seen whose singular value in all of them
    together is over `tolerance` times the largest one.
    """
    scaled = [reader.double() / _largest(reader.double()) for reader in readers]
    if sum(map(len, scaled)) <= scaled[0].shape[1]:
        _, values, vectors = torch.linalg.svd(torch.cat(scaled), full_matrices=False)
        seen: Tensor = vectors[values > tolerance * values[0]]
        return seen
    squares, columns = torch.linalg.eigh(sum((reader.T @ reader for reader in scaled[1:]), scaled[0].T @ scaled[0]))
    read: Tensor = columns.T[squares > tolerance**2 * squares[-1]]
    return read


def split(directions: Tensor, space: Tensor) -> Split:
    """directions: `[r, width]`, of any length and not zero. space: as `row_space` gives it."""
    whole = orthonormal(directions.double() / torch.linalg.matrix_norm(directions.double(), 2))
    inside = whole @ space.T @ space
    outside = whole - inside
    rank = len(whole) ** 0.5
    return Split(whole, orthonormal(inside), orthonormal(outside), float(inside.norm()) / rank,
                 float(outside.norm()) / rank, len(space))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span. What is nothing beside a row of length 1 is left out."""
    if not len(rows):
        return rows
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = vectors[values > NOTHING]
    return kept


def _largest(matrix: Tensor) -> Tensor:
    """Its largest singular value."""
    small = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    largest: Tensor = torch.linalg.eigvalsh(small)[-1].clamp_min(1e-300).sqrt()
    return largest
