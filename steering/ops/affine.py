"""Affine maps, of low rank or dim by dim: LoReFT, DiReFT, affine concept editing, Linear-AcT (methods/20a, 20b)."""

import torch

from steering.language.options import AffineOptions
from steering.ops.base import VECTOR_SITES, Operation, Place, Row, Tensors, register


@register
class Affine(Operation):
    """affine: h + c up^T (down h + bias), with up, down `[r, width]` and bias `[r]`. diagonal: (1 - c) h + c (scale h +
    shift), with scale, shift `[width]`. c is the strength."""

    name = "affine"
    kinds = ("affine", "diagonal")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: AffineOptions, place: Place) -> Row:
        if "scale" in tensors:
            return Row("scale_offset", {"scale": 1 + place.scale * (tensors["scale"] - 1),
                                        "offset": place.scale * tensors["shift"]})
        return Row("affine", {"up": place.scale * tensors["up"], "down": tensors["down"], "bias": tensors["bias"]})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: AffineOptions, place: Place) -> torch.Tensor:
        if "scale" in tensors:
            return (1 - place.scale) * h + place.scale * (tensors["scale"] * h + tensors["shift"])
        return torch.stack([
            token + place.scale * tensors["up"].T @ (tensors["down"] @ token + tensors["bias"]) for token in h
        ])
