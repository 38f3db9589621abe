"""Leave out the small inputs of a linear map, token by token (TEAL, arXiv 2408.14690; WINA, arXiv 2505.19427; CHESS,
arXiv 2409.01366).

The methods differ in what they call small. Of the d channels of a token x, `share` are left out:

- magnitude: those with the smallest |x_i|.
- wina: those with the smallest |x_i| n_i, with n_i the length of the column of the map that reads channel i.
- threshold: those under the channel's own threshold, the share-quantile of |x_i| over calibration tokens.
- chess: those under a threshold T_i = t / n_i, with one cut t for a layer, the share-quantile of |x_i| n_i over all
  channels and calibration tokens. The paper's activation is that of the gate, and the factor it does not know yet what
  the up projection will give; here the input of the map is whole, and what stands behind it is the column.
- random: the same channels of every token, drawn by `seed` for each layer. A control.

Of threshold and chess the share is one of calibration tokens; a token may lose more or fewer.
"""

from typing import Literal

import torch
from pydantic import Field

from steering.language.errors import InvalidSpec
from steering.ops.base import Operation, Options, Place, Row, Tensors

Method = Literal["magnitude", "wina", "threshold", "chess", "random"]
# Which numbers each method needs.
NEEDS: dict[str, tuple[str, ...]] = {"magnitude": (), "random": (), "wina": ("norm",),
                                     "chess": ("norm", "shares", "cut"), "threshold": ("shares", "thresholds")}


class SparsifyOptions(Options):
    method: Method = Field(description="What is small. wina takes the lengths of columns from the model's weights; "
                           "threshold and chess need an artifact of the kind sparsity; magnitude and random need "
                           "nothing.")
    share: float = Field(ge=0, le=0.99, allow_inf_nan=False, description="Share of the channels that is left out.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of the method random: which channels.")


class Sparsify(Operation):
    """x_i - scale x_i of the channels that are left out, x_i of the others."""

    name = "sparsify"
    options = SparsifyOptions
    kinds = ("sparsity",)
    sites = ("mlp_act", "head_out")

    def row(self, tensors: Tensors, options: SparsifyOptions, place: Place) -> Row:
        check_numbers(tensors, options.method)
        amount = torch.tensor(float(place.scale))
        if options.method in ("magnitude", "wina"):
            weight = torch.ones(place.width) if options.method == "magnitude" else tensors["norm"]
            # The count is a length: known without a look at what lies on the device.
            return Row("keep_largest", {"weight": weight, "amount": amount,
                                        "left_out": torch.zeros(1 + count_of(options.share, place.width))})
        return Row("keep_over", {"cut": cuts(tensors, options, place), "amount": amount})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: SparsifyOptions, place: Place) -> torch.Tensor:
        out = h.clone()
        for token in out:
            if options.method in ("magnitude", "wina"):
                score = token.abs() * (tensors["norm"] if options.method == "wina" else 1.0)
                small = score.argsort(stable=True)[:count_of(options.share, place.width)]
            else:
                small = (token.abs() <= cuts(tensors, options, place)).nonzero().flatten()
            token[small] -= place.scale * token[small]
        return out


def check_numbers(tensors: Tensors, method: str) -> None:
    """Raises InvalidSpec where there are not the numbers that a method needs."""
    missing = [name for name in NEEDS[method] if name not in tensors]
    if missing:
        raise InvalidSpec(f"the method {method} needs {' and '.join(missing)}, which are not given",
                          param=("options", "method"), fix="Name an artifact that trimtab measure sparsity made.")


def count_of(share: float, width: int) -> int:
    """How many of `width` channels are left out. What rounding took from a share is given back."""
    return int(share * width + 1e-6)


def cuts(tensors: Tensors, options: SparsifyOptions, place: Place) -> torch.Tensor:
    """A channel is left out where its size is not over this, `[width]`."""
    if options.method == "random":
        generator = torch.Generator().manual_seed((options.seed << 16) + place.layer)
        order = torch.randperm(place.width, generator=generator)[:count_of(options.share, place.width)]
        return torch.full((place.width,), -1.0).index_fill(0, order, torch.inf)
    if options.share == 0:
        return torch.full((place.width,), -1.0)
    if options.method == "threshold":
        return _between(tensors["shares"], tensors["thresholds"], options.share)
    cut = _between(tensors["shares"], tensors["cut"].unsqueeze(-1), options.share)
    return cut / tensors["norm"].clamp_min(1e-30)


def _between(shares: torch.Tensor, values: torch.Tensor, share: float) -> torch.Tensor:
    """`values [g, ...]` at a share between those of `shares [g]`; 0 at the share 0."""
    known = [0.0, *shares.tolist()]
    if share > known[-1] + 1e-6:
        raise InvalidSpec(f"the artifact has thresholds up to the share {known[-1]:g}", param=("options", "share"),
                          fix="Ask for less, or use magnitude or wina.")
    levels = torch.cat([torch.zeros_like(values[:1]), values])
    after = next((n for n, one in enumerate(known) if one >= share - 1e-6), len(known) - 1)
    part = (share - known[after - 1]) / (known[after] - known[after - 1])
    cut: torch.Tensor = levels[after - 1] + part * (levels[after] - levels[after - 1])
    return cut


OPERATION = Sparsify()
