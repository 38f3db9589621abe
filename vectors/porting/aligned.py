"""Linear maps from the activations of one model to those of another, fitted on tokens that both read.

orthogonal: Procrustes (Schoenemann 1966), a turn and one scale for all directions; between widths that differ an
isometry of the smaller into the larger. ridge: least squares with a penalty on the size of the map. cca: both are
whitened, the whitened ones turned onto each other (canonical correlation, Hotelling 1936) and the target's spread is
put back.

A direction that is added is a difference of activations, so it goes through the map. What reads activations, a probe's
weight, goes through the transpose of the map back, because what it reads in the target is what the source would hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["orthogonal", "ridge", "cca"]
METHODS: tuple[Method, ...] = get_args(Method)
# Of the mean variance of a dimension: what is added to all of them.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Aligned:
    """there `[d_source, d_target]`: rows of centred activations of the source become those of the target. back
    `[d_target, d_source]`: the other way. float64.

    penalty: that was taken; None where the method has none.
    """

    method: Method
    there: Tensor
    back: Tensor
    source_mean: Tensor
    target_mean: Tensor
    penalty: float | None = None

    def direction(self, rows: Tensor) -> Tensor:
        """Differences of activations `[..., d_source]` as those of the target."""
        return rows.double() @ self.there

    def point(self, rows: Tensor) -> Tensor:
        """Activations `[..., d_source]` as those of the target."""
        return (rows.double() - self.source_mean) @ self.there + self.target_mean

    def reader(self, weight: Tensor) -> tuple[Tensor, float]:
        """Of a weight `[d_source]`, that of the target which reads the same, and what to add to its bias."""
        found = self.back @ weight.double()
        return found, float(self.source_mean @ weight.double() - self.target_mean @ found)

    def explained(self, source: Tensor, target: Tensor) -> float:
        """Share of the target's variance that the map gives, 1 - error / variance about the mean of the fit."""
        away = target.double() - self.target_mean
        error = away - (source.double() - self.source_mean) @ self.there
        return 1 - float(error.square().sum()) / max(float(away.square().sum()), 1e-300)


def align(source: Tensor, target: Tensor, texts: Tensor, method: Method) -> Aligned:
    """
    Args:
        source, target: activations of the same tokens, `[tokens, d]` each. texts: `[tokens]`, which text each token is
            of; the penalty is chosen on a fifth of the texts.
    """
    if method == "orthogonal":
        return _fitted(source, target, method, None)
    inner = texts % 5 == 4
    if not bool(inner.any()) or bool(inner.all()):
        return _fitted(source, target, method, PENALTIES[1])
    tried = {penalty: _fitted(source[~inner], target[~inner], method, penalty).explained(source[inner], target[inner])
             for penalty in PENALTIES}
    return _fitted(source, target, method, max(tried, key=lambda penalty: tried[penalty]))


def _fitted(source: Tensor, target: Tensor, method: Method, penalty: float | None) -> Aligned:
    s, t = source.double(), target.double()
    s_mean, t_mean = s.mean(0), t.mean(0)
    there, back = _MAPS[method](s - s_mean, t - t_mean, penalty or 0.0)
    return Aligned(method, there, back, s_mean, t_mean, penalty)


def _orthogonal(s: Tensor, t: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    u, found, v = torch.linalg.svd(s.T @ t, full_matrices=False)
    turn = u @ v
    # Of the scales between two spaces of different spread, each way has one of its own.
    return (found.sum() / ((s @ turn).square().sum()).clamp_min(1e-300) * turn,
            found.sum() / ((t @ turn.T).square().sum()).clamp_min(1e-300) * turn.T)


def _ridge(s: Tensor, t: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    return (torch.linalg.solve(_penalised(s, penalty), s.T @ t), torch.linalg.solve(_penalised(t, penalty), t.T @ s))


def _cca(s: Tensor, t: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    (s_half, s_inverse), (t_half, t_inverse) = _roots(_penalised(s, penalty)), _roots(_penalised(t, penalty))
    u, _, v = torch.linalg.svd(s_inverse @ (s.T @ t) @ t_inverse, full_matrices=False)
    return s_inverse @ u @ v @ t_half, t_inverse @ v.T @ u.T @ s_half


_MAPS: Mapping[Method, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "orthogonal": _orthogonal, "ridge": _ridge, "cca": _cca}


def _penalised(x: Tensor, penalty: float) -> Tensor:
    gram = x.T @ x
    return gram + penalty * gram.diagonal().mean().clamp_min(1e-300) * torch.eye(len(gram), dtype=gram.dtype)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of a positive matrix."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-12 * float(values.max()))
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
