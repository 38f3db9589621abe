"""From labelled activations to a manifold: principal subspace, a centroid per label, knots and a spline (Wurgaft et
al. 2026, arXiv 2605.05115).

Knots. Cyclic: angles of the centroids in their first two components, each divided by its spread, turned so that the
first label is at 0 and rising in the order of the labels. Sequential: lengths along the polygon of centroids. Graph:
coordinates as given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steering.artifacts.spline import Manifold

PERMUTATIONS = 999


@dataclass(frozen=True)
class Layout:
    """How the labels lie to one another, in the words of the request.

    Attributes:
        kind: cyclic, sequential or graph.
        coordinates: `[w, a]`: places 0, 1, ... of a curve, the given ones of a graph.
        period: `[a]`, 0 for an open axis.
    """

    kind: str
    coordinates: torch.Tensor
    period: torch.Tensor

    def distances(self) -> torch.Tensor:
        """How far labels are apart, `[w, w]`: straight, the shorter way round on axes that wrap."""
        change = (self.coordinates.unsqueeze(0) - self.coordinates.unsqueeze(1)).abs()
        wrapped = torch.where(self.period > 0, self.period, torch.inf)
        return torch.minimum(change, wrapped - change).square().sum(-1).sqrt()

    def neighbours(self) -> torch.Tensor:
        """Pairs of labels that lie next to each other, `[e, 2]`."""
        distance = self.distances()
        nearest = float(distance[distance > 0].min())
        return torch.nonzero(torch.triu((distance <= 1.001 * nearest) & (distance > 0)))


@dataclass(frozen=True)
class Fit:
    """The manifold of one layer.

    basis `[r, d]`, mean `[d]`, centroids `[w, r]` within the subspace. natural: whether the knots of a cycle come in
    the order of the labels, or its reverse. order_p: share of random orders whose neighbours lie as near.
    """

    basis: torch.Tensor
    mean: torch.Tensor
    centroids: torch.Tensor
    manifold: Manifold
    natural: bool
    order_p: float

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        """Activations `[n, d]` as points of the subspace `[n, r]`."""
        return (rows - self.mean) @ self.basis.T


def principal(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `[d]` and the orthonormal directions of most variance `[r, d]` of `rows [n, d]`, at most as many as vary."""
    mean = rows.mean(dim=0)
    _, size, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    varying = int((size > 1e-6 * size[0]).sum()) if len(size) and size[0] > 0 else 0
    return mean, directions[:min(rank, varying)]


def means_by_label(rows: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the `rows [n, k]` of each label 0 to count - 1, `[count, k]`."""
    member = torch.nn.functional.one_hot(labels, count).to(rows.dtype)
    means: torch.Tensor = (member.T @ rows) / member.sum(dim=0).unsqueeze(1)
    return means


def fit(rows: torch.Tensor, labels: torch.Tensor, layout: Layout, rank: int, generator: torch.Generator) -> Fit | None:
    """The manifold of `rows [n, d]` float64 with label numbers `[n]`; None where fewer than two directions vary."""
    mean, basis = principal(rows, rank)
    if len(basis) < 2:
        return None
    centroids = means_by_label((rows - mean) @ basis.T, labels, len(layout.coordinates))
    knots, natural = layout.coordinates, True
    if layout.kind == "cyclic":
        angles = cycle_angles(centroids)
        natural = angles is not None
        knots = knots if angles is None else angles.unsqueeze(1) * len(centroids) / (2 * math.pi)
    elif layout.kind == "sequential":
        along = torch.cat([torch.zeros(1, dtype=torch.float64), centroids.diff(dim=0).norm(dim=1)]).cumsum(0)
        knots = (along * (len(centroids) - 1) / along[-1]).unsqueeze(1)
    return Fit(basis, mean, centroids, Manifold.build(knots.float(), centroids, layout.period), natural,
               order_p(centroids, layout, generator))


def cycle_angles(centroids: torch.Tensor) -> torch.Tensor | None:
    """Angles in [0, 2 pi) that rise with the labels from 0, or None if they do so in neither direction.

    `centroids [w, r]` in principal components, the first ones first.
    """
    plane = centroids[:, :2] - centroids[:, :2].mean(dim=0)
    plane = plane / plane.std(dim=0).clamp_min(1e-12)
    angle = torch.atan2(plane[:, 1], plane[:, 0])
    for direction in (1.0, -1.0):
        turned = torch.remainder(direction * (angle - angle[0]), 2 * math.pi)
        turned[0] = 0.0
        # In float32, as they are stored.
        if bool((turned.float().diff() > 0).all()):
            return turned
    return None


def order_p(centroids: torch.Tensor, layout: Layout, generator: torch.Generator) -> float:
    """Share of random orders of the labels, the true one counted in, whose neighbours lie at most as far apart."""
    pairs = layout.neighbours()
    squared = torch.cdist(centroids, centroids).square()

    def spread(order: torch.Tensor) -> float:
        return float(squared[order[pairs[:, 0]], order[pairs[:, 1]]].sum())

    found = spread(torch.arange(len(centroids)))
    as_near = sum(spread(torch.randperm(len(centroids), generator=generator)) <= found * (1 + 1e-9)
                  for _ in range(PERMUTATIONS))
    return (as_near + 1) / (PERMUTATIONS + 1)


def shuffled(made: Fit, generator: torch.Generator) -> tuple[Manifold, torch.Tensor]:
    """The spline through the same points with the labels dealt anew to the knots, and the knot of each label `[w]`."""
    order = torch.randperm(len(made.centroids), generator=generator)
    knot_of = torch.argsort(order)
    return Manifold.build(made.manifold.knots, made.centroids[order], made.manifold.period), knot_of


def chosen_pairs(layout: Layout, most: int, generator: torch.Generator) -> Sequence[tuple[int, int]]:
    """Pairs of labels to walk between, all or `most` of them, alike at every distance."""
    distance = layout.distances()
    rows = torch.triu_indices(len(distance), len(distance), offset=1).T
    groups: dict[int, list[tuple[int, int]]] = {}
    for n in torch.randperm(len(rows), generator=generator).tolist():
        a, b = rows[n].tolist()
        groups.setdefault(round(float(distance[a, b])), []).append((a, b))
    picked: list[tuple[int, int]] = []
    while len(picked) < min(most, len(rows)):
        for far in sorted(groups):
            if groups[far] and len(picked) < most:
                picked.append(groups[far].pop())
    return sorted(picked)
