"""Directional ablation: take a direction or subspace out (Arditi et al. 2024, arXiv 2406.11717)."""

import torch

from steering.language.options import AblateOptions
from steering.ops.base import VECTOR_SITES, Operation, Place, Row, Tensors, register, unit


def basis_of(tensors: Tensors) -> torch.Tensor:
    """Orthonormal rows `[r, width]` of a vector, probe or subspace payload."""
    if "basis" in tensors:
        return tensors["basis"]
    vector = tensors["weight"] if "weight" in tensors else tensors["vector"]
    return unit(vector).unsqueeze(0)


@register
class Ablate(Operation):
    """h - scale B^T B h for orthonormal rows B."""

    name = "ablate"
    kinds = ("vector", "subspace", "probe")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: AblateOptions, place: Place) -> Row:
        basis = basis_of(tensors)
        return Row("affine", {"up": -place.scale * basis, "down": basis, "bias": torch.zeros(len(basis))})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: AblateOptions, place: Place) -> torch.Tensor:
        out = h.clone()
        for direction in basis_of(tensors):
            out = out - place.scale * torch.outer(h @ direction, direction)
        return out
