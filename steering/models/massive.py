"""Massive activations: a few entries of the residual stream, always at the same dims and at the first position, that
are hundreds of times as large as the rest (Sun et al. 2024, arXiv 2402.17762).

They carry no information on the text. The model uses them as a constant bias of its attention, so zeroing one breaks
it, and a mean, a norm or a direction that has them in it is about little else.

The paper counts an entry whose size is over 100 and over a thousand times the median of its token. Small models have
smaller ones, so an entry counts here by its ratio to the median of its token alone, and only where it is there in
nearly every text: a large value that comes and goes with the text is a feature and no constant.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.language.vocabulary import Site

# Times the median of its token.
RATIO = 100.0
# Share of texts, or of tokens, at which a dim must pass it.
OFTEN = 0.9
# Other tokens that are told of, at most.
MOST_TOKENS = 16


@dataclass(frozen=True)
class MassiveLayer:
    """The residual stream after one block.

    first: dim -> mean value at the first position of a text. every: the same over all later tokens, of dims that are
    massive there too. ratio: the largest mean ratio of an entry to the median of its token. first_norm, norm: median
    length of the state at the first position and at later ones. typical: median size of an entry at later positions.
    """

    first: Mapping[int, float]
    every: Mapping[int, float]
    ratio: float
    first_norm: float
    norm: float
    typical: float


@dataclass(frozen=True)
class Massive:
    """What was found in a model; no layers: it has none.

    layers: by the number of the block, those after which there are some. tokens: ids of tokens that carry them at later
    positions as well, with the share of their occurrences at which they did. texts, positions: what was read.
    """

    layers: Mapping[int, MassiveLayer] = field(default_factory=dict)
    tokens: Mapping[int, float] = field(default_factory=dict)
    texts: int = 0
    positions: int = 0

    def at(self, site: Site, layer: int) -> MassiveLayer | None:
        """What is in the residual stream where a site reads or writes it; None at other sites, or if there is nothing.
        """
        if site == "resid_pre":
            return self.layers.get(layer - 1)
        return self.layers.get(layer) if site in ("resid_post", "attn_out", "mlp_out") else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Massive":
        """Raises KeyError, TypeError, ValueError for what `to_json` does not write."""
        layers = {int(n): MassiveLayer(**{**one, "first": _numbers(one["first"]), "every": _numbers(one["every"])})
                  for n, one in given["layers"].items()}
        return cls(layers, _numbers(given["tokens"]), int(given["texts"]), int(given["positions"]))


def find_massive(ids: Sequence[Sequence[int]], states: Iterable[Mapping[int, Tensor]]) -> Massive:
    """Look for them in whole texts.

    Args:
        ids: tokens of each text, two or more.
        states: of each, layer -> the residual stream after that block `[T, d_model]`.
    """
    seen: dict[int, list[_Text]] = {}
    for captured in states:
        for layer, h in captured.items():
            seen.setdefault(layer, []).append(_Text.of(h))
    layers = {layer: found for layer, texts in sorted(seen.items()) if (found := _layer(texts)) is not None}
    return Massive(layers, _tokens(ids, seen, layers), len(ids), sum(map(len, ids)))


@dataclass(frozen=True)
class _Text:
    """One text at one layer: its states `[T, d]`, and each entry's ratio to the median of its token."""

    h: Tensor
    ratio: Tensor

    @classmethod
    def of(cls, h: Tensor) -> "_Text":
        size = h.float().abs()
        return cls(h.float(), size / size.median(dim=-1, keepdim=True).values.clamp_min(1e-30))


def _layer(texts: Sequence[_Text]) -> MassiveLayer | None:
    first = torch.stack([text.ratio[0] for text in texts])
    later = torch.cat([text.ratio[1:] for text in texts])
    at_first = torch.stack([text.h[0] for text in texts])
    at_later = torch.cat([text.h[1:] for text in texts])
    dims = {name: ((ratio > RATIO).double().mean(dim=0) >= OFTEN).nonzero().flatten().tolist()
            for name, ratio in (("first", first), ("every", later))}
    if not any(dims.values()):
        return None
    ratios = [float(ratio[:, dim].mean()) for ratio, name in ((first, "first"), (later, "every")) for dim in dims[name]]
    return MassiveLayer(
        first={dim: float(at_first[:, dim].mean()) for dim in dims["first"]},
        every={dim: float(at_later[:, dim].mean()) for dim in dims["every"]},
        ratio=max(ratios), first_norm=float(at_first.norm(dim=-1).median()),
        norm=float(at_later.norm(dim=-1).median()), typical=float(at_later.abs().median()))


def _tokens(ids: Sequence[Sequence[int]], seen: Mapping[int, Sequence[_Text]], layers: Mapping[int, MassiveLayer]
            ) -> dict[int, float]:
    """Tokens behind the first position that carry a dim of the first one, at the layer where those are most."""
    if not any(one.first for one in layers.values()):
        return {}
    layer = max((n for n, one in layers.items() if one.first), key=lambda n: layers[n].ratio)
    dims = list(layers[layer].first)
    total: Counter[int] = Counter()
    carrying: Counter[int] = Counter()
    for text, states in zip(ids, seen[layer], strict=True):
        massive = (states.ratio[1:, dims] > RATIO).any(dim=-1).tolist()
        for token, carries in zip(text[1:], massive, strict=True):
            total[token] += 1
            carrying[token] += carries
    return {token: carrying[token] / total[token] for token, count in carrying.most_common(MOST_TOKENS) if count}


def _numbers(given: Mapping[Any, Any]) -> dict[int, float]:
    return {int(key): float(value) for key, value in given.items()}
