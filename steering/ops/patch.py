"""Replace an activation by a stored one, whole or within a subspace (Makelov et al. 2023, arXiv 2311.17030)."""


import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors


class PatchOptions(Options):
    basis_rank: int | None = Field(default=None, strict=True, ge=1, le=64,
                                   description="Use only the first rows of the basis.")


class Patch(Operation):
    """vector: h + scale (u - h). subspace with mean u: h + scale B^T B (u - h); what is orthogonal to B stays."""

    name = "patch"
    options = PatchOptions
    kinds = ("vector", "subspace")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: PatchOptions, place: Place) -> Row:
        if "vector" in tensors:
            if options.basis_rank is not None:
                raise InvalidSpec("a whole activation has no basis",
                                  param=("options", "basis_rank"), fix="Leave it out.")
            return Row("scale_offset", {"scale": torch.full((place.width,), 1 - place.scale),
                                        "offset": place.scale * tensors["vector"]})
        basis, source = _subspace(tensors, options)
        return Row("affine", {"up": place.scale * basis, "down": -basis, "bias": basis @ source})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: PatchOptions, place: Place) -> torch.Tensor:
        if "vector" in tensors:
            return h + place.scale * (tensors["vector"] - h)
        basis, source = _subspace(tensors, options)
        out = h.clone()
        for direction in basis:
            out = out + place.scale * torch.outer((source - h) @ direction, direction)
        return out


def _subspace(tensors: Tensors, options: PatchOptions) -> tuple[torch.Tensor, torch.Tensor]:
    if "mean" not in tensors:
        raise InvalidSpec("patching in a subspace needs the source activation", param=("inline", "mean"))
    rank = len(tensors["basis"])
    if options.basis_rank is not None and options.basis_rank > rank:
        raise InvalidSpec(f"basis_rank {options.basis_rank} is over the rank {rank} of the basis",
                          param=("options", "basis_rank"))
    return tensors["basis"][:options.basis_rank], tensors["mean"]


OPERATION = Patch()
