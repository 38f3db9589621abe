"""Splines through labelled points against scipy's, and the ways between them."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline, RBFInterpolator

from steering.artifacts.spline import SAMPLES, Manifold
from steering.language.errors import InvalidPayload

RANDOM = np.random.default_rng(0)


def curve(knots: list[float], period: float = 0.0, rank: int = 3) -> tuple[Manifold, np.ndarray]:
    points = np.random.default_rng(len(knots)).normal(size=(len(knots), rank))
    return Manifold.build(torch.tensor(knots).unsqueeze(1), torch.tensor(points), torch.tensor([period])), points


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def ring(count: int = 7) -> Manifold:
    angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    return Manifold.build(column(list(range(count))), torch.stack([angle.cos(), angle.sin()], dim=1),
                          torch.tensor([float(count)]))


@pytest.mark.parametrize("knots", [[0.0, 1.0], [0.0, 0.5, 2.0], [-1.0, 0.0, 0.25, 3.0, 3.5, 5.0]])
def test_an_open_curve_is_the_natural_cubic_spline(knots: list[float]) -> None:
    made, points = curve(knots)
    t = np.linspace(knots[0], knots[-1], 41)
    expected = CubicSpline(knots, points, bc_type="natural")(t)
    np.testing.assert_allclose(made.at(column(t.tolist())).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("knots", [[0.0, 1.0, 2.5], [0.3, 1.0, 2.0, 2.2], [0.0, 0.9, 1.8, 2.9, 3.6, 4.4, 5.5]])
def test_a_closed_curve_is_the_periodic_cubic_spline(knots: list[float]) -> None:
    made, points = curve(knots, period=6.5)
    expected = CubicSpline([*knots, knots[0] + 6.5], np.vstack([points, points[:1]]), bc_type="periodic")
    t = np.linspace(-7, 14, 97)
    np.testing.assert_allclose(made.at(column(t.tolist())).numpy(), expected(t), atol=1e-5)


def test_an_open_surface_is_the_thin_plate_spline() -> None:
    knots = np.array([[x, y] for x in range(3) for y in range(4)], dtype=float)
    points = RANDOM.normal(size=(12, 5))
    made = Manifold.build(torch.tensor(knots), torch.tensor(points), torch.zeros(2))
    wanted = RANDOM.uniform([0, 0], [2, 3], size=(50, 2))
    expected = RBFInterpolator(knots, points, kernel="thin_plate_spline", degree=1)(wanted)
    np.testing.assert_allclose(made.at(torch.tensor(wanted)).numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("period", [[4.0, 0.0], [4.0, 5.0], [0.0, 5.0, 4.0]])
def test_a_wrapped_surface_passes_through_its_points_and_closes(period: list[float]) -> None:
    sizes = [4, 5, 4][:len(period)] if len(period) < 3 else [3, 5, 4]
    knots = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sizes))
    points = torch.tensor(RANDOM.normal(size=(len(knots), 2)))
    made = Manifold.build(knots, points, torch.tensor(period))
    assert torch.allclose(made.at(knots), points, atol=1e-8)
    round_trip = torch.tensor([[p if p else 0.0 for p in period]], dtype=torch.float64)
    near = torch.full((1, len(period)), 0.3, dtype=torch.float64)
    assert torch.allclose(made.at(near + round_trip), made.at(near), atol=1e-8)
    assert len(made.sample()) == SAMPLES[len(period)] ** len(period)


def test_ways_take_the_shorter_side_and_stop_at_open_ends() -> None:
    made = ring(8)
    there = made.way(column([0.0, 1.0, 7.0]), column([6.0, 3.0, 1.0]), 0.5)
    assert there[:, 0].tolist() == [7, 2, 0]
    # Exactly opposite: towards rising coordinates.
    assert float(made.way(column([0.0]), column([4.0]), 0.5)) == 2
    line, _ = curve([0.0, 1.0, 2.0, 3.0])
    assert float(line.way(column([0.5]), column([2.5]), 0.25)) == pytest.approx(1.0)
    assert line.inside(column([-1.0, 9.0]))[:, 0].tolist() == [0.0, 3.0]


@pytest.mark.parametrize(("knots", "period"), [([0.3, 1.0, 2.0, 5.0], 6.5), ([-1.0, 0.0, 4.0], 0.0)])
def test_places_count_labels_between_uneven_knots(knots: list[float], period: float) -> None:
    made, _ = curve(knots, period)
    last = len(knots) if period else len(knots) - 1
    places = torch.linspace(0, last - 0.01, 23, dtype=torch.float64)
    there = made.from_places(places)
    assert torch.allclose(made.to_places(there), places, atol=1e-6)
    for n, knot in enumerate(knots):
        assert float(made.from_places(torch.tensor([float(n)]))) == pytest.approx(knot)
    if period:
        assert float(made.from_places(torch.tensor([len(knots) + 1.0]))) == pytest.approx(knots[1])


def test_the_nearest_point_of_a_ring_is_at_the_same_angle() -> None:
    angles = torch.linspace(0, 6.2, 60, dtype=torch.float64)
    inside = 1.1 * torch.stack([angles.cos(), angles.sin()], dim=1)
    off = (ring().nearest(inside)[:, 0] * 2 * math.pi / 7 - angles).abs()
    # Half a sampling step, and what a spline through seven points strays from the circle.
    assert float(torch.minimum(off, 2 * math.pi - off).max()) < 0.8 * 2 * math.pi / SAMPLES[1]


@pytest.mark.parametrize(("knots", "period", "param"), [
    ([[0.0], [2.0], [1.0]], [0.0], "knots"), ([[0.0], [1.0], [1.0]], [0.0], "knots"), ([[0.0], [1.0]], [3.0], "knots"),
    ([[0.0]], [0.0], "knots"), ([[0.0], [1.0], [3.0]], [3.0], "knots"), ([[-0.1], [1.0], [2.0]], [3.0], "knots"),
    ([[0.0], [1.0]], [-1.0], "period"), ([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], [0.0, 0.0], "knots"),
    ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0.0, 0.0], "knots"), ([[0.0] * 4] * 6, [0.0] * 4, "knots"),
])
def test_knots_that_make_no_manifold_are_refused(knots: list[list[float]], period: list[float], param: str) -> None:
    points = torch.tensor(RANDOM.normal(size=(len(knots), 2)))
    with pytest.raises(InvalidPayload) as caught:
        Manifold.build(torch.tensor(knots, dtype=torch.float64), points, torch.tensor(period))
    assert caught.value.param == param
