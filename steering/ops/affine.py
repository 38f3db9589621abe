"""Affine maps of low rank or of each dim by itself, as in LoReFT and DiReFT (Wu et al. 2024, arXiv 2404.03592), affine
concept editing (Marshall et al. 2024, arXiv 2411.09003) and Linear-AcT (Rodriguez et al. 2025, arXiv 2410.23054)."""

import torch

from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors


class Affine(Operation):
    """affine: h + c up^T (down h + bias), with up, down `[r, width]` and bias `[r]`. diagonal: (1 - c) h + c (scale h +
    shift), with scale, shift `[width]`. c is the strength."""

    name = "affine"
    kinds = ("affine", "diagonal")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: Options, place: Place) -> Row:
        if "scale" in tensors:
            return Row("scale_offset", {"scale": 1 + place.scale * (tensors["scale"] - 1),
                                        "offset": place.scale * tensors["shift"]})
        return Row("affine", {"up": place.scale * tensors["up"], "down": tensors["down"], "bias": tensors["bias"]})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: Options, place: Place) -> torch.Tensor:
        if "scale" in tensors:
            return (1 - place.scale) * h + place.scale * (tensors["scale"] * h + tensors["shift"])
        return torch.stack([
            token + place.scale * tensors["up"].T @ (tensors["down"] @ token + tensors["bias"]) for token in h
        ])


OPERATION = Affine()
