"""What an SAE finds in a text: which features are active at which tokens, and how much of the activations they explain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.artifacts.dictionary import MOST_HELD, Dictionary
from vectors.reconstruction import explained


@dataclass(frozen=True)
class Found:
    """Of one token: the features that are asked for, and the strongest ones, strongest first, with their values to the
    bit as an edit finds them. active: how many there are. explained: the squared error's share of the squared length,
    taken from 1."""

    active: int
    explained: float
    top: Sequence[tuple[int, float]]
    asked: Sequence[float]


@dataclass(frozen=True)
class Summary:
    """Of one feature over all tokens that were looked at: largest value, mean, and on how many it is active."""

    feature: int
    largest: float
    mean: float
    tokens: int


@dataclass(frozen=True)
class Seen:
    """explained: share of the variance round the mean, of two tokens or more."""

    tokens: Sequence[Found]
    top: Sequence[Summary]
    explained: float | None


def find(dictionary: Dictionary, h: Tensor, top_k: int, asked: Sequence[int]) -> Seen:
    """What there is in `h [T, width]`. Holds the features of some tokens at a time; slow, for a thread."""
    index = torch.tensor(asked, dtype=torch.int64)
    largest = torch.zeros(dictionary.num_features)
    total, count = torch.zeros_like(largest), torch.zeros_like(largest)
    found: list[Found] = []
    made: list[Tensor] = []
    for part in h.split(max(1, MOST_HELD // dictionary.num_features)):
        features = dictionary.features(part)
        largest = torch.maximum(largest, features.max(dim=0).values)
        total, count = total + features.sum(dim=0), count + (features > 0).sum(dim=0)
        made.append(dictionary.reconstruction(part))
        exact = dictionary.some(part, index) if asked else torch.empty(len(part), 0)
        strongest = features.topk(min(top_k, dictionary.num_features), dim=1)
        for n, token in enumerate(part):
            which = strongest.indices[n][strongest.values[n] > 0]
            left = float((token - made[-1][n]).double().square().sum())
            found.append(Found(
                int((features[n] > 0).sum()), 1 - left / max(float(token.double().square().sum()), 1e-30),
                _exact(dictionary, token, which), exact[n].tolist()))
    values, which = largest.topk(min(top_k, dictionary.num_features))
    summaries = [Summary(feature, value, float(total[feature]) / len(h), int(count[feature]))
                 for feature, value in zip(which.tolist(), values.tolist(), strict=True) if value > 0]
    return Seen(found, summaries, explained(h, torch.cat(made)) if len(h) > 1 else None)


def _exact(dictionary: Dictionary, token: Tensor, which: Tensor) -> list[tuple[int, float]]:
    if not len(which):
        return []
    # They are active, so their values are their pre-activations, whatever makes a feature active.
    return list(zip(which.tolist(), dictionary.pre(token[None], which)[0].tolist(), strict=True))
