"""How well directions tell the texts of one concept from others, by the mean of h . z over a text's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vectors.extract.items import Labelled
from vectors.extract.standing import auc, auc_error


@dataclass(frozen=True)
class Telling:
    """texts: with their splits. target: the label of the concept."""

    texts: Labelled
    target: str

    def wanted(self, n: int) -> bool:
        return self.texts.labels[n] == self.target

    def aucs(self, groups: torch.Tensor, means: torch.Tensor) -> list[float]:
        """On train, of each column of `groups [width, K]`. means: of each text, `[texts, width]`."""
        scores, side = self._split(means @ groups, "train")
        return [auc(one[side], one[~side]) for one in scores.T]

    def ranked(self, groups: torch.Tensor, means: torch.Tensor) -> list[int]:
        """Columns, the one that tells the target best on train first."""
        found = self.aucs(groups, means)
        return sorted(range(len(found)), key=lambda n: (-found[n], n))

    def auc(self, groups: torch.Tensor, means: torch.Tensor, split: Literal["dev", "test"]) -> float:
        """Of the sum of columns, which were chosen already."""
        scores, side = self._split((means @ groups).sum(dim=1), split)
        return auc(scores[side], scores[~side])

    def error(self, groups: torch.Tensor, means: torch.Tensor) -> float:
        """Standard error of `auc` on test."""
        scores, side = self._split((means @ groups).sum(dim=1), "test")
        return auc_error(scores[side], scores[~side])

    def best_auc(self, groups: torch.Tensor, means: torch.Tensor, take: int) -> float:
        """On test, of the columns that are the best on train."""
        return self.auc(groups[:, self.ranked(groups, means)[:take]], means, "test")

    def _split(self, scores: torch.Tensor, split: Literal["train", "dev", "test"]
               ) -> tuple[torch.Tensor, torch.Tensor]:
        members = list(self.texts.splits[split])
        return scores[members], torch.tensor([self.wanted(n) for n in members])


def random_groups(width: int, count: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    """`[width, count]`: columns of unit length with `kept` entries each, at random places and of random values."""
    values = torch.randn(width, count, generator=generator)
    where = torch.rand(width, count, generator=generator).topk(kept, dim=0).indices
    drawn = torch.zeros(width, count).scatter(0, where, values.gather(0, where))
    unit: torch.Tensor = drawn / drawn.norm(dim=0)
    return unit


def positions_of(texts: Labelled, most: int, generator: torch.Generator) -> dict[int, Sequence[int]]:
    """Of each train text the positions of its tokens but the first; at most `most` of all, drawn at random."""
    places = [(n, position) for n in texts.splits["train"] for position in range(1, len(texts.texts[n]))]
    if len(places) > most:
        order = torch.randperm(len(places), generator=generator)[:most].sort().values
        places = [places[i] for i in order.tolist()]
    found: dict[int, list[int]] = {}
    for n, position in places:
        found.setdefault(n, []).append(position)
    return {n: tuple(some) for n, some in found.items()}
