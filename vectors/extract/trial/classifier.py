"""The grader that a trial makes for itself: a classifier of the pairs' positive against their negative texts.

A text is read alone by the untouched model: the mean activation of its tokens (without the first) at one layer, on
which a logistic regression is fitted. The layer with the best held-out accuracy is taken. Whatever steered the model
when it wrote the text is not there when it is read, so that only what is written can tell.

What the untouched model writes anyway may already lean to one side. A text is therefore a success where it lies nearer
to the positive texts than to what is usual, and on the positive side at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.language.vocabulary import Site
from vectors.extract.subject import Subject, Tokens, stream
from vectors.extras import extra

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

SITE: Site = "resid_post"
FOLDS = 5
INVERSE_PENALTY = 0.01


@dataclass(frozen=True)
class Classifier:
    """accuracy: of texts not fitted on, 0.5 for a coin. positive: median score of the pairs' positive texts."""

    subject: Subject
    layer: int
    mean: torch.Tensor
    weight: torch.Tensor
    bias: float
    accuracy: float
    positive: float

    def scores(self, texts: Sequence[str], step: Callable[[float], None]) -> list[float]:
        """Log-odds of being a positive text, 0 for an empty one."""
        tokens = [self.subject.encode(text) if text.strip() else () for text in texts]
        some = [n for n, ids in enumerate(tokens) if ids]
        found = [0.0] * len(texts)
        if not some:
            return found
        rows = read(self.subject, [tokens[n] for n in some], [self.layer], step)[self.layer]
        for n, row in zip(some, rows, strict=True):
            found[n] = float((row - self.mean) @ self.weight) + self.bias
        return found

    def threshold(self, usual: Sequence[float]) -> float:
        """Half way from what the untouched model writes to what the positive texts are, and above 0."""
        return max(0.0, (median(usual) + self.positive) / 2)


def read(subject: Subject, texts: Sequence[Tokens], layers: Sequence[int], step: Callable[[float], None]
         ) -> dict[int, torch.Tensor]:
    """layer -> mean activation of each text, without its first position, `[num_texts, d]` float64."""
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for _, found in stream(subject, texts, SITE, layers, None, step):
        for layer in layers:
            h = found[layer].double()
            rows[layer].append((h[1:] if len(h) > 1 else h).mean(dim=0))
    return {layer: torch.stack(own) for layer, own in rows.items()}


def fit(subject: Subject, positive: Sequence[str], negative: Sequence[str], step: Callable[[float], None]
        ) -> Classifier:
    """From texts of either side."""
    offered = sorted(subject.facts.sites[SITE])
    layers = sorted({offered[round(share * (len(offered) - 1))] for share in (0.3, 0.5, 0.7)})
    rows = read(subject, [subject.encode(text) for text in (*positive, *negative)], layers, step)
    labels = np.array([1] * len(positive) + [0] * len(negative))
    folds = min(FOLDS, len(positive), len(negative))
    best: tuple[float, int] | None = None
    for layer, x in rows.items():
        # Pairs lie side by side in both halves, so that a fold without shuffling holds whole stretches of them.
        order = np.argsort(np.concatenate([np.arange(len(positive)), np.arange(len(negative))]), kind="stable")
        said = _held_out(_regression(), _scaled(x)[0].numpy()[order], labels[order], cv=folds)
        accuracy = float((said == labels[order]).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, layer
    assert best is not None
    accuracy, layer = best
    x, mean, size = _scaled(rows[layer])
    fitted = _regression().fit(x.numpy(), labels)
    scores = fitted.decision_function(x.numpy())
    return Classifier(subject, layer, mean, torch.from_numpy(fitted.coef_[0]) / size, float(fitted.intercept_[0]),
                      round(accuracy, 4), median(scores[:len(positive)].tolist()))


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = x.mean(dim=0)
    size = x.std(dim=0).clamp_min(1e-6 * float(x.abs().max()))
    return (x - mean) / size, mean, size


def _held_out(*given: Any, **options: Any) -> Any:
    """scikit-learn's `cross_val_predict`. Raises ExtraMissing: it is not installed."""
    with extra("probes"):
        from sklearn.model_selection import cross_val_predict
    return cross_val_predict(*given, **options)


def _regression() -> "LogisticRegression":
    """Raises ExtraMissing: scikit-learn is not installed."""
    with extra("probes"):
        from sklearn.linear_model import LogisticRegression
    return LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
