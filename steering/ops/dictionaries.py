"""The batched forms of the op `sae`.

A row holds the changed features: decoder `[r, width]`, and `[r]` each of bias, factor, shift and low; the new value of
a feature is max(factor * value + shift, low). amount: the share of the change that is carried out. What the SAE divides
a token by, a number of `INPUT_NORMS`, and its k are lengths of tensors, `norm [n, number + 1]` and `k [n, k]`, as a
length is known without a look at what lies on the device, which would wait for it. Where the error is dropped the row
holds all features, and `k [n, k + 1]` is `[n, 1]` where there is none.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from steering.artifacts.dictionary import MOST_HELD, active, exact_pre, kth_largest, normalised
from steering.ops.kernel import Rows, kernel
from steering.ops.segments import Segmented

_RANKED = ("factor", "shift", "low")


@kernel("sae", matrices={"decoder": 0, "encoder": 0, "bias": 0, "threshold": 0, **dict.fromkeys(_RANKED, 0)})
def sae(h: Tensor, rows: Rows) -> Tensor:
    """Features whose values depend on their own row of the encoder alone: encoder `[n, r, width]`, threshold `[n, r]`.
    """
    return torch.cat([_changed(tokens, active(exact_pre(tokens, own["encoder"], own["bias"], _norm(own)),
                                              own["threshold"], None), own) for tokens, own in _groups(h, rows)])


@kernel("sae_topk", matrices={"decoder": 0, "encoder": 0, "bias": 0, **dict.fromkeys(_RANKED, 0)})
def sae_topk(h: Tensor, rows: Rows) -> Tensor:
    """Features of which the k largest are kept: all `[n, m, width]` and all_bias `[n, m]` are of every feature, encoder
    `[n, r, width]` and bias of the changed ones."""
    return torch.cat([_changed(tokens, _largest(tokens, own), own) for tokens, own in _groups(h, rows)])


@kernel("sae_whole", matrices={})
def sae_whole(h: Tensor, rows: Rows) -> Tensor:
    """The reconstruction of changed features in the place of the activation: encoder, decoder `[n, m, width]`, bias,
    threshold `[n, m]` of every feature, centre `[n, width]`."""
    return torch.cat([_reconstructed(tokens, own) for tokens, own in _groups(h, rows)])


def _reconstructed(h: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    k = len(own["k"]) - 1
    parts = []
    for part in torch.split(h, max(1, MOST_HELD // len(own["decoder"]))):
        pre = exact_pre(part, own["encoder"], own["bias"], _norm(own))
        value = active(pre, None, k) if k else active(pre, own["threshold"], None)
        parts.append(torch.maximum(own["factor"] * value + own["shift"], own["low"]) @ own["decoder"] + own["centre"])
    centred, _, outward = normalised(h, _norm(own))
    return h + own["amount"] * (torch.cat(parts) * outward - centred)


def _largest(h: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    pre = exact_pre(h, own["encoder"], own["bias"], _norm(own))
    least = kth_largest(h, own["all"], own["all_bias"], len(own["k"]), _norm(own))
    return torch.where(pre >= least, pre, 0.0).relu()


def _changed(h: Tensor, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """`h [n, width]`, whose changed features have the values `[n, r]`, with the new ones. A token of which none changes
    keeps its bits."""
    target = torch.maximum(own["factor"] * value + own["shift"], own["low"])
    change = own["amount"] * (target - value)
    _, _, outward = normalised(h, _norm(own))
    return torch.where((change != 0).any(-1, keepdim=True), h + outward * (change @ own["decoder"]), h)


def _norm(own: Mapping[str, Tensor]) -> int:
    return len(own["norm"]) - 1


def _groups(h: Tensor, rows: Rows) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """The tokens of each distinct row, in order, with its numbers."""
    if isinstance(rows, Segmented) and rows.segments is not None:
        for row, run in rows.segments.runs():
            yield h[run], {name: rows.whole(name)[row] for name in rows}
        return
    count = len(rows["decoder"])
    for n in range(count):
        yield h if count == 1 else h[n:n + 1], {name: rows[name][n] for name in rows}
