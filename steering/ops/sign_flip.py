"""Flip signs of single dimensions (bag of dims, Nalagatla 2026, arXiv 2606.12629). The paper gives no rule for `away`
and `toward`; the one here is ours."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.language.fields import MAX_LIST, Index
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors, check_index

_MODES = ("away", "toward", "flip")


class SignFlipOptions(Options):
    mode: Literal["away", "toward", "flip"] = Field(
        default="away", description="away: flip dims whose sign agrees with the pattern; toward: set the pattern's "
        "sign; flip: flip every listed dim.")
    fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(
        default=1.0, description="Share of the pattern's dims that is acted on, largest magnitude first, per token.")
    exclude: list[Index] = Field(default=[], max_length=MAX_LIST, description="Dims never touched.")


class SignFlip(Operation):
    """Of the pattern's dims, the share `fraction` with the largest magnitude in the token is considered.

    away: those whose sign agrees with the polarity become (1 - 2 scale) h_j; toward: those whose sign disagrees; flip:
    all of them.
    """

    name = "sign_flip"
    options = SignFlipOptions
    kinds = ("sign_pattern",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: SignFlipOptions, place: Place) -> Row:
        dims, polarity = _pattern(tensors, options, place)
        dense = torch.zeros(place.width)
        dense[dims] = polarity
        return Row("sign_flip", {
            "polarity": dense,
            "mode": torch.tensor(float(_MODES.index(options.mode))),
            "count": torch.tensor(float(_count(options, dims))),
            "amount": torch.tensor(place.scale),
        })

    def reference(self, h: torch.Tensor, tensors: Tensors, options: SignFlipOptions, place: Place) -> torch.Tensor:
        dims, polarity = _pattern(tensors, options, place)
        count = _count(options, dims)
        out = h.clone()
        for token in out:
            signs = dict(zip(dims.tolist(), polarity.tolist(), strict=True))
            largest = sorted(signs, key=lambda dim: (-abs(float(token[dim])), dim))
            for dim, sign in ((dim, signs[dim]) for dim in largest[:count]):
                value = float(token[dim])
                agrees = value * sign > 0
                disagrees = value * sign < 0
                if options.mode == "flip" or (options.mode == "away" and agrees) or (
                        options.mode == "toward" and disagrees):
                    token[dim] = (1 - 2 * place.scale) * value
        return out


def _count(options: SignFlipOptions, dims: torch.Tensor) -> int:
    # 0.07 of 100 dims is 7, though the product of the floats is a little more.
    return max(1, math.ceil(options.fraction * len(dims) - 1e-6))


def _pattern(tensors: Tensors, options: SignFlipOptions, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    check_index(tensors["dims"], place.width, "dim", ("inline", "dims"))
    keep = ~torch.isin(tensors["dims"], torch.tensor(options.exclude, dtype=torch.int64))
    if not bool(keep.any()):
        raise InvalidSpec("every dim of the pattern is excluded", param=("options", "exclude"))
    return tensors["dims"][keep], tensors["polarity"][keep].float()


OPERATION = SignFlip()
