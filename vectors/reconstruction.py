"""Whether an SAE is of the place in the model that it is said to be of, and read by the right conventions.

An SAE under a wrong convention, or at a wrong layer, still gives numbers. So some texts run through the model, and the
SAE must explain most of the variance of their activations, and no less of it than under another convention or at
another place.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steering.artifacts.dictionary import Dictionary
from steering.artifacts.payload import INPUT_NORMS, Payload
from steering.language.errors import InvalidPayload
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts

# Tokens that are looked at; an SAE with a million features is still checked within a minute.
MOST_TOKENS = 384
# Another convention is taken for the right one where it leaves this share of what the stated one leaves unexplained.
CLEARLY_LESS = 0.75
# What is left unexplained by rounding alone.
ROUNDING = 1e-4
TEXTS = (
    "The committee will meet again on Thursday to decide whether the bridge should be repaired or replaced.",
    "She opened the window, listened to the rain for a while, and went back to her letter.",
    "To make the sauce, melt the butter in a pan, add the flour, and stir until it is golden.",
    "In 1869 the two railways met in the desert, and a journey of months became one of a week.",
    "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n",
    "I would like to cancel my order, because the shoes that you sent me are too small.",
    "Most birds that live near the coast feed on small fish, which they catch by diving.",
    "If the price rises by a tenth and the income stays the same, fewer people will buy it.",
    "Le train de Paris arrive à midi, mais celui de Lyon a encore du retard ce matin.",
    "Question: what is the capital of Norway? Answer: the capital of Norway is Oslo.",
    "The patient was given two tablets a day and felt much better after the first week.",
    "Once upon a time there was a king who had three daughters and no idea what to do with them.",
)


class WrongConvention(InvalidPayload):
    """An SAE does not reconstruct the activations that it is said to be of. `fits`: what would, if that is known."""

    code = "wrong_convention"


class Captures(Protocol):
    """As much of `vectors.extract.subject.Subject` as is used."""

    @property
    def facts(self) -> ModelFacts: ...

    def encode(self, prompt: str) -> tuple[int, ...]: ...

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None) -> Sequence[Mapping[int, Tensor]]: ...


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs some activations.

    explained: share of their variance round their mean. l0: features that are active on a token, on the average.
    dead: share of the features that are active on none of these few tokens.
    """

    explained: float
    l0: float
    dead: float


def check_reconstruction(payload: Payload, site: Site, subject: Captures, texts: Sequence[str] | None,
                         least: float) -> dict[str, Any]:
    """What the card says of it.

    Raises:
        WrongConvention: it explains less than the share `least`, or clearly less than it would otherwise.
        TrimtabError: as the subject.
    """
    facts = subject.facts
    tokens = [subject.encode(text)[:facts.context_length] for text in texts or TEXTS]
    tokens = [ids for ids in tokens if len(ids) > 1]
    if not tokens:
        raise InvalidPayload("the texts have no token but the first, which is left out",
                             param=("metadata", "sae", "texts"))
    found: dict[str, Any] = {}
    for layer, numbers in payload.layers.items():
        facts.check_layer(layer, ("metadata", "layers"))
        facts.check_site(site, layer, ("metadata", "layers"))
        held = _activations(subject, tokens, site, layer)
        h = held[site, layer]
        stated = fit(numbers, h)
        _check(stated, numbers, held, (site, layer), least)
        found[str(layer)] = {"explained": round(stated.explained, 4), "l0": round(stated.l0, 1),
                             "dead_on_these": round(stated.dead, 4), "tokens": len(h)}
    return {"texts": "given" if texts else "the server's own", "layers": found}


def fit(numbers: Mapping[str, Tensor], h: Tensor) -> Fit:
    """Of `h [T, width]`."""
    dictionary = Dictionary(numbers)
    active = dictionary.features(h) > 0
    return Fit(explained(h, dictionary.reconstruction(h)), float(active.sum(dim=1).float().mean()),
               float((~active.any(dim=0)).float().mean()))


def explained(h: Tensor, reconstruction: Tensor) -> float:
    """1 - the squared error over the squared distance from the mean, in double precision. Below 0 where the mean alone
    would do better."""
    h = h.double()
    total = float((h - h.mean(dim=0)).square().sum())
    left = float((h - reconstruction.double()).square().sum())
    return 1 - left / total if total > 0 and math.isfinite(left) else -math.inf


