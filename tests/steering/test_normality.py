"""Scores of a normality artifact against numpy, and what random matrices must look like to them."""

import math

import numpy as np
import pytest
import torch

from steering.artifacts.normality import (
    LONGEST,
    NORMAL_FORMS,
    NUM_STATISTICS,
    diffusion_entropy,
    marchenko_pastur,
    normal_scores,
    over_windows,
    statistics,
)
from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload

WIDTH, RANK, WINDOW = 24, 5, 12


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(**given: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a layer that is normal in a way of its own in every tensor."""
    made = {
        "mean": noise(WIDTH, seed=1), "scale": noise(WIDTH, seed=2).abs() + 0.5,
        "basis": torch.linalg.qr(noise(WIDTH, RANK, seed=3)).Q.T.contiguous(),
        "variance": torch.tensor([9.0, 5.0, 3.0, 2.0, 1.5]), "rest": torch.tensor(0.25),
        "patterns": torch.where(noise(7, 4, seed=4) > 0, 1.0, -1.0), "window": torch.tensor(WINDOW),
        "dimension": torch.tensor(30.0), "bandwidth": torch.tensor(4.0),
        "spectral_mean": torch.linspace(0.1, 0.6, NUM_STATISTICS),
        "spectral_whiten": torch.eye(NUM_STATISTICS) * 3 + 0.1 * noise(NUM_STATISTICS, NUM_STATISTICS, seed=5),
        "diffusion": torch.tensor([1.5, 0.2]), "thresholds": torch.ones(len(NORMAL_FORMS))}
    return made | given


H = 2 * noise(40, WIDTH, seed=6)


def z_of(h: torch.Tensor, held: dict[str, torch.Tensor]) -> np.ndarray:
    return ((h - held["mean"]) / held["scale"]).double().numpy()


def test_distance_under_the_covariance_that_the_directions_make() -> None:
    held = numbers()
    z, basis = z_of(H, held), held["basis"].double().numpy()
    covariance = basis.T @ np.diag(held["variance"].double().numpy()) @ basis + 0.25 * (np.eye(WIDTH) - basis.T @ basis)
    wanted = np.sqrt(np.einsum("ti,ij,tj->t", z, np.linalg.inv(covariance), z) / WIDTH)
    np.testing.assert_allclose(normal_scores("mahalanobis", H, held).numpy(), wanted, rtol=1e-4)
    outside = z @ (np.eye(WIDTH) - basis.T @ basis)
    np.testing.assert_allclose(normal_scores("residual", H, held).numpy(),
                               np.sqrt((outside**2).sum(axis=1) / ((WIDTH - RANK) * 0.25)), rtol=1e-4)


def test_the_nearest_pattern_is_counted_bit_by_bit() -> None:
    held = numbers()
    shown = z_of(H, held) @ held["basis"].double().numpy()[:4].T > 0
    known = held["patterns"].numpy() > 0
    wanted = [min((row != pattern).mean() for pattern in known) for row in shown]
    np.testing.assert_allclose(normal_scores("membership", H, held).numpy(), wanted, atol=1e-6)


def test_statistics_of_a_window_are_those_of_its_covariance() -> None:
    """Of all d eigenvalues of the covariance over dims, and not of the products of tokens."""
    held = numbers()
    z = z_of(H, held)
    z *= np.minimum(1, LONGEST * math.sqrt(WIDTH) / np.linalg.norm(z, axis=1, keepdims=True))
    found = normal_scores("spectral", H, held)
    assert found[:WINDOW].isnan().all() and not found[WINDOW:].isnan().any()
    for last in (WINDOW, 25, 39):
        rows = z[last - WINDOW + 1:last + 1]
        centred = rows - rows.mean(axis=0)
        spectrum = np.sort(np.linalg.eigvalsh(centred.T @ centred / WIDTH))[::-1][:WINDOW - 1]
        share, relative = spectrum / spectrum.sum(), spectrum / spectrum.mean()
        law = marchenko_pastur(WINDOW - 1, (WINDOW - 1) / 30).numpy()
        edge = (1 + math.sqrt((WINDOW - 1) / 30))**2
        told = np.array([math.log(spectrum.sum()), share[0], math.log(spectrum[0] / spectrum[1]),
                         -(share * np.log(share)).sum() / math.log(WINDOW - 1), np.abs(relative - law).mean(),
                         math.log1p(np.clip(relative - edge, 0, None).sum())])
        away = held["spectral_whiten"].double().numpy() @ (told - held["spectral_mean"].double().numpy())
        assert float(found[last]) == pytest.approx(math.sqrt((away**2).mean()), rel=1e-3)


def test_entropy_of_a_random_walk_between_the_tokens() -> None:
    """The operator is not symmetric as it is defined; its eigenvalues are those of the symmetric one."""
    held = numbers()
    z = z_of(H, held)
    z *= np.minimum(1, LONGEST * math.sqrt(WIDTH) / np.linalg.norm(z, axis=1, keepdims=True))
    found = normal_scores("diffusion", H, held)
    for last in (WINDOW, 31):
        rows = z[last - WINDOW + 1:last + 1]
        apart = ((rows[:, None] - rows[None])**2).sum(axis=-1)
        kernel = np.exp(-apart / (2 * 16))
        density = kernel.sum(axis=1)
        kernel /= np.outer(density, density)
        walk = np.abs(np.linalg.eigvals(kernel / kernel.sum(axis=1, keepdims=True)))
        share = walk / walk.sum()
        assert float(found[last]) == pytest.approx(abs(-(share * np.log(share)).sum() - 1.5) / 0.2, rel=1e-3)


def test_windows_do_not_see_what_lies_outside_of_them() -> None:
    long = noise(700, WIDTH, seed=7)
    whole = over_windows(long, WINDOW, lambda gram: gram.sum(dim=(1, 2)))
    part = over_windows(long[300:], WINDOW, lambda gram: gram.sum(dim=(1, 2)))
    torch.testing.assert_close(whole[300 + WINDOW:], part[WINDOW:], rtol=1e-4, atol=1e-3)
    assert over_windows(long[:WINDOW], WINDOW, lambda gram: gram.sum(dim=(1, 2))).isnan().all()


def test_the_eigenvalues_of_noise_follow_the_law() -> None:
    """500 rows of 2000 dims; numpy's eigenvalues lie within 5 % of the quantiles, and between the edges."""
    rows = np.random.default_rng(0).standard_normal((500, 2000))
    found = np.sort(np.linalg.eigvalsh(rows @ rows.T / 2000))[::-1]
    law = marchenko_pastur(500, 500 / 2000).numpy()
    np.testing.assert_allclose(found, law, rtol=0.05)
    assert law.mean() == pytest.approx(1.0, abs=1e-3)
    assert law.max() <= (1 + 0.5)**2 and law.min() >= (1 - 0.5)**2


@pytest.mark.parametrize(("spike", "seen"), [(0.0, False), (0.1, False), (1.0, True), (6.0, True)])
def test_a_spike_is_seen_above_the_transition(spike: float, seen: bool) -> None:
    """A direction of variance 1 + spike leaves the bulk where spike is over the square root of rows over dims
    (Baik, Ben Arous, Peche 2005): here over 0.25."""
    width, rows = 1600, 100
    x = noise(rows, width, seed=8)
    x += math.sqrt(spike * width / rows) * noise(rows, 1, seed=9) @ noise(1, width, seed=10) / math.sqrt(width)
    told = statistics((x @ x.T)[None].float(), width, float(width))[0]
    assert (float(told[5]) > 0.2) == seen


@pytest.mark.parametrize(("name", "value", "message"), [
    ("scale", torch.zeros(WIDTH), "above zero"), ("variance", -torch.ones(RANK), "above zero"),
    ("window", torch.tensor(4), "8 to 128"), ("patterns", torch.full((3, 4), 0.5), r"\+1 or -1"),
    ("patterns", torch.ones(3, RANK + 1), "more bits"), ("thresholds", torch.ones(2), "expected 5"),
    ("diffusion", torch.tensor([1.0, 0.0]), "above zero"), ("spectral_mean", torch.ones(2), "axis 'q'"),
    ("basis", torch.ones(RANK, WIDTH), "orthonormal")])
def test_numbers_that_cannot_be_read_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    assert Payload.build("normality", {3: numbers()}).width == WIDTH
    with pytest.raises(InvalidPayload, match=message):
        Payload.build("normality", {3: numbers(**{name: value})})


def test_entropy_of_tokens_that_are_all_alike_is_zero() -> None:
    assert float(diffusion_entropy(torch.ones(1, WINDOW, WINDOW), 1.0)) == pytest.approx(0.0, abs=1e-6)
