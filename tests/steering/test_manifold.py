"""Splines through labelled points against their defining equations, and the ways between them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

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


def cubic(knots: np.ndarray, points: np.ndarray, closed: bool) -> Callable[[np.ndarray], np.ndarray]:
    """One cubic a segment, a + b u + c u^2 + d u^3 from its knot on, from all conditions written down one by one: it
    passes through both ends, slope and bend go on at each inner knot, and either both join at the ends or the ends do
    not bend."""
    step = np.diff(knots)
    count = len(step)
    system, wanted = [], []

    def row(entries: dict[tuple[int, int], float], value: np.ndarray | float) -> None:
        system.append(np.zeros(4 * count))
        for (segment, power), number in entries.items():
            system[-1][4 * segment + power] += number
        wanted.append(np.broadcast_to(value, points.shape[1]))

    for n, h in enumerate(step):
        row({(n, 0): 1}, points[n])
        row({(n, 0): 1, (n, 1): h, (n, 2): h**2, (n, 3): h**3}, points[n + 1])
    for n in range(count if closed else count - 1):
        h, after = step[n], (n + 1) % count
        row({(n, 1): 1, (n, 2): 2 * h, (n, 3): 3 * h**2} | ({(after, 1): -1} if after != n else {}), 0)
        row({(n, 2): 2, (n, 3): 6 * h} | ({(after, 2): -2} if after != n else {}), 0)
    if not closed:
        row({(0, 2): 2}, 0)
        row({(count - 1, 2): 2, (count - 1, 3): 6 * step[-1]}, 0)
    found = np.linalg.solve(np.array(system), np.array(wanted)).reshape(count, 4, -1)

    def at(t: np.ndarray) -> np.ndarray:
        inside = knots[0] + (t - knots[0]) % (knots[-1] - knots[0]) if closed else t
        n = np.clip(np.searchsorted(knots, inside, side="right") - 1, 0, count - 1)
        u = (inside - knots[n])[:, None]
        return sum(found[n, power] * u**power for power in range(4))

    return at


@pytest.mark.parametrize("knots", [[0.0, 1.0], [0.0, 0.5, 2.0], [-1.0, 0.0, 0.25, 3.0, 3.5, 5.0]])
def test_an_open_curve_is_the_natural_cubic_spline(knots: list[float]) -> None:
    made, points = curve(knots)
    t = np.linspace(knots[0], knots[-1], 41)
    np.testing.assert_allclose(made.at(column(t.tolist())).numpy(), cubic(np.array(knots), points, False)(t), atol=1e-6)


@pytest.mark.parametrize("knots", [[0.0, 1.0, 2.5], [0.3, 1.0, 2.0, 2.2], [0.0, 0.9, 1.8, 2.9, 3.6, 4.4, 5.5]])
def test_a_closed_curve_is_the_periodic_cubic_spline(knots: list[float]) -> None:
    made, points = curve(knots, period=6.5)
    expected = cubic(np.array([*knots, knots[0] + 6.5]), np.vstack([points, points[:1]]), True)
    t = np.linspace(-7, 14, 97)
    np.testing.assert_allclose(made.at(column(t.tolist())).numpy(), expected(t), atol=1e-5)


@pytest.mark.parametrize("axes", [2, 3])
def test_an_open_surface_is_the_polyharmonic_spline(axes: int) -> None:
    """r^2 log r of two coordinates and r of three, at the knots, and a plane that they are orthogonal to."""
    def radial(r: np.ndarray) -> np.ndarray:
        return -r if axes == 3 else np.where(r > 0, r**2 * np.log(np.where(r > 0, r, 1)), 0)

    def away(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def plane(a: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(a)), a])

    sides = [np.arange(n, dtype=float) for n in (3, 4, 2)[:axes]]
    knots = np.stack([axis.ravel() for axis in np.meshgrid(*sides, indexing="ij")], axis=1)
    points = RANDOM.normal(size=(len(knots), 5))
    system = np.block([[radial(away(knots, knots)), plane(knots)],
                       [plane(knots).T, np.zeros((axes + 1, axes + 1))]])
    found = np.linalg.solve(system, np.vstack([points, np.zeros((axes + 1, 5))]))
    made = Manifold.build(torch.tensor(knots), torch.tensor(points), torch.zeros(axes))
    wanted = RANDOM.uniform(0, [2, 3, 1][:axes], size=(50, axes))
    expected = np.column_stack([radial(away(wanted, knots)), plane(wanted)]) @ found
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
