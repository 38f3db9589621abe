"""Set or bound the coordinate along a direction."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator

from steering.language.fields import Finite
from steering.ops.ablate import basis_of
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors


class ClampOptions(Options):
    """Coordinate along the unit direction, in activation units: set it to `value`, or keep it in [min, max]."""

    alternatives = (("value",), ("min", "max"))

    value: Finite | None = Field(default=None, description="Set the coordinate to this.")
    min: Finite | None = Field(default=None, description="Raise the coordinate to at least this.")
    max: Finite | None = Field(default=None, description="Lower the coordinate to at most this.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if (self.value is None) == (self.min is None and self.max is None):
            raise ValueError("give either value, or min and/or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is larger than max")
        return self


class Clamp(Operation):
    """With c = h . u for the unit direction u: h + scale (clip(c, min, max) - c) u."""

    name = "clamp"
    options = ClampOptions
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


OPERATION = Clamp()
