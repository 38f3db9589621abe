"""Direction of a logistic probe: regularised logistic regression on standardised activations."""

import warnings

import torch

from vectors.extract.contrastive import Contrastive
from vectors.extract.refusals import FitFailed
from vectors.extras import extra

MAX_ITERATIONS = 2000
# Activations have more dims than there are pairs: at scikit-learn's own 1.0 the weights follow the noise.
INVERSE_PENALTY = 0.01


class LogisticProbe(Contrastive):
    """The weights are mapped back from standardised to raw activations. Best for reading; as a steering direction it
    leans towards dims of low variance, so compare it with mean_difference at equal effect.
    """

    name = "logistic_probe"
    summary = "weights of a logistic regression on standardised activations"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with extra("probes"):
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import LogisticRegression
        x = torch.cat([positive, negative])
        # Within the classes: the spread that the concept itself makes must not shrink the dims that carry it.
        scale = ((positive.var(dim=0) + negative.var(dim=0)) / 2).sqrt()
        live = scale > 0
        scale = torch.where(live, scale, torch.ones_like(scale))
        labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
        regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                regression.fit(((x - x.mean(dim=0)) / scale).numpy(), labels.numpy())
            except ConvergenceWarning as error:
                raise FitFailed(f"the logistic regression did not converge in {MAX_ITERATIONS} steps", param="method",
                                fix="Use another method, or more pairs.") from error
        return torch.from_numpy(regression.coef_[0]).to(x.dtype) / scale * live


METHOD = LogisticProbe()
