"""Set or bound the coordinate along a direction."""

import math

import torch

from steering.language.options import ClampOptions
from steering.ops.ablate import basis_of
from steering.ops.base import VECTOR_SITES, Operation, Place, Row, Tensors, register


@register
class Clamp(Operation):
    """With c = h . u for the unit direction u: h + scale (clip(c, min, max) - c) u."""

    name = "clamp"
    kinds = ("vector", "probe")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: ClampOptions, place: Place) -> Row:
        low = options.value if options.value is not None else options.min
        high = options.value if options.value is not None else options.max
        return Row("clamp", {
            "direction": basis_of(tensors)[0],
            "low": torch.tensor(-math.inf if low is None else low),
            "high": torch.tensor(math.inf if high is None else high),
            "amount": torch.tensor(place.scale),
        })

    def reference(self, h: torch.Tensor, tensors: Tensors, options: ClampOptions, place: Place) -> torch.Tensor:
        unit = basis_of(tensors)[0]
        out = []
        for token in h:
            coordinate = float(token @ unit)
            target = coordinate if options.value is None else options.value
            if options.min is not None:
                target = max(target, options.min)
            if options.max is not None:
                target = min(target, options.max)
            out.append(token + place.scale * (target - coordinate) * unit)
        return torch.stack(out)
