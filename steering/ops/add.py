"""Add a vector, as activation addition (Turner et al. 2023, arXiv 2308.10248), CAA (Rimsky et al. 2024, arXiv
2312.06681) and function vectors (Todd et al. 2024, arXiv 2310.15213) do."""

from typing import Self

import torch
from pydantic import Field, model_validator

from steering.language.fields import Switch
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors, unit


class AddOptions(Options):
    norm_match: Switch = Field(default=False, description="Scale the vector to strength times the token's own norm.")
    preserve_norm: Switch = Field(default=False, description="Give every touched token its norm back after adding.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.norm_match and self.preserve_norm:
            raise ValueError("norm_match and preserve_norm exclude each other")
        return self


class Add(Operation):
    """h + scale v; with norm_match h + scale |h| v / |v|; with preserve_norm the sum is given |h| back."""

    name = "add"
    options = AddOptions
    kinds = ("vector", "probe")
    sites = VECTOR_SITES
    adds_direction = True

    def direction(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight"] if "weight" in tensors else tensors["vector"]

    def row(self, tensors: Tensors, options: AddOptions, place: Place) -> Row:
        vector = self.direction(tensors)
        if options.norm_match:
            return Row("add_norm_match", {"delta": place.scale * unit(vector)})
        name = "add_preserve_norm" if options.preserve_norm else "add"
        return Row(name, {"delta": place.scale * vector})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: AddOptions, place: Place) -> torch.Tensor:
        vector = self.direction(tensors)
        out = []
        for token in h:
            if options.norm_match:
                out.append(token + place.scale * token.norm() * vector / vector.norm())
            elif options.preserve_norm:
                moved = token + place.scale * vector
                out.append(moved * token.norm() / moved.norm())
            else:
                out.append(token + place.scale * vector)
        return torch.stack(out)


OPERATION = Add()
