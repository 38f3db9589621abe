"""Where a measured number stands among the same number for things that cannot know the concept."""

import math
from collections.abc import Sequence
from typing import Any

import torch


def standing(found: float, draws: Sequence[float]) -> dict[str, Any]:
    """percentile: share of draws below `found`, ties counting half, times 100."""
    below = sum(draw < found for draw in draws) + 0.5 * sum(draw == found for draw in draws)
    return {"found": rounded(found), "draws": len(draws), "mean": rounded(sum(draws) / len(draws)),
            "min": rounded(min(draws)), "max": rounded(max(draws)), "percentile": round(100 * below / len(draws), 1)}


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Chance that a random positive scores above a random negative one; ties count half. Both `[n]`."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, positive.contiguous(), right=True)
    return float((below + not_above).double().mean()) / (2 * len(negative))


def auc_error(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Standard error of `auc` of two `[n]`, after DeLong et al. 1988: each side's sampling counts, so that it says what
    a sample of the negatives leaves open too. 0 where every positive scores above every negative."""
    sides = []
    for own, other in ((positive, negative), (negative, positive)):
        ordered = other.sort().values
        places = (torch.searchsorted(ordered, own.contiguous(), right=False)
                  + torch.searchsorted(ordered, own.contiguous(), right=True)).double() / (2 * len(other))
        sides.append(float(places.var(correction=min(1, len(own) - 1))) / len(own))
    return float(sum(sides) ** 0.5)


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` draws."""
    return float((share * (1 - share) / count) ** 0.5)


def mean_error(values: torch.Tensor) -> float:
    """Standard error of the mean of `[n]`; 0 of one value."""
    return float(values.double().std(correction=min(1, len(values) - 1))) / math.sqrt(len(values))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's r of two `[n]`; 0 where one of them does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def random_like(vector: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An isotropic random vector of the same length."""
    draw = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    scaled: torch.Tensor = draw * (vector.double().norm() / draw.norm())
    return scaled
