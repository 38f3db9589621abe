"""How unlike normal text a model's activations are, by five forms of one artifact of the kind normality.

Of every layer the artifact holds what normal text is like there. With z = (h - mean) / scale, dim by dim, and B the
leading principal directions of z with variances v:

- residual (SubspaceAD): the part of z outside of B, as a share of what is normal there. About 1 for normal tokens.
- mahalanobis: sqrt((sum_i (b_i . z)^2 / v_i + |rest|^2 / rest) / d), the distance under a covariance that is B's inside
  and the same in all directions outside. About 1 for normal tokens.
- membership: signs of b_i . z form a pattern of bits; the share of bits in which it differs from the nearest pattern
  that normal text showed (Cheng, Nuehrenberg, Yasuoka 2019, arXiv 1809.06573).
- spectral (EigenTrack, Ettori et al. 2025, arXiv 2509.15735): of the last `window` tokens, how far six statistics of
  the spectrum of their covariance lie from those of normal text, in standard deviations. The paper trains a recurrent
  classifier on labels; there are none here, so the distance itself is the score.
- diffusion: of the last `window` tokens, the entropy of the spectrum of a diffusion operator between them
  (Liao et al. 2023, arXiv 2312.04823), in standard deviations from that of normal text.

The two that look at windows have no score (NaN) for the tokens before the first full window behind the first token.
Rows of a window are shortened to LONGEST times a normal norm, so that a sink in it does not make the spectrum alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch

Tensors = Mapping[str, torch.Tensor]
NormalForm = Literal["residual", "mahalanobis", "membership", "spectral", "diffusion"]
NORMAL_FORMS: tuple[NormalForm, ...] = get_args(NormalForm)
WINDOWED: tuple[NormalForm, ...] = ("spectral", "diffusion")
NUM_STATISTICS = 6
# Of a window: fewer tokens have no spectrum to speak of, and more cost too much for each token.
MIN_WINDOW, MAX_WINDOW = 8, 128
LONGEST = 3.0
# Windows whose Gram matrices are in memory at a time.
TOGETHER = 256
# Finer than any window's spectrum.
_GRID = 4096


def normal_scores(form: NormalForm, h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """`[T]` float32 for the activations `h [T, width]` of consecutive tokens."""
    z = standardised(h, tensors)
    return _SCORES[form](z, tensors).float()


def standardised(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    return (h.float() - tensors["mean"]) / tensors["scale"]


def _outside(z: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Squared length of what lies outside of the basis."""
    return torch.relu(z.square().sum(dim=-1) - along.square().sum(dim=-1))


