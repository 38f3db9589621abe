"""The behaviour manifold: the curve that a model's natural answer distributions form, and how far others lie from it.

A distribution is over the values of the task and one bin for everything else (Wurgaft et al. 2026, arXiv 2605.05115).
What the paper leaves open is decided here: the knots are the labels' places or coordinates, evenly spaced, and not
angles of a PCA of outputs, which mean nothing for a model that is sure of its answers; the nearest point is looked up
among 1000 (a curve) or 40 x 40 (a surface) samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steering.artifacts.spline import Manifold
from vectors.extract.manifold_fit import Layout, means_by_label

SAMPLES = {1: 1000, 2: 40, 3: 14}
FLOOR = 1e-7


@dataclass(frozen=True)
class Answers:
    """The spellings of every value by token id. tokens: all of them; of: number of the value of each."""

    tokens: tuple[int, ...]
    of: torch.Tensor
    count: int

    @classmethod
    def make(cls, groups: Sequence[Sequence[int]]) -> "Answers":
        return cls(tuple(token for group in groups for token in group),
                   torch.tensor([n for n, group in enumerate(groups) for _ in group]), len(groups))

    def spelled(self, value: int) -> set[int]:
        """Token ids of the spellings of one value."""
        return {token for token, owner in zip(self.tokens, self.of.tolist(), strict=True) if owner == value}

    def distribution(self, logprobs: torch.Tensor) -> torch.Tensor:
        """`[n, count + 1]` from log-probabilities of `tokens` `[n, num_tokens]`; the last bin is all other tokens."""
        mass = torch.zeros(len(logprobs), self.count, dtype=torch.float64)
        mass.index_add_(1, self.of, logprobs.double().exp())
        rest = (1 - mass.sum(dim=1, keepdim=True)).clamp_min(0.0)
        whole = torch.cat([mass, rest], dim=1)
        return whole / whole.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Behaviour:
    """centroids: mean natural distribution of every value `[w, w + 1]`. curve: samples of the manifold `[s, w + 1]`."""

    centroids: torch.Tensor
    curve: torch.Tensor

    @classmethod
    def fit(cls, distributions: torch.Tensor, labels: torch.Tensor, layout: Layout) -> "Behaviour":
        """From natural distributions `[n, w + 1]` and the true value of each `[n]`.

        A spline on the tangent plane of the unit sphere of square roots, at their mean.
        """
        centroids = means_by_label(distributions, labels, len(layout.coordinates))
        roots = centroids.sqrt()
        base = roots.mean(dim=0)
        base = base / base.norm()
        cosine = (roots @ base).clamp(-1, 1).unsqueeze(1)
        angle = torch.arccos(cosine)
        tangent = (roots - cosine * base) * torch.where(angle > 1e-9, angle / torch.sin(angle), 1.0)
        manifold = Manifold.build(layout.coordinates, tangent, layout.period)
        along = manifold.at(manifold.sample(SAMPLES[manifold.axes]))
        length = along.norm(dim=1, keepdim=True)
        sphere = torch.cos(length) * base + torch.sin(length) * along / length.clamp_min(1e-12)
        return cls(centroids, sphere.square())

    def distance(self, distributions: torch.Tensor) -> torch.Tensor:
        """Bhattacharyya distance in nats of `[n, w + 1]` to the nearest point of the manifold, `[n]`."""
        return bhattacharyya(distributions, self.curve).min(dim=1).values

    def nearest_value(self, distributions: torch.Tensor) -> torch.Tensor:
        """Number of the value whose natural distribution is the nearest, `[n]`."""
        return bhattacharyya(distributions, self.centroids).argmin(dim=1)


def bhattacharyya(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """-log(1 - d^2) for the Hellinger distance d of every row of `p [n, k]` from every row of `q [m, k]`, `[n, m]`."""
    return -torch.log((p.sqrt() @ q.sqrt().T).clamp(FLOOR, 1.0))
