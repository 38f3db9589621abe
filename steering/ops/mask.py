"""Masks of residual dims and of MLP neurons: zero them, set them, or scale them (relation-specific neurons, Liu et al.
2025, arXiv 2502.17355)."""

import torch

from steering.language.errors import InvalidSpec
from steering.language.options import MaskOptions
from steering.ops.base import RESIDUAL_SITES, Operation, Place, Row, Tensors, check_index, register


class _IndexMask(Operation):
    """h_j + scale (target_j - h_j) for the listed indices, target_j being 0, the artifact's value, or factor * h_j."""

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


@register
class Mask(_IndexMask):
    name = "mask"
    kinds = ("dim_mask",)
    sites = RESIDUAL_SITES
    index_name = "dims"


@register
class NeuronMask(_IndexMask):
    name = "neuron_mask"
    kinds = ("neuron_set",)
    sites = ("mlp_act",)
    index_name = "neurons"
