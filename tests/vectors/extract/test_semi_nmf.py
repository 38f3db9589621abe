"""The factorisation beside the update rule written out in numpy, and on planted groups."""

import numpy as np
import pytest
import torch

from vectors.extract import semi_nmf
from vectors.extract.refusals import ExtractionCancelled
from vectors.extract.semi_nmf import Factors, across, alike, cut, factorise, shuffled_columns, squared_error, updated

TOKENS, WIDTH, GROUPS, HELD = 600, 60, 6, 5


def planted(seed: int = 0, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """A `[TOKENS, WIDTH]` and the groups `[WIDTH, GROUPS]` of mixed signs, which share neurons."""
    chance = np.random.default_rng(seed)
    groups = np.zeros((WIDTH, GROUPS))
    for n in range(GROUPS):
        sizes = chance.normal(size=HELD)
        groups[chance.choice(WIDTH, HELD, replace=False), n] = sizes + np.sign(sizes)
    usage = np.where(chance.random((TOKENS, GROUPS)) < 0.3, chance.gamma(2.0, size=(TOKENS, GROUPS)), 0.0)
    return (usage @ groups.T + noise * chance.normal(size=(TOKENS, WIDTH))).astype(np.float32), groups


def fit(data: np.ndarray, *, restarts: int = 6, kept: int = HELD, iterations: int = 400) -> list[Factors]:
    return factorise(data, GROUPS, kept=kept, iterations=iterations, patience=60, restarts=restarts,
                     generator=torch.Generator().manual_seed(0), step=lambda share: None)


def recovered(found: Factors, groups: np.ndarray) -> float:
    """Mean over planted groups of the largest cosine with one that was found."""
    return float(alike(torch.from_numpy(groups).float(), [found.groups]).mean())


def test_planted_groups_are_recovered_and_those_of_dealt_neurons_are_not() -> None:
    data, groups = planted()
    found = fit(data)
    assert recovered(found[0], groups) > 0.98
    assert found[0].error < 0.01
    dealt = np.empty_like(data)
    shuffled_columns(data, dealt, torch.Generator().manual_seed(1))
    assert np.array_equal(np.sort(data, axis=0), np.sort(dealt, axis=0))
    control = fit(dealt)
    assert recovered(control[0], groups) < 0.8
    assert control[0].error > 10 * found[0].error


def test_what_is_returned_obeys_the_constraints_and_its_error_is_true() -> None:
    data, _ = planted(noise=0.3)
    found = fit(data, restarts=3)
    assert [pair.error for pair in found] == sorted(pair.error for pair in found)
    best = found[0]
    assert bool((best.usage >= 0).all()) and int((best.groups != 0).sum(dim=0).max()) <= HELD
    rebuilt = best.usage.double() @ best.groups.double().T
    true = float((torch.from_numpy(data).double() - rebuilt).square().sum()) / float((data.astype(float)**2).sum())
    assert best.error == pytest.approx(true, rel=1e-4)
    assert all(len(pair.usage) == 0 for pair in found[1:])


def reference(data: np.ndarray, usage: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """One iteration as the papers write it, A being `[f, n]` there."""
    a, g = data.T.astype(np.float64), usage.astype(np.float64)
    f = a @ g @ np.linalg.inv(g.T @ g + 1e-6 * np.eye(g.shape[1]))
    for k in range(f.shape[1]):
        f[np.argsort(-np.abs(f[:, k]))[kept:], k] = 0
    for k in range(f.shape[1]):
        size = np.linalg.norm(g[:, k])
        g[:, k] /= size
        f[:, k] *= size
    p, q = a.T @ f, f.T @ f

    def plus(x: np.ndarray) -> np.ndarray:
        return (np.abs(x) + x) / 2

    def minus(x: np.ndarray) -> np.ndarray:
        return (np.abs(x) - x) / 2

    return f, g * np.sqrt((plus(p) + g @ minus(q)) / (minus(p) + g @ plus(q) + 1e-6))


def test_an_iteration_is_that_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks that do not divide the tokens.
    monkeypatch.setattr(semi_nmf, "BLOCK", 77)
    data, _ = planted(noise=0.5)
    usage = torch.rand(TOKENS, GROUPS, generator=torch.Generator().manual_seed(3))
    for _ in range(4):
        expected = reference(data, usage.numpy(), 7)
        groups, usage = updated(data, across(data, usage), usage, 7)
        assert np.allclose(groups.numpy(), expected[0], atol=1e-3, rtol=1e-3)
        assert np.allclose(usage.numpy(), expected[1], atol=1e-4, rtol=1e-3)


def test_without_the_cut_the_error_never_rises() -> None:
    data, _ = planted(noise=0.5)
    usage, total, errors = torch.rand(TOKENS, GROUPS, generator=torch.Generator().manual_seed(3)), float((
        data.astype(np.float64)**2).sum()), []
    for _ in range(40):
        groups, usage = updated(data, across(data, usage), usage, WIDTH)
        errors.append(squared_error(total, across(data, usage), groups, usage))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


def test_a_cut_keeps_the_largest_of_each_column_whatever_their_sign() -> None:
    groups = torch.tensor([[1.0, -5.0], [-3.0, 2.0], [2.0, 2.0]])
    assert torch.equal(cut(groups, 1), torch.tensor([[0.0, -5.0], [-3.0, 0.0], [0.0, 0.0]]))
    assert int((cut(torch.ones(9, 2), 4) != 0).sum()) == 8, "equal entries are no more than were asked for"


def test_it_ends_early_where_nothing_improves_and_when_it_is_cancelled() -> None:
    data, _ = planted()
    assert factorise(data, GROUPS, kept=HELD, iterations=5000, patience=5, restarts=1,
                     generator=torch.Generator().manual_seed(0), step=lambda share: None)[0].iterations < 2000
    told: list[float] = []

    def step(share: float) -> None:
        told.append(share)
        if share > 0.3:
            raise ExtractionCancelled("the extraction was cancelled")

    with pytest.raises(ExtractionCancelled):
        factorise(data, GROUPS, kept=HELD, iterations=50, patience=50, restarts=2,
                  generator=torch.Generator().manual_seed(0), step=step)
    assert told == sorted(told)
