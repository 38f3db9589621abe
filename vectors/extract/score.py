"""How well a direction tells held-out positives from negatives."""

from dataclasses import asdict, dataclass

import torch

from vectors.extract.standing import auc


@dataclass(frozen=True)
class Score:
    """auc: chance that a random positive text projects above a random negative one (ties count half).
    pair_accuracy: share of pairs whose positive text projects above its negative one (ties count half).
    separation: distance of the class means in pooled within-class standard deviations; does not saturate as auc does.
    """

    auc: float
    pair_accuracy: float
    separation: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def score(direction: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> Score:
    """direction `[d]`; positive, negative `[num_pairs, d]`, row i is pair i."""
    p, n = positive @ direction, negative @ direction
    pooled = ((p.var(correction=0) + n.var(correction=0)) / 2).sqrt()
    gap = float(p.mean() - n.mean())
    # A spread of zero with a gap would be an infinite separation, which JSON cannot say.
    floor = 1e-9 * float(torch.cat([p, n]).abs().max())
    separation = 0.0 if gap == 0 else gap / max(float(pooled), floor)
    return Score(auc=auc(p, n), pair_accuracy=float(_wins(p - n).mean()), separation=separation)


def oriented(direction: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """`direction` or its negative, so that most positive texts project above their negative partner; a tie goes by the
    class means."""
    differences = (positive - negative) @ direction
    votes = int(torch.sign(differences).sum())
    if votes < 0 or (votes == 0 and float(differences.mean()) < 0):
        return -direction
    return direction


def _wins(difference: torch.Tensor) -> torch.Tensor:
    return (difference > 0).double() + 0.5 * (difference == 0).double()
