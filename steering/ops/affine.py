"""Low-rank affine maps: LoReFT, DiReFT, affine concept editing (methods/20a, 20b)."""

import torch

from steering.ops.base import VECTOR_SITES, Operation, Place, Row, Tensors, register
from steering.spec import AffineOptions


@register
class Affine(Operation):
    """h + scale up^T (down h + bias), with up, down `[r, width]` and bias `[r]`."""

    name = "affine"
    kinds = ("affine",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: AffineOptions, place: Place) -> Row:
        return Row("affine", {"up": place.scale * tensors["up"], "down": tensors["down"], "bias": tensors["bias"]})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: AffineOptions, place: Place) -> torch.Tensor:
        return torch.stack([
            token + place.scale * tensors["up"].T @ (tensors["down"] @ token + tensors["bias"]) for token in h
        ])
