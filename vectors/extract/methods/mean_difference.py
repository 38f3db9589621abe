"""Difference of class means, as in CAA (Rimsky et al. 2024, arXiv 2312.06681) and among the candidates of the
refusal-direction method (Arditi et al. 2024, arXiv 2406.11717)."""

import torch

from vectors.extract.contrastive import Contrastive


class MeanDifference(Contrastive):
    name = "mean_difference"
    summary = "mean of the positive texts minus mean of the negative ones"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return positive.mean(dim=0) - negative.mean(dim=0)


METHOD = MeanDifference()
