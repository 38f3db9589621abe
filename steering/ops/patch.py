"""Replace an activation by that of another run, whole, in single heads or neurons, or within a subspace (Makelov et al.
2023, arXiv 2311.17030)."""

from typing import Annotated, Self

import torch
from pydantic import Field, StringConstraints, model_validator

from steering.language.errors import InvalidSpec
from steering.language.fields import MAX_INTERVENTIONS, MAX_LIST, Index, Position
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors, check_index

Some = Annotated[list[Index], Field(min_length=1, max_length=MAX_LIST)]


class PatchOptions(Options):
    """Which part is replaced, and where the numbers come from that are put there.

    With a source, a vector or a basis (inline or an artifact's) says the directions within which a token becomes the
    source's; without either all of it does. The tokens that are replaced are those of `scope`, which must be given.
    """

    basis_rank: int | None = Field(default=None, strict=True, ge=1, le=64,
                                   description="Use only the first rows of the basis.")
    heads: Some | None = Field(default=None, description="Replace the output of these heads alone, at head_out.")
    neurons: Some | None = Field(default=None, description="Replace these neurons alone, at mlp_act.")
    source: Annotated[str, StringConstraints(pattern=r"^act-[0-9a-f]{24}$")] | None = Field(
        default=None, description="Captured activations (POST /v1/activations) of the site and the layers: the "
        "activation of another run.")
    text: Index | None = Field(default=None, description="Which text of the source, from 0. Needed where it has "
                               "several.")
    positions: Annotated[list[Position], Field(min_length=1, max_length=MAX_INTERVENTIONS)] | None = Field(
        default=None, description="Which tokens of that text, negative ones from its end. One goes to every token of "
        "the scope. Of several, the first goes to the first of scope.prompt.positions, and so on. Needed where several "
        "tokens were captured.")
    row: Index | None = Field(default=None, description="Which row of the source, in place of text and positions.")

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.heads is not None and self.neurons is not None:
            raise ValueError("heads are a part of head_out and neurons of mlp_act; give one of them")
        chosen = [name for name in ("text", "positions", "row") if getattr(self, name) is not None]
        if chosen and self.source is None:
            raise ValueError(f"{chosen[0]} has no effect without a source")
        if self.row is not None and len(chosen) > 1:
            raise ValueError(f"row says which row it is; {chosen[0]} has no effect beside it")
        return self


class Patch(Operation):
    """vector: h + scale (u - h). subspace with mean u: h + scale B^T B (u - h); what is orthogonal to B stays."""

    name = "patch"
    options = PatchOptions
    kinds = ("vector", "subspace")
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: PatchOptions, place: Place) -> Row:
        if "vector" in tensors:
            share = place.scale * _part(options, place)
            return Row("scale_offset", {"scale": 1 - share, "offset": share * tensors["vector"]})
        basis, source = _subspace(tensors, options)
        return Row("affine", {"up": place.scale * basis, "down": -basis, "bias": basis @ source})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: PatchOptions, place: Place) -> torch.Tensor:
        out = h.clone()
        if "vector" in tensors:
            for n in _part(options, place).nonzero().flatten().tolist():
                out[:, n] += place.scale * (tensors["vector"][n] - h[:, n])
            return out
        basis, source = _subspace(tensors, options)
        for direction in basis:
            out = out + place.scale * torch.outer((source - h) @ direction, direction)
        return out


def _part(options: PatchOptions, place: Place) -> torch.Tensor:
    """1 where the activation is replaced, else 0, `[width]`."""
    if options.basis_rank is not None:
        raise InvalidSpec("a whole activation has no basis", param=("options", "basis_rank"), fix="Leave it out.")
    if options.heads is not None:
        _check_place("heads", "head_out", place)
        heads = torch.tensor(options.heads)
        check_index(heads, place.facts.num_heads, "head", ("options", "heads"))
        part = torch.zeros(place.facts.num_heads, place.facts.head_dim)
        part[heads] = 1.0
        return part.flatten()
    if options.neurons is not None:
        _check_place("neurons", "mlp_act", place)
        neurons = torch.tensor(options.neurons)
        check_index(neurons, place.width, "neuron", ("options", "neurons"))
        part = torch.zeros(place.width)
        part[neurons] = 1.0
        return part
    return torch.ones(place.width)


def _check_place(option: str, site: str, place: Place) -> None:
    if place.site != site:
        raise InvalidSpec(f"{place.site} has no {option}", param=("options", option),
                          fix=f"Patch at {site}, or leave it out.")


def _subspace(tensors: Tensors, options: PatchOptions) -> tuple[torch.Tensor, torch.Tensor]:
    for name in ("heads", "neurons"):
        if getattr(options, name) is not None:
            raise InvalidSpec(f"within given directions {name} have no meaning", param=("options", name),
                              fix="Leave out one of the two.")
    if "mean" not in tensors:
        raise InvalidSpec("patching in a subspace needs the source activation", param=("inline", "mean"))
    rank = len(tensors["basis"])
    if options.basis_rank is not None and options.basis_rank > rank:
        raise InvalidSpec(f"basis_rank {options.basis_rank} is over the rank {rank} of the basis",
                          param=("options", "basis_rank"))
    return tensors["basis"][:options.basis_rank], tensors["mean"]


OPERATION = Patch()
