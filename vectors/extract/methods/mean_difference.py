"""Difference of class means: CAA, and the candidates of the refusal-direction method (methods/20a)."""

import torch

from vectors.extract.contrastive import Contrastive


class MeanDifference(Contrastive):
    name = "mean_difference"
    summary = "mean of the positive texts minus mean of the negative ones"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return positive.mean(dim=0) - negative.mean(dim=0)


METHOD = MeanDifference()
