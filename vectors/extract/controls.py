"""What the same score is for directions that cannot know the concept."""

from collections.abc import Callable, Sequence

import torch

from vectors.extract.fit import Fitting, Sides
from vectors.extract.score import Score, oriented, score


def random_scores(train: Sides, test: Sides, generator: torch.Generator, draws: int, *, covariance: bool
                  ) -> list[Score]:
    """Held-out scores of random directions, oriented on the train split as a method's would be. A score does not depend
    on length, so the draws stand for vectors of the method's own norm.

    covariance: draw from the covariance of the activations (the harder control) instead of isotropically.
    """
    pooled = torch.cat(train)
    centred = pooled - pooled.mean(dim=0)
    scores = []
    for _ in range(draws):
        if covariance:
            direction = centred.T @ torch.randn(len(centred), generator=generator, dtype=centred.dtype)
        else:
            direction = torch.randn(centred.shape[1], generator=generator, dtype=centred.dtype)
        scores.append(score(oriented(direction, *train), *test))
    return scores


def shuffled_scores(fitting: Fitting, train: Sides, test: Sides, generator: torch.Generator, draws: int,
                    step: Callable[[float], None]) -> list[Score]:
    """Held-out scores, under the true labels, of fits on train texts whose labels and partners were dealt anew.

    Swapping the sides of pairs would not do: the axis of the pairwise methods does not change under it.
    """
    pooled = torch.cat(train)
    half = len(pooled) // 2
    scores = []
    for done in range(draws):
        step(done / draws)
        order = torch.randperm(len(pooled), generator=generator)
        dealt = pooled[order[:half]], pooled[order[half:]]
        direction = oriented(fitting(*dealt, generator), *dealt)
        scores.append(score(direction, *test))
    return scores


def summary(found: Score, draws: Sequence[Score]) -> dict[str, float]:
    """Where `found` stands among the draws. percentile: share of draws with less separation (which does not
    saturate as the AUC does), ties counting half, times 100."""
    below = sum(draw.separation < found.separation for draw in draws)
    equal = sum(draw.separation == found.separation for draw in draws)
    aucs = [draw.auc for draw in draws]
    return {"draws": len(draws), "mean_auc": round(sum(aucs) / len(aucs), 4), "max_auc": round(max(aucs), 4),
            "max_separation": round(max(draw.separation for draw in draws), 4),
            "percentile": round(100 * (below + 0.5 * equal) / len(draws), 1)}
