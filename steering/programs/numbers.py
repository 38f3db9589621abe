"""The second step of compiling an intervention: its numbers, and the layers at which it acts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved
from steering.language.errors import ArtifactMismatch, InvalidSpec
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.ablate import basis_of
from steering.programs.choices import Chosen
from steering.programs.inline import inline_payload
from steering.programs.layers import explicit_layers, layers_with_numbers


@dataclass(frozen=True)
class Numbers:
    """by_layer: the tensors that act at each layer: those of the layer or, with multi_site, the same at all of them."""

    by_layer: Mapping[int, Mapping[str, torch.Tensor]]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.by_layer)


def numbers_of(item: Resolved, chosen: Chosen, facts: ModelFacts) -> Numbers:
    """
    Raises:
        InvalidSpec, InvalidPayload, LayerOutOfRange, UnsupportedSite, ArtifactMismatch: naming the field.
    """
    wanted = item.intervention.layers
    if wanted is None and item.source is not None:
        wanted = item.source.layers
    if chosen.operation.name == "sparsify" and item.source is None and not chosen.inline:
        payload = _sparsified(item, chosen, facts)
    elif item.captured is not None:
        payload = _patched(item, item.captured, chosen, facts)
    elif item.source is not None:
        payload = item.source.payload
    elif chosen.multi_site:
        # The direction acts at every layer, so the request may give it without naming one.
        payload = inline_payload(chosen.inline, chosen.operation, [0], facts)
    else:
        given = None if wanted is None else explicit_layers(wanted, facts)
        payload = inline_payload(chosen.inline, chosen.operation, given, facts)
    if chosen.multi_site:
        _check_everywhere(facts, chosen.sites)
        own = payload.layers[_source_layer(chosen.options, payload, facts)]
        found = Numbers(dict.fromkeys(range(facts.num_layers), own))
    else:
        found = Numbers({n: payload.layers[n] for n in layers_with_numbers(wanted, payload, facts)})
    for layer, tensors in found.by_layer.items():
        for site in chosen.sites:
            facts.check_site(site, layer, ("options", "multi_site") if chosen.multi_site else "layers")
            _check_width(payload, tensors, facts.width(site), site)
    return found


def _sparsified(item: Resolved, chosen: Chosen, facts: ModelFacts) -> Payload:
    """What a sparsification without numbers of its own has: lengths of columns where its method needs them."""
    site, wanted = chosen.sites[0], item.intervention.layers
    layers = facts.sites.get(site, ()) if wanted is None or wanted == "all" else explicit_layers(wanted, facts)
    if not layers:
        facts.check_site(site, 0, "site")
    norms = item.captured or {}
    # Built without the checks of stored numbers, because here a layer may have none.
    return Payload("sparsity", {layer: {"norm": norms[layer]} if layer in norms else {} for layer in layers})


def _patched(item: Resolved, captured: Mapping[int, torch.Tensor], chosen: Chosen, facts: ModelFacts) -> Payload:
    """What a patch puts in from another run: the whole activation, or its part within given directions."""
    if item.source is not None:
        along = item.source.payload
    elif chosen.inline:
        if "mean" in chosen.inline:
            raise InvalidSpec("the source's activation stands in the place of the mean", param=("inline", "mean"),
                              fix="Leave one of the two out.")
        along = inline_payload(chosen.inline, chosen.operation, list(captured), facts)
    else:
        # Built without the checks of stored numbers, because here a row of zeros is allowed.
        return Payload("vector", {layer: {"vector": row} for layer, row in captured.items()})
    bases = {layer: basis_of(tensors) for layer, tensors in along.layers.items()}
    common = {layer: {"basis": bases[layer], "mean": row} for layer, row in captured.items() if layer in bases}
    if not common:
        raise InvalidSpec("the source has no layer for which there are directions", param="layers",
                          fix=f"Layers with directions: {', '.join(map(str, bases))}; of the source: "
                          f"{', '.join(map(str, captured))}.")
    return Payload("subspace", common)


def _check_everywhere(facts: ModelFacts, sites: Sequence[Site]) -> None:
    for site in sites:
        facts.check_site(site, 0, ("options", "multi_site"))


def _source_layer(options: Any, payload: Payload, facts: ModelFacts) -> int:
    if options.source_layer is not None:
        layer = facts.check_layer(options.source_layer, ("options", "source_layer"))
        if layer not in payload.layers:
            raise InvalidSpec(f"there are no numbers for layer {layer}", param=("options", "source_layer"),
                              fix=f"Layers with numbers: {', '.join(map(str, payload.layers))}.")
        return layer
    if len(payload.layers) > 1:
        raise InvalidSpec("multi_site ablation uses the direction of one layer", param=("options", "source_layer"),
                          fix=f"Name one of {', '.join(map(str, payload.layers))}.")
    return next(iter(payload.layers))


def _check_width(payload: Payload, tensors: Mapping[str, torch.Tensor], width: int, site: Site) -> None:
    for name in ("vector", "weight", "basis", "mean", "up", "down", "scale", "decoder", "norm"):
        if name in tensors and tensors[name].shape[-1] != width:
            raise ArtifactMismatch(f"{payload.kind} has width {tensors[name].shape[-1]}, {site} of the loaded model "
                                   f"has width {width}", param=("inline", name))
    rank = tensors["basis"].shape[0] if "basis" in tensors else tensors["up"].shape[0] if "up" in tensors else 0
    if rank > width:
        raise InvalidSpec(f"rank {rank} is over the width {width}", param="inline")
