"""Directional ablation: take a direction or subspace out (Arditi et al. 2024, arXiv 2406.11717)."""

from typing import Self

import torch
from pydantic import Field, model_validator

from steering.language.fields import Layer, Switch
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors, unit


def basis_of(tensors: Tensors) -> torch.Tensor:
    """Orthonormal rows `[r, width]` of a vector, probe or subspace payload."""
    if "basis" in tensors:
        return tensors["basis"]
    vector = tensors["weight"] if "weight" in tensors else tensors["vector"]
    return unit(vector).unsqueeze(0)


class AblateOptions(Options):
    multi_site: Switch = Field(default=False, description="Ablate at resid_pre, attn_out and mlp_out of every layer, "
                               "as the refusal-direction method does. Takes the direction of `source_layer`.")
    source_layer: Layer | None = Field(default=None, description="Whose direction to use at every layer.")

    @model_validator(mode="after")
    def _source_is_used(self) -> Self:
        if self.source_layer is not None and not self.multi_site:
            raise ValueError("source_layer has no effect without multi_site")
        return self


class Ablate(Operation):
    """h - scale B^T B h for orthonormal rows B."""

    name = "ablate"
    options = AblateOptions
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


OPERATION = Ablate()