def _activations(subject: Captures, tokens: Sequence[Sequence[int]], site: Site, layer: int
                 ) -> dict[tuple[Site, int], Tensor]:
    """At the place, and wherever else an SAE of this width could be of: the same layer's other sites, and the same site
    a layer further up and down. The first token of every text is left out, as many models use it as a sink."""
    facts = subject.facts
    width = facts.width(site)
    places: list[tuple[Site, int]] = [(site, layer)]
    places += [(other, layer) for other in facts.sites if other not in (site, "router")
               and layer in facts.sites[other] and facts.width(other) == width]
    places += [(site, near) for near in (layer - 1, layer + 1) if near in facts.sites[site]]
    held: dict[tuple[Site, int], Tensor] = {}
    for other in dict.fromkeys(place for place, _ in places):
        layers = sorted(n for place, n in places if place == other)
        read = subject.capture(tokens, other, layers, None)
        for n in layers:
            held[other, n] = torch.cat([one[n][1:] for one in read])[:MOST_TOKENS].float()
    return held


def _check(stated: Fit, numbers: Mapping[str, Tensor], held: Mapping[tuple[Site, int], Tensor],
           place: tuple[Site, int], least: float) -> None:
    best, what = -math.inf, ""
    for named, share in _others(numbers, held, place):
        if share > best:
            best, what = share, named
    left = 1 - stated.explained
    clearly = left > ROUNDING and 1 - best < CLEARLY_LESS * left
    if stated.explained >= least and not clearly:
        return
    site, layer = place
    said = f"the SAE explains {_share(stated.explained)} of the variance at {site} of layer {layer}"
    if best >= least and clearly:
        raise WrongConvention(f"{said}; {what} it would explain {_share(best)}", param=("metadata", "sae"),
                              fix=_fix(what))
    raise WrongConvention(
        f"{said}, and {_share(least)} is the least that is taken. The best of the other conventions and places that "
        f"were tried, {what}, gives {_share(best)}", param=("metadata", "sae"),
        fix="Check the model, the layer, the site and the conventions; give texts like those it was trained on "
        '("sae": {"texts": [...]}), or say how little it may explain ("least_explained").')


def _others(numbers: Mapping[str, Tensor], held: Mapping[tuple[Site, int], Tensor], place: tuple[Site, int]
            ) -> Iterator[tuple[str, float]]:
    """Other conventions at the place, and the stated ones at other places, with the share that each explains."""
    h = held[place]
    for named, changed in conventions(numbers, h):
        yield named, explained(h, Dictionary(changed).reconstruction(h))
    for (site, layer), other in held.items():
        if (site, layer) != place:
            yield f"at {site} of layer {layer}", explained(other, Dictionary(numbers).reconstruction(other))


def conventions(numbers: Mapping[str, Tensor], h: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same numbers as they would be under another convention, with its name."""
    length = float(h.norm(dim=1).mean()) / math.sqrt(h.shape[1])
    scales = {"": 1.0, "with activations scaled to the root of the width": 1 / max(length, 1e-30),
              "with that scale taken away": length, "with activations divided by the root of the width":
              1 / math.sqrt(h.shape[1]), "with activations multiplied by the root of the width": math.sqrt(h.shape[1])}
    shifts = {"": 0, "with the decoder's bias subtracted": -1, "without subtracting the decoder's bias": 1}
    shift_of = numbers["encoder"].double() @ numbers["decoder_bias"].double()
    for scaled, scale in scales.items():
        for shifted, sign in shifts.items():
            if scaled or shifted:
                yield " and ".join(filter(None, (scaled, shifted))), {
                    **numbers, "encoder": numbers["encoder"] * scale, "decoder": numbers["decoder"] / scale,
                    "decoder_bias": numbers["decoder_bias"] / scale,
                    "encoder_bias": (numbers["encoder_bias"].double() + sign * shift_of).float()}
    stated = int(numbers["input_norm"]) if "input_norm" in numbers else 0
    for name, number in INPUT_NORMS.items():
        if number != stated:
            yield f'with the input_norm "{name}"', {**numbers, "input_norm": torch.tensor(number)}
    encoder, decoder = numbers["encoder"], numbers["decoder"]
    if encoder.shape[0] == encoder.shape[1]:
        yield "with the encoder transposed", {**numbers, "encoder": encoder.T}
        yield "with the decoder transposed", {**numbers, "decoder": decoder.T}
        yield "with both matrices transposed", {**numbers, "encoder": encoder.T, "decoder": decoder.T}


def _fix(what: str) -> str:
    for mark, field in (("with the decoder's bias subtracted", '"subtract_decoder_bias": true'),
                        ("without subtracting", '"subtract_decoder_bias": false')):
        if what.startswith(mark):
            return f'Import it with "sae": {{{field}}}.'
    if what.startswith("at "):
        return "Import it with that site and layer."
    if "scale" in what or "root of the width" in what:
        return 'Import it with "sae": {"scale": ...}, the factor that its makers give.'
    return 'Import it with the convention that fits, in "sae" of the metadata.'


def _share(value: float) -> str:
    return "nothing" if value <= 0 else f"{value:.1%}"
