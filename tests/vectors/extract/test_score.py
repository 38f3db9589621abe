"""Scores against scikit-learn and by hand; controls stand where chance does."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from vectors.extract.controls import random_scores, summary
from vectors.extract.score import Score, oriented, score
from vectors.extract.standing import auc, auc_error


def drawn(seed: int, count: int = 30, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that ties occur.
    p, n = torch.randint(-2, 3, (2, count, width), generator=generator).double()
    return p, n


@pytest.mark.parametrize("seed", range(8))
def test_auc_equals_scikit_learn_ties_included(seed: int) -> None:
    positive, negative = drawn(seed)
    direction = torch.tensor([1.0, 1.0, 0, 0, -1.0, 0], dtype=torch.float64)
    labels = [1] * 30 + [0] * 30
    expected = roc_auc_score(labels, (torch.cat([positive, negative]) @ direction).numpy())
    found = score(direction, positive, negative)
    assert found.auc == pytest.approx(expected)
    wins = [(1.0 if p > n else 0.5 if p == n else 0.0)
            for p, n in zip(positive @ direction, negative @ direction, strict=True)]
    assert found.pair_accuracy == pytest.approx(sum(wins) / 30)
    assert len(set(wins)) == 3


def test_separation_is_in_within_class_deviations() -> None:
    positive = torch.tensor([[4.0], [6.0]], dtype=torch.float64)
    negative = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert score(torch.ones(1, dtype=torch.float64), positive, negative).separation == pytest.approx(5.0)


def test_classes_without_spread_have_a_finite_separation() -> None:
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert 0 < score(torch.ones(2, dtype=torch.float64), ones, -ones).separation < float("inf")
    assert score(torch.ones(2, dtype=torch.float64), ones, ones).separation == 0.0


def test_most_pairs_decide_the_sign_even_against_the_mean() -> None:
    positive = torch.tensor([[1.0], [1.0], [-9.0]], dtype=torch.float64)
    negative = torch.zeros(3, 1, dtype=torch.float64)
    assert float(oriented(torch.tensor([-1.0], dtype=torch.float64), positive, negative)) == 1.0
    # A tie of votes goes by the means.
    assert float(oriented(torch.tensor([1.0], dtype=torch.float64), positive[1:], negative[1:])) == -1.0


@pytest.mark.parametrize("covariance", [True, False])
def test_random_directions_score_about_one_half_where_there_is_nothing(covariance: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    train = torch.randn(200, 16, generator=generator).double(), torch.randn(200, 16, generator=generator).double()
    test = torch.randn(200, 16, generator=generator).double(), torch.randn(200, 16, generator=generator).double()
    aucs = [draw.auc for draw in random_scores(train, test, generator, 20, covariance=covariance)]
    assert len(aucs) == 20
    assert len(set(aucs)) == 20
    assert all(0.4 < auc < 0.6 for auc in aucs)


def test_draws_from_the_covariance_lie_where_the_activations_vary() -> None:
    """One dim carries both the class and nearly all variance: covariance draws find it, isotropic ones less."""
    generator = torch.Generator().manual_seed(4)
    spread = torch.ones(64, dtype=torch.float64)
    spread[0] = 0.5

    def sides() -> tuple[torch.Tensor, torch.Tensor]:
        positive, negative = torch.randn(2, 300, 64, generator=generator).double() * spread
        positive[:, 0] += 20
        return positive, negative

    train, test = sides(), sides()
    hard = random_scores(train, test, generator, 20, covariance=True)
    easy = random_scores(train, test, generator, 20, covariance=False)
    assert sum(draw.auc for draw in hard) > sum(draw.auc for draw in easy)


def test_percentile_counts_ties_half() -> None:
    draws = [Score(auc=auc, pair_accuracy=1.0, separation=separation)
             for auc, separation in ((0.5, 0.1), (0.6, 0.2), (0.8, 3.0), (0.9, 4.0))]
    assert summary(Score(auc=1.0, pair_accuracy=1.0, separation=3.0), draws) == {
        "draws": 4, "mean_auc": 0.7, "max_auc": 0.9, "max_separation": 4.0, "percentile": 62.5}


def test_the_error_of_an_auc_is_the_spread_over_samples() -> None:
    generator = torch.Generator().manual_seed(1)

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.randn(15, generator=generator, dtype=torch.float64) + 1,
                torch.randn(60, generator=generator, dtype=torch.float64))

    drawn_errors = [auc_error(*sample()) for _ in range(400)]
    spread = float(torch.tensor([auc(*sample()) for _ in range(2000)]).std())
    assert sum(drawn_errors) / 400 == pytest.approx(spread, rel=0.1)
    more = [auc_error(torch.linspace(0, 3, n, dtype=torch.float64), torch.linspace(-2, 2, n, dtype=torch.float64))
            for n in (20, 80)]
    assert more[1] == pytest.approx(more[0] / 2, rel=0.15)
