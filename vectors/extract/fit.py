"""The direction of one layer: fitted and oriented on train, scored on dev and test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vectors.extract.contract import Split
from vectors.extract.refusals import ConstantActivations, FitFailed
from vectors.extract.score import Score, oriented, score

Sides = tuple[torch.Tensor, torch.Tensor]
"""Activations `[num_pairs, d]` float64 of the positive and of the negative texts, row i is pair i."""

Fitting = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
"""A direction `[d]` of any length and sign from both sides."""

# Below this share of the activations' own size, differences are rounding of float32 and nothing else.
ROUNDING = 1e-6


@dataclass(frozen=True)
class LayerFit:
    """vector: `[d]` float64, positive class larger, as long as the class means are apart along it.
    sigma: standard deviation of all train texts' projections on the unit direction. coordinates: where those of each
    side lie, as bounds to clamp to: "positive" and "negative", each with mean and 5th and 95th percentile.
    """

    layer: int
    vector: torch.Tensor
    sigma: float
    dev: Score
    test: Score
    coordinates: Mapping[str, Mapping[str, float]]


def fit_layer(fitting: Fitting, layer: int, rows: Mapping[Split, Sides], generator: torch.Generator) -> LayerFit:
    """Raises:
        ConstantActivations: nothing varies at this layer.
        FitFailed: the method found no direction, or one along which the class means do not differ.
    """
    train = rows["train"]
    pooled = torch.cat(train)
    size = float(pooled.abs().max())
    if float((pooled - pooled[0]).abs().max()) <= ROUNDING * size:
        raise ConstantActivations(f"at layer {layer} all texts have the same activation", param="layers",
                                  fix="Leave that layer out, or read another token.")
    direction = oriented(fitting(*train, generator), *train)
    unit = direction / direction.norm()
    projections = pooled @ unit
    apart = float((train[0] @ unit).mean() - (train[1] @ unit).mean())
    # The vote that orients goes by pairs; where a few large pairs outweigh it, the means may lie the other way.
    length = abs(apart)
    if not length > ROUNDING * size:
        raise FitFailed(f"at layer {layer} the classes have the same mean along the direction found", param="pairs",
                        fix="Use more pairs, or the method mean_difference.")
    return LayerFit(layer, unit * length, float(projections.std(correction=0)),
                    score(unit, *rows["dev"]),
                    score(unit, *rows["test"]),
                    {side: _range(rows @ unit) for side, rows in zip(("positive", "negative"), train, strict=True)})


def _range(coordinates: torch.Tensor) -> dict[str, float]:
    low, high = torch.quantile(coordinates, torch.tensor([0.05, 0.95], dtype=coordinates.dtype)).tolist()
    return {"mean": _rounded(float(coordinates.mean())), "p5": _rounded(low), "p95": _rounded(high)}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
