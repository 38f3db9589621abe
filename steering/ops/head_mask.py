"""Scale or shift the outputs of single attention heads, before they are mixed (inference-time intervention, Li et al.
2023, arXiv 2306.03341)."""

from typing import Literal

import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.language.fields import Finite
from steering.ops.base import Operation, Options, Place, Row, Tensors, check_index


class HeadMaskOptions(Options):
    belongs_to = {"scale": ("scale",)}

    mode: Literal["scale", "shift"] = Field(
        default="scale", description="scale: multiply the head's output by `scale`; shift: add strength times the "
        "artifact's shift.")
    scale: Finite = Field(default=0.0, description="Factor for mode scale; 0 switches the head off.")


class HeadMask(Operation):
    """scale: head h becomes (1 + scale (factor - 1)) h; shift: h + scale * shift, shift `[m, head_dim]`."""

    name = "head_mask"
    options = HeadMaskOptions
    kinds = ("head_set",)
    sites = ("head_out",)

    def row(self, tensors: Tensors, options: HeadMaskOptions, place: Place) -> Row:
        heads, shift = self._checked(tensors, options, place)
        scale = torch.ones(place.facts.num_heads, place.facts.head_dim)
        offset = torch.zeros(place.facts.num_heads, place.facts.head_dim)
        if options.mode == "scale":
            scale[heads] = torch.tensor(1 + place.scale * (options.scale - 1))
        else:
            offset[heads] = place.scale * shift
        return Row("scale_offset", {"scale": scale.flatten(), "offset": offset.flatten()})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: HeadMaskOptions, place: Place) -> torch.Tensor:
        heads, shift = self._checked(tensors, options, place)
        out = h.clone()
        for i, head in enumerate(heads.tolist()):
            part = slice(head * place.facts.head_dim, (head + 1) * place.facts.head_dim)
            if options.mode == "scale":
                out[:, part] += place.scale * (options.scale * h[:, part] - h[:, part])
            else:
                out[:, part] += place.scale * shift[i]
        return out

    def _checked(self, tensors: Tensors, options: HeadMaskOptions, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        check_index(tensors["heads"], place.facts.num_heads, "head", ("inline", "heads"))
        shift = tensors.get("shift")
        if options.mode == "shift" and shift is None:
            raise InvalidSpec("mode shift needs the artifact to hold a shift", param=("options", "mode"))
        if shift is not None and shift.shape[1] != place.facts.head_dim:
            raise InvalidSpec(f"shift has width {shift.shape[1]}, head_dim is {place.facts.head_dim}",
                              param=("inline", "shift"))
        return tensors["heads"], torch.zeros(0) if shift is None else shift


OPERATION = HeadMask()