def _residual(z: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    basis = tensors["basis"]
    left = max(basis.shape[1] - basis.shape[0], 1)
    return (_outside(z, z @ basis.T) / (left * tensors["rest"])).sqrt()


def _mahalanobis(z: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    along = z @ tensors["basis"].T
    inside = (along.square() / tensors["variance"]).sum(dim=-1)
    return ((inside + _outside(z, along) / tensors["rest"]) / z.shape[-1]).sqrt()


def bits(z: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """`[T, count]` of +1 and -1: on which side of the mean a token lies along each of the first directions."""
    return torch.where(z @ basis[:count].T > 0, 1.0, -1.0)


def _membership(z: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    known = tensors["patterns"]
    shown = bits(z, tensors["basis"], known.shape[1])
    return (1 - (shown @ known.T).max(dim=-1).values / known.shape[1]) / 2


def _spectral(z: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    def unusual(gram: torch.Tensor) -> torch.Tensor:
        away = (statistics(gram, z.shape[-1], float(tensors["dimension"])) - tensors["spectral_mean"])
        return ((away @ tensors["spectral_whiten"].T).square().mean(dim=-1)).sqrt()

    return over_windows(z, int(tensors["window"]), unusual)


def _diffusion(z: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    mean, spread = tensors["diffusion"][0], tensors["diffusion"][1]

    def unusual(gram: torch.Tensor) -> torch.Tensor:
        return (diffusion_entropy(gram, float(tensors["bandwidth"])) - mean).abs() / spread

    return over_windows(z, int(tensors["window"]), unusual)


def over_windows(z: torch.Tensor, window: int, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`[T]`: of each token the score of the window that ends with it; NaN where none does.

    score: takes the Gram matrices `[n, window, window]` of n windows, `x_i . x_j`, and returns `[n]`. Only the
    products of tokens that are near each other are made, so a token costs window^2 numbers and window * d products.
    """
    found = z.new_full((len(z),), math.nan)
    norm = math.sqrt(z.shape[-1])
    z = z * (LONGEST * norm / z.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    steps = torch.arange(window)
    for start in range(1, len(z) - window + 1, TOGETHER):
        count = min(TOGETHER, len(z) - window + 1 - start)
        part = z[start:start + count + window - 1]
        near = part @ part.T
        at = torch.arange(count)[:, None] + steps
        found[start + window - 1:start + window - 1 + count] = score(near[at[:, :, None], at[:, None, :]])
    return found


def statistics(gram: torch.Tensor, width: int, dimension: float) -> torch.Tensor:
    """`[n, NUM_STATISTICS]` of the spectra of windows `[n, N, N]`, centred: log of the total variance, share of the
    largest eigenvalue, log of the largest over the second, entropy as a share of the largest possible, mean distance of
    the eigenvalues from the Marchenko-Pastur law of as many independent dims as `dimension`, and what lies over the
    upper edge of that law, log(1 + sum)."""
    count = gram.shape[-1]
    centred = gram - gram.mean(dim=-1, keepdim=True) - gram.mean(dim=-2, keepdim=True) + gram.mean(
        dim=(-2, -1), keepdim=True)
    # Rows that are centred have rank N - 1.
    spectrum = torch.linalg.eigvalsh(centred.double() / width).flip(-1)[:, :count - 1].clamp_min(1e-9)
    total = spectrum.sum(dim=-1, keepdim=True)
    share = spectrum / total
    relative = spectrum / spectrum.mean(dim=-1, keepdim=True)
    law = marchenko_pastur(count - 1, (count - 1) / dimension)
    edge = (1 + math.sqrt(min((count - 1) / dimension, 1.0)))**2
    return torch.stack([
        total.squeeze(-1).log(), share[:, 0], (spectrum[:, 0] / spectrum[:, 1]).log(),
        -(share * share.log()).sum(dim=-1) / math.log(count - 1), (relative - law).abs().mean(dim=-1),
        (relative - edge).clamp_min(0).sum(dim=-1).log1p()], dim=-1).float()


def marchenko_pastur(count: int, ratio: float) -> torch.Tensor:
    """The eigenvalues `[count]`, falling, that the law of unit variance expects: its quantiles at (i + 1/2) / count.

    ratio: rows over independent dims of a matrix whose rows are multiplied with each other; above 1 it is taken for 1,
    because what is not zero is then all there is to compare.
    """
    ratio = min(ratio, 1.0)
    low, high = (1 - math.sqrt(ratio))**2, (1 + math.sqrt(ratio))**2
    # Points gather at both edges, where the density is steep.
    angle = torch.linspace(0, math.pi, _GRID, dtype=torch.float64)
    x = low + (high - low) * (1 - angle.cos()) / 2
    density = ((high - x) * (x - low)).clamp_min(0).sqrt() / x.clamp_min(1e-12)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64),
                      ((density[1:] + density[:-1]) / 2 * x.diff()).cumsum(0)])
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * mass[-1]
    at = torch.searchsorted(mass, wanted).clamp(1, _GRID - 1)
    part = (wanted - mass[at - 1]) / (mass[at] - mass[at - 1]).clamp_min(1e-30)
    return (x[at - 1] + part * (x[at] - x[at - 1])).flip(0)


def squared_distances(gram: torch.Tensor) -> torch.Tensor:
    """`[n, N, N]` between the rows whose products `gram` holds."""
    norms = gram.diagonal(dim1=-2, dim2=-1)
    return torch.relu(norms[:, :, None] + norms[:, None, :] - 2 * gram)


def diffusion_entropy(gram: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """`[n]`, in nats: entropy of the eigenvalues, as shares, of the operator that a Gaussian kernel of that bandwidth
    makes, its density divided out."""
    kernel = (-squared_distances(gram).double() / (2 * bandwidth * bandwidth)).exp()
    density = kernel.sum(dim=-1)
    kernel = kernel / (density[:, :, None] * density[:, None, :])
    degree = kernel.sum(dim=-1).sqrt()
    share: torch.Tensor = torch.linalg.eigvalsh(kernel / (degree[:, :, None] * degree[:, None, :])).abs()
    share = (share / share.sum(dim=-1, keepdim=True)).clamp_min(1e-12)
    return -(share * share.log()).sum(dim=-1).float()


_SCORES: Mapping[NormalForm, Callable[[torch.Tensor, Tensors], torch.Tensor]] = {
    "residual": _residual, "mahalanobis": _mahalanobis, "membership": _membership, "spectral": _spectral,
    "diffusion": _diffusion}
