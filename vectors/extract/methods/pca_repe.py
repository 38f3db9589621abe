"""RepE reading vectors: principal direction of randomly ordered differences, centred (Zou et al. 2023, arXiv
2310.01405)."""

import torch

from vectors.extract.contrastive import Contrastive
from vectors.extract.principal import principal_direction


class PcaRepe(Contrastive):
    """The order inside each pair is shuffled before differences are taken. Half of them then point the other way, their
    mean is near zero, and the centring of the original leaves the shared shift in place.
    """

    name = "pca_repe"
    summary = "RepE: first principal direction of differences in random order, centred"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        signs = balanced_signs(len(positive), generator).to(positive.dtype)
        differences = signs.unsqueeze(1) * (positive - negative)
        return principal_direction(differences - differences.mean(dim=0))


def balanced_signs(count: int, generator: torch.Generator) -> torch.Tensor:
    """+1 and -1 in random order, as many of each as `count` allows: with few pairs a lopsided draw would leave part
    of the shared shift in the mean, which centring then removes."""
    signs = torch.ones(count)
    signs[torch.randperm(count, generator=generator)[: count // 2]] = -1
    return signs


METHOD = PcaRepe()
