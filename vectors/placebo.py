"""Random artifacts of equal norm or count: what any numbers of that size do."""

from collections.abc import Callable, Mapping

import torch

from steering.artifacts.payload import Kind, Payload
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts

Tensors = Mapping[str, torch.Tensor]
Draw = Callable[[Tensors, int, torch.Generator], dict[str, torch.Tensor]]


def drawn_like(payload: Payload, facts: ModelFacts, site: Site, seed: int) -> Payload:
    """Numbers of the same kind, which is one of `DRAWS`, and of the same layers and shapes: directions of equal norm
    drawn isotropically, bases of equal rank (with the same curve in them, for a manifold), index sets of equal count
    with the values and signs dealt anew."""
    generator = torch.Generator().manual_seed(seed)
    size = {"head_set": facts.num_heads, "expert_set": facts.num_experts}.get(payload.kind, facts.width(site))
    draw = DRAWS[payload.kind]
    return Payload.build(payload.kind, {layer: draw(tensors, size, generator)
                                        for layer, tensors in payload.layers.items()})


def _direction(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`like` `[..., d]` with every row turned to a random direction."""
    drawn = torch.randn(like.shape, generator=generator)
    factor: torch.Tensor = like.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
    return drawn * factor


def _directions(name: str) -> Draw:
    def draw(tensors: Tensors, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {**tensors, name: _direction(tensors[name], generator)}

    return draw


def _basis(tensors: Tensors, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rows = torch.randn(tensors["basis"].shape, generator=generator)
    return {**tensors, "basis": torch.linalg.qr(rows.T)[0].T.contiguous()}


def _affine(tensors: Tensors, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**tensors, "up": _direction(tensors["up"], generator), "down": _direction(tensors["down"], generator)}


def _dealt_dims(tensors: Tensors, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    order = torch.randperm(len(next(iter(tensors.values()))), generator=generator)
    return {name: values[order] for name, values in tensors.items()}


def _index(name: str) -> Draw:
    def draw(tensors: Tensors, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        count = len(tensors[name])
        order = torch.randperm(count, generator=generator)
        dealt = {other: values[order] for other, values in tensors.items() if other != name}
        return {**dealt, name: torch.randperm(size, generator=generator)[:count]}

    return draw


DRAWS: dict[Kind, Draw] = {
    "vector": _directions("vector"), "probe": _directions("weight"), "subspace": _basis, "manifold": _basis,
    "affine": _affine, "diagonal": _dealt_dims, "sae": _directions("decoder"),
    "sign_pattern": _index("dims"), "dim_mask": _index("dims"), "neuron_set": _index("neurons"),
    "head_set": _index("heads"), "expert_set": _index("experts"),
}
