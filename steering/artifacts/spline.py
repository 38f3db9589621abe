"""Manifolds: curves and surfaces through the points of labelled values, within a subspace of the activation.

A manifold has `w` knots: the coordinates `[w, a]` of labelled values and their points `[w, r]` in the subspace. With
one coordinate it is a cubic spline, periodic or natural; with two or three a polyharmonic spline (thin plate), whose
wrapped axes are laid on circles. Both pass through every point (methods/04; the surface is the card's "thin-plate
family").
"""

import math
from dataclasses import dataclass

import torch

from steering.language.errors import InvalidPayload

MAX_KNOTS, MAX_AXES, MAX_RANK = 256, 3, 256
# Points an axis is sampled at when a token's place is looked up, by number of axes.
SAMPLES = {1: 256, 2: 24, 3: 9}


@dataclass(frozen=True, eq=False)
class Manifold:
    """Points in the subspace by coordinate. All float64.

    Attributes:
        knots: `[w, a]`; with one axis in rising order.
        points: `[w, r]`, what it passes through.
        period: `[a]`, 0 for an open axis. Coordinates of a wrapped axis are in [0, period).
        weights: of the spline: second derivatives `[w, r]` of a curve, coefficients `[w + e + 1, r]` of a surface.
    """

    knots: torch.Tensor
    points: torch.Tensor
    period: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def build(cls, knots: torch.Tensor, points: torch.Tensor, period: torch.Tensor) -> "Manifold":
        """Check the knots and fit the spline.

        Raises:
            InvalidPayload: `param` is the tensor that is wrong.
        """
        knots, points, period = knots.double(), points.double(), period.double()
        _check(knots, points, period)
        weights = _curve(knots[:, 0], points, float(period[0])) if len(period) == 1 else _surface(knots, points, period)
        if not bool(torch.isfinite(weights).all()):
            raise InvalidPayload("the knots lie too close together for a spline", param="knots")
        return cls(knots, points, period, weights)

    @property
    def axes(self) -> int:
        return len(self.period)

    def at(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Points `[m, r]` at coordinates `[m, a]`; beyond an open end the end is taken."""
        inside = self.inside(coordinates.double())
        if self.axes == 1:
            return self._on_curve(inside[:, 0])
        embedded, nodes = _embed(inside, self.period), _embed(self.knots, self.period)
        ones = torch.ones(len(embedded), 1, dtype=torch.float64)
        return torch.cat([_radial(torch.cdist(embedded, nodes), nodes.shape[1]), ones, embedded], dim=1) @ self.weights

    def inside(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Coordinates `[m, a]` brought into [0, period) on wrapped axes and between the outer knots on open ones."""
        low, high = self.knots.min(dim=0).values, self.knots.max(dim=0).values
        wrapped = torch.where(self.period > 0, self.period, 1.0)
        return torch.where(self.period > 0, coordinates - wrapped * torch.floor(coordinates / wrapped),
                           torch.minimum(torch.maximum(coordinates, low), high))

    def way(self, source: torch.Tensor, target: torch.Tensor, fraction: float) -> torch.Tensor:
        """Coordinates `fraction` of the way from source `[m, a]` to target `[m, a]`, the shorter way round."""
        wrapped = torch.where(self.period > 0, self.period, 1.0)
        change = target - source
        shorter = change - wrapped * torch.ceil(change / wrapped - 0.5)
        return self.inside(source + fraction * torch.where(self.period > 0, shorter, change))

    def sample(self, count: int | None = None) -> torch.Tensor:
        """Coordinates `[k, a]` all over the manifold, in a grid of `count` (see SAMPLES) along every axis."""
        count = count or SAMPLES[self.axes]
        along = [torch.arange(count, dtype=torch.float64) * (float(period) / count) if period > 0
                 else torch.linspace(float(self.knots[:, n].min()), float(self.knots[:, n].max()), count,
                                     dtype=torch.float64)
                 for n, period in enumerate(self.period.tolist())]
        return torch.cartesian_prod(*along).reshape(-1, self.axes)

    def nearest(self, points: torch.Tensor) -> torch.Tensor:
        """Coordinates `[m, a]` of the sampled points nearest to `points [m, r]`."""
        sampled = self.sample()
        return sampled[torch.cdist(points.double(), self.at(sampled)).argmin(dim=1)]

    def from_places(self, places: torch.Tensor) -> torch.Tensor:
        """Coordinates `[m, 1]` of places `[m]` on a curve: knot n is place n, and between knots it is in proportion."""
        ends = self._ends()
        count = len(self.knots)
        place = torch.remainder(places, count) if len(ends) > count else places.clamp(0, count - 1)
        first = place.floor().long().clamp(0, len(ends) - 2)
        return (ends[first] + (place - first) * (ends[first + 1] - ends[first])).unsqueeze(1)

    def to_places(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Places `[m]` of coordinates `[m, 1]` on a curve."""
        ends = self._ends()
        inside = self.inside(coordinates)[:, 0]
        inside = torch.where(inside < ends[0], inside + self.period[0], inside)
        first = (torch.searchsorted(ends, inside, right=True) - 1).clamp(0, len(ends) - 2)
        return first + (inside - ends[first]) / (ends[first + 1] - ends[first])

    def _ends(self) -> torch.Tensor:
        """Knots of a curve; a closed one ends at its first knot again."""
        knots = self.knots[:, 0]
        return torch.cat([knots, knots[:1] + self.period]) if self.period[0] > 0 else knots

    def _on_curve(self, t: torch.Tensor) -> torch.Tensor:
        ends = self._ends()
        t = torch.where(t < ends[0], t + self.period[0], t)
        first = (torch.searchsorted(ends, t, right=True) - 1).clamp(0, len(ends) - 2)
        second = (first + 1) % len(self.knots)
        step = ends[first + 1] - ends[first]
        b = ((t - ends[first]) / step).unsqueeze(1)
        a, square = 1 - b, (step * step / 6).unsqueeze(1)
        return (a * self.points[first] + b * self.points[second]
                + square * ((a**3 - a) * self.weights[first] + (b**3 - b) * self.weights[second]))


def _curve(knots: torch.Tensor, points: torch.Tensor, period: float) -> torch.Tensor:
    """Second derivatives `[w, r]` at the knots of the cubic spline; 0 at the ends of an open one."""
    count = len(knots)
    closed = period > 0
    ends = torch.cat([knots, knots[:1] + period]) if closed else knots
    step = ends.diff()
    after = torch.roll(points, -1, dims=0) if closed else points[1:]
    slope = (after - points[:len(step)]) / step.unsqueeze(1)
    system = torch.eye(count, dtype=torch.float64)
    wanted = torch.zeros_like(points)
    for n in range(count) if closed else range(1, count - 1):
        system[n] = 0.0
        # Added, not set: with three closed knots both neighbours may stand in one place.
        system[n, n - 1] += step[n - 1]
        system[n, n] += 2 * (step[n - 1] + step[n])
        system[n, (n + 1) % count] += step[n]
        wanted[n] = 6 * (slope[n] - slope[n - 1])
    return _solved(system, wanted)


def _surface(knots: torch.Tensor, points: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Coefficients of the radial functions at the knots and of the plane under them."""
    nodes = _embed(knots, period)
    count, width = nodes.shape
    plane = torch.cat([torch.ones(count, 1, dtype=torch.float64), nodes], dim=1)
    if int(torch.linalg.matrix_rank(plane)) <= width:
        raise InvalidPayload("the knots do not span their coordinates, so no surface is defined by them",
                             param="knots", fix="Give knots that differ along every axis, at least three on a wrapped "
                                                "one, or fewer axes.")
    system = torch.zeros(count + width + 1, count + width + 1, dtype=torch.float64)
    system[:count, :count] = _radial(torch.cdist(nodes, nodes), width)
    system[:count, count:] = plane
    system[count:, :count] = plane.T
    wanted = torch.cat([points, torch.zeros(width + 1, points.shape[1], dtype=torch.float64)])
    return _solved(system, wanted)


def _solved(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """NaN where the system has no solution."""
    found, info = torch.linalg.solve_ex(system, wanted)
    return torch.where(info == 0, found, torch.nan)


def _embed(coordinates: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Open axes as they are, wrapped ones as circles of their circumference: `[m, e]`."""
    parts = []
    for n, length in enumerate(period.tolist()):
        x = coordinates[:, n]
        radius = length / (2 * math.pi)
        parts += [radius * torch.cos(x / radius), radius * torch.sin(x / radius)] if length > 0 else [x]
    return torch.stack(parts, dim=1)


def _radial(distance: torch.Tensor, width: int) -> torch.Tensor:
    """The thin-plate function of two dimensions; in more, the one of three (it serves every higher one)."""
    if width == 2:
        return distance.square() * torch.log(distance.clamp_min(1e-300))
    return -distance


def _check(knots: torch.Tensor, points: torch.Tensor, period: torch.Tensor) -> None:
    count, axes = knots.shape
    if count > MAX_KNOTS or axes > MAX_AXES or points.shape[1] > MAX_RANK:
        raise InvalidPayload(f"{count} knots of {axes} coordinates in {points.shape[1]} dimensions; at most "
                             f"{MAX_KNOTS}, {MAX_AXES} and {MAX_RANK} are taken", param="knots")
    if bool((period < 0).any()):
        raise InvalidPayload("a period is negative", param="period", fix="Use 0 for an axis that does not wrap.")
    outside = (period > 0) & ((knots < 0) | (knots >= period))
    if bool(outside.any()):
        raise InvalidPayload("a knot of a wrapped axis is not in [0, period)", param="knots")
    if axes > 1:
        if len(torch.unique(knots, dim=0)) < count:
            raise InvalidPayload("two knots have the same coordinates", param="knots")
        return
    if bool((knots[:, 0].diff() <= 0).any()):
        raise InvalidPayload("the knots of a curve must rise", param="knots", fix="Sort them, with their points.")
    if count < (3 if period[0] > 0 else 2):
        raise InvalidPayload("a closed curve needs three knots, an open one two", param="knots")
