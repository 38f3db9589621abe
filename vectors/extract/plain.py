"""Activations without the massive entries of the model, which are the same in every text and larger than all the rest.

A mean, a norm or a direction that has them in it is about them. They say nothing of the text, and steering along them
breaks the model, so they are zero in what directions, probes, signs and norms are made from.
"""

from collections.abc import Mapping, Sequence

import torch

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts


def massive_dims(facts: ModelFacts, site: Site, layer: int) -> list[int]:
    """Dims of a site of the residual stream that are massive there, at the first position or at all; none at others,
    or where nobody looked."""
    found = None if facts.massive is None else facts.massive.at(site, layer)
    return [] if found is None else sorted({*found.first, *found.every})


def left_out(facts: ModelFacts, site: Site, layers: Sequence[int]) -> dict[str, list[int]]:
    """For reports: the massive dims of each layer that has some."""
    return {str(layer): dims for layer in layers if (dims := massive_dims(facts, site, layer))}


def plain(found: Mapping[int, torch.Tensor], facts: ModelFacts, site: Site) -> Mapping[int, torch.Tensor]:
    """Activations `[T, width]` by layer, massive dims set to zero."""
    cleaned = dict(found)
    for layer, h in found.items():
        dims = massive_dims(facts, site, layer)
        if dims:
            cleaned[layer] = h.clone()
            cleaned[layer][:, dims] = 0.0
    return cleaned
