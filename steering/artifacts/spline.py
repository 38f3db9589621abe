"""Manifolds: curves and surfaces through the points of labelled values, within a subspace of the activation.

A manifold has `w` knots: the coordinates `[w, a]` of labelled values and their points `[w, r]` in the subspace. With
one coordinate it is a cubic spline, periodic or natural; with two or three a polyharmonic spline (thin plate), whose
wrapped axes are laid on circles. Both pass through every point. The curve is that of Wurgaft et al. 2026 (arXiv
2605.05115); the paper shows no surfaces, for which this code takes the usual generalisation of a cubic spline.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import CubicSpline, RBFInterpolator

from steering.language.errors import InvalidPayload

Spline = Callable[[npt.ArrayLike], npt.NDArray[np.float64]]

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
        spline: points `[m, r]` of a curve at coordinates `[m]`, or of a surface at embedded ones, `[m, e]`.
    """

    knots: torch.Tensor
    points: torch.Tensor
    period: torch.Tensor
    spline: Spline

    @classmethod
    def build(cls, knots: torch.Tensor, points: torch.Tensor, period: torch.Tensor) -> "Manifold":
        """Check the knots and fit the spline.

        Raises:
            InvalidPayload: `param` is the tensor that is wrong.
        """
        knots, points, period = knots.double(), points.double(), period.double()
        _check(knots, points, period)
        try:
            # What overflows is looked for in the result.
            with np.errstate(all="ignore"):
                spline = _curve(knots[:, 0], points, float(period[0])) if len(period) == 1 else _surface(
                    knots, points, period)
        except (ValueError, np.linalg.LinAlgError) as error:
            raise InvalidPayload("the knots lie too close together for a spline", param="knots") from error
        made = cls(knots, points, period, spline)
        if not bool(torch.isfinite(made.at(knots)).all()):
            raise InvalidPayload("the knots lie too close together for a spline", param="knots")
        return made

    @property
    def axes(self) -> int:
        return len(self.period)

    def at(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Points `[m, r]` at coordinates `[m, a]`; beyond an open end the end is taken."""
        inside = self.inside(coordinates.double())
        return torch.from_numpy(self.spline(inside[:, 0] if self.axes == 1 else _embed(inside, self.period)))

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


def _curve(knots: torch.Tensor, points: torch.Tensor, period: float) -> Spline:
    """The cubic spline through the knots of a curve, natural or, with a period, closed."""
    if period > 0:
        knots, points = torch.cat([knots, knots[:1] + period]), torch.cat([points, points[:1]])
    spline: Spline = CubicSpline(knots.numpy(), points.numpy(), bc_type="periodic" if period > 0 else "natural")
    return spline


def _surface(knots: torch.Tensor, points: torch.Tensor, period: torch.Tensor) -> Spline:
    """Radial functions at the knots and a plane under them: the thin plate of two dimensions, and in more of them that
    of three, which serves every higher one."""
    nodes = _embed(knots, period).numpy()
    width = nodes.shape[1]
    if int(np.linalg.matrix_rank(np.column_stack([np.ones(len(nodes)), nodes]))) <= width:
        raise InvalidPayload("the knots do not span their coordinates, so no surface is defined by them",
                             param="knots", fix="Give knots that differ along every axis, at least three on a wrapped "
                                                "one, or fewer axes.")
    kernel = "thin_plate_spline" if width == 2 else "linear"
    spline: Spline = RBFInterpolator(nodes, points.numpy(), kernel=kernel, degree=1)
    return spline


def _embed(coordinates: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Open axes as they are, wrapped ones as circles of their circumference: `[m, e]`."""
    parts = []
    for n, length in enumerate(period.tolist()):
        x = coordinates[:, n]
        radius = length / (2 * math.pi)
        parts += [radius * torch.cos(x / radius), radius * torch.sin(x / radius)] if length > 0 else [x]
    return torch.stack(parts, dim=1)


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
