"""Zero, set or scale single dims of the residual stream."""

from typing import Literal

import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.language.fields import Finite
from steering.ops.base import RESIDUAL_SITES, Operation, Options, Place, Row, Tensors, check_index


class MaskOptions(Options):
    belongs_to = {"scale": ("scale",)}

    mode: Literal["zero", "set", "scale"] = Field(
        default="zero", description="zero; set: to the artifact's values; scale: multiply by `scale`.")
    scale: Finite = Field(default=0.0, description="Factor for mode scale.")


class IndexMask(Operation):
    """h_j + scale (target_j - h_j) for the listed indices, target_j being 0, the artifact's value, or factor * h_j."""

    options = MaskOptions
    index_name: str

    def row(self, tensors: Tensors, options: MaskOptions, place: Place) -> Row:
        index = tensors[self.index_name]
        check_index(index, place.width, self.index_name.rstrip("s"), ("inline", self.index_name))
        scale, offset = torch.ones(place.width), torch.zeros(place.width)
        factor = options.scale if options.mode == "scale" else 0.0
        scale[index] = torch.tensor(1 + place.scale * (factor - 1))
        if options.mode == "set":
            offset[index] = place.scale * self._value(tensors)
        return Row("scale_offset", {"scale": scale, "offset": offset})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: MaskOptions, place: Place) -> torch.Tensor:
        out = h.clone()
        for i, j in enumerate(tensors[self.index_name].tolist()):
            if options.mode == "zero":
                target = torch.zeros(len(h))
            elif options.mode == "set":
                target = self._value(tensors)[i].expand(len(h))
            else:
                target = options.scale * h[:, j]
            out[:, j] = h[:, j] + place.scale * (target - h[:, j])
        return out

    def _value(self, tensors: Tensors) -> torch.Tensor:
        if "value" not in tensors:
            raise InvalidSpec("mode set needs the artifact to hold values", param=("options", "mode"))
        return tensors["value"]


class Mask(IndexMask):
    name = "mask"
    kinds = ("dim_mask",)
    sites = RESIDUAL_SITES
    index_name = "dims"


OPERATION = Mask()
