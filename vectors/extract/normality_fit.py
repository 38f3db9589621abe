"""The numbers of a normality artifact, from activations: what tokens are like, what windows of them are like, and the
thresholds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steering.artifacts.normality import (
    NORMAL_FORMS,
    WINDOWED,
    NormalForm,
    bits,
    diffusion_entropy,
    normal_scores,
    over_windows,
    squared_distances,
    standardised,
    statistics,
)
from vectors.extract.refusals import TooFewExamples
from vectors.extract.standing import rounded

MOST_BITS, MOST_PATTERNS = 24, 512
# Fewer tokens than this per direction do not tell what lies outside of them.
TOKENS_PER_DIRECTION = 4
MOST_DIRECTIONS = 64
# Share of normal texts whose mean may pass the threshold of a gate.
TEXT_ALARMS = 0.01
Numbers = dict[str, torch.Tensor]
Captured = Iterable[tuple[int, Mapping[int, torch.Tensor]]]
"""(number of the text, layer -> `[T, width]`), a text at a time."""


@dataclass
class Moments:
    """Count, sum `[d]` and sum of products `[d, d]` of the tokens of a layer."""

    count: int
    total: torch.Tensor
    products: torch.Tensor

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, h: torch.Tensor) -> None:
        """`h [n, d]`"""
        h = h.double()
        self.count += len(h)
        self.total += h.sum(dim=0)
        self.products += h.T @ h

    def fit(self) -> dict[str, torch.Tensor]:
        """mean, scale, basis, variance and rest of a normality artifact."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean[None, :]
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        # A dim that does not vary would make any step along it infinitely far.
        scale = deviation.clamp_min(1e-3 * float(deviation.mean()) + 1e-12)
        spectrum, vectors = torch.linalg.eigh(covariance / (scale[:, None] * scale[None, :]))
        width = len(mean)
        rank = max(1, min(MOST_DIRECTIONS, width // 2, self.count // TOKENS_PER_DIRECTION))
        floor = 1e-6 * float(spectrum.clamp_min(0).mean())
        variance = spectrum.flip(0)[:rank].clamp_min(floor)
        rest = spectrum.flip(0)[rank:].clamp_min(0).mean().clamp_min(floor)
        positive = spectrum.clamp_min(0)
        return {"mean": mean, "scale": scale, "basis": vectors.flip(1)[:, :rank].T.contiguous(), "variance": variance,
                "rest": rest, "dimension": positive.sum()**2 / positive.square().sum()}


def fitted(found: Captured, num_texts: int, layers: Sequence[int], width: int, window: int) -> dict[int, Numbers]:
    """What tokens are like, per layer. The first token of each text is left out.

    Raises:
        TooFewExamples: there is no other.
    """
    moments = {layer: Moments.empty(width) for layer in layers}
    # A pattern needs the directions, so some tokens are kept until they are known.
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    each = max(1, math.ceil(4 * MOST_PATTERNS / num_texts))
    for _, captured in found:
        for layer, h in captured.items():
            if len(h) > 1:
                moments[layer].add(h[1:])
                kept[layer].append(h[1:][torch.linspace(0, len(h) - 2, min(each, len(h) - 1)).long()])
    if not moments[layers[0]].count:
        raise TooFewExamples("the texts have no token but the first", param="prompts")
    numbers: dict[int, Numbers] = {}
    for layer in layers:
        made = {name: tensor.float() for name, tensor in moments[layer].fit().items()}
        count = min(MOST_BITS, len(made["basis"]))
        shown = bits(standardised(torch.cat(kept[layer]), made), made["basis"], count)
        distinct, often = torch.unique(shown, dim=0, return_counts=True)
        most = often.argsort(descending=True, stable=True)[:MOST_PATTERNS]
        numbers[layer] = {**made, "patterns": distinct[most], "window": torch.tensor(window)}
    return numbers


def describe(found: Captured, numbers: Mapping[int, Numbers], window: int, false_alarms: float) -> dict[int, float]:
    """Add what windows of texts are like that were not fitted, and the thresholds of tokens. Per layer the threshold of
    the mean of a text, in the form mahalanobis.

    Raises:
        TooFewExamples: there are too few full windows.
    """
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in numbers}
    for _, captured in found:
        for layer, h in captured.items():
            seen[layer].append(h)
    of_texts: dict[int, float] = {}
    for layer, held in numbers.items():
        _describe_windows(held, seen[layer], window)
        scores = {form: [told_of(form, h, held) for h in seen[layer]] for form in NORMAL_FORMS}
        held["thresholds"] = torch.stack([quantile(torch.cat(scores[form]), false_alarms) for form in NORMAL_FORMS])
        of_texts[layer] = rounded(float(quantile(means(scores["mahalanobis"]), TEXT_ALARMS)))
    return of_texts


def _describe_windows(held: Numbers, texts: Sequence[torch.Tensor], window: int) -> None:
    rows = [standardised(h, held) for h in texts]
    width, dimension = held["basis"].shape[1], float(held["dimension"])
    told: list[torch.Tensor] = []
    spreads: list[torch.Tensor] = []

    def look(gram: torch.Tensor) -> torch.Tensor:
        told.append(statistics(gram, width, dimension))
        spreads.append(squared_distances(gram).flatten(1).median(dim=1).values)
        return gram.new_zeros(len(gram))

    for z in rows:
        over_windows(z, window, look)
    if (count := sum(map(len, told))) < 4 * window:
        raise TooFewExamples(f"dev texts have {count} full windows, {4 * window} are the least", param="prompts",
                             fix="Give more or longer texts, or a smaller window.")
    every = torch.cat(told).double()
    bandwidth = float(torch.cat(spreads).median().clamp_min(1e-9).sqrt())
    entropy = torch.cat([found[~found.isnan()] for found in (
        over_windows(z, window, lambda gram: diffusion_entropy(gram, bandwidth)) for z in rows)])
    held |= {"spectral_mean": every.mean(dim=0).float(), "bandwidth": torch.tensor(bandwidth),
             "spectral_whiten": whitening(every - every.mean(dim=0)).float(),
             "diffusion": torch.stack([entropy.mean(), entropy.std().clamp_min(1e-4)])}


def whitening(rows: torch.Tensor) -> torch.Tensor:
    """`[q, q]`: rows times its transpose have variance 1 in all directions."""
    covariance = rows.T @ rows / len(rows)
    spectrum, vectors = torch.linalg.eigh(covariance)
    scales = spectrum.clamp_min(1e-6 * float(spectrum.max()) + 1e-12).rsqrt()
    found: torch.Tensor = vectors * scales @ vectors.T
    return found


def told_of(form: NormalForm, h: torch.Tensor, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scores of a text's tokens that have one, without the first token."""
    scores = normal_scores(form, h, held)
    return scores[max(1, int(held["window"]) if form in WINDOWED else 1):]


def quantile(scores: torch.Tensor, share: float) -> torch.Tensor:
    """What that share of the scores is above of."""
    ordered = scores.double().sort().values
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * (1 - share)))].float()


def means(texts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([scores.mean() for scores in texts if len(scores)])
