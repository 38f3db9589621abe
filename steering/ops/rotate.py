"""Turn a token within a plane and keep its norm, as angular steering does (arXiv 2510.26243)."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.language.fields import Switch
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors


class RotateOptions(Options):
    angle: Annotated[float, Field(strict=True, ge=-3600, le=3600)] = Field(
        description="Degrees, from the plane's first axis towards its second.")
    mode: Literal["to", "by"] = Field(default="to", description="to: set the in-plane angle; by: turn by the angle.")
    adaptive: Switch = Field(default=False, description="Only tokens with a positive coordinate on the first axis.")


class Rotate(Operation):
    """mode to: the in-plane angle becomes `angle` (0 degrees = along the first axis); by: turn by scale * angle."""

    name = "rotate"
    options = RotateOptions
    kinds = ("subspace",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: RotateOptions, place: Place) -> Row:
        angle = _radians(tensors, options, place)
        return Row("rotate", {
            "plane": tensors["basis"],
            "cos": torch.tensor(math.cos(angle)),
            "sin": torch.tensor(math.sin(angle)),
            "absolute": torch.tensor(float(options.mode == "to")),
            "adaptive": torch.tensor(float(options.adaptive)),
        })

    def reference(self, h: torch.Tensor, tensors: Tensors, options: RotateOptions, place: Place) -> torch.Tensor:
        angle = _radians(tensors, options, place)
        first, second = tensors["basis"]
        out = []
        for token in h:
            x, y = float(token @ first), float(token @ second)
            if options.adaptive and x <= 0:
                out.append(token)
                continue
            turned = angle if options.mode == "to" else math.atan2(y, x) + angle
            radius = math.hypot(x, y)
            out.append(token - x * first - y * second
                       + radius * (math.cos(turned) * first + math.sin(turned) * second))
        return torch.stack(out)


def _radians(tensors: Tensors, options: RotateOptions, place: Place) -> float:
    if len(tensors["basis"]) != 2:
        raise InvalidSpec(f"rotate needs a plane (2 basis rows), got {len(tensors['basis'])}",
                          param=("inline", "basis"))
    if options.mode == "to":
        if place.scale != 1.0:
            raise InvalidSpec("rotate to an angle takes no strength", param="strength",
                              fix="Change options.angle, or use mode by.")
        return math.radians(options.angle)
    return math.radians(options.angle * place.scale)


OPERATION = Rotate()
