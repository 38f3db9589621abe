"""A sparse autoencoder: what its features are of an activation, and what they make of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.artifacts.payload import INPUT_NORMS

# What is added to the standard deviation that a token is divided by, as SAELens has it.
EPSILON = 1e-5
# Pre-activations of so many tokens times features are held at once.
MOST_HELD = 2**24


@dataclass(frozen=True)
class Dictionary:
    """The SAE of one layer, whose tensors are those of a payload of the kind `sae`.

    f = act(E n(x) + b), and x is about n^-1(D^T f + c), with the encoder E and the decoder D `[m, width]`.
    act: where there is a k, ReLU of the k largest and 0 for the others; else v where v > threshold and v > 0, without a
    threshold ReLU. n divides a token by a number of its own: nothing (0), norm / sqrt(width) (1), or what is left of it
    without its mean by its standard deviation (2).
    """

    tensors: Mapping[str, Tensor]

    @property
    def num_features(self) -> int:
        return len(self.tensors["decoder"])

    @property
    def k(self) -> int | None:
        return int(self.tensors["k"]) if "k" in self.tensors else None

    @property
    def norm(self) -> int:
        return int(self.tensors["input_norm"]) if "input_norm" in self.tensors else INPUT_NORMS["none"]

    def features(self, h: Tensor) -> Tensor:
        """`[T, m]` float32 for `h [T, width]`. Memory for all of them is the caller's concern."""
        t = self.tensors
        centred, inward, _ = normalised(h.float(), self.norm)
        found = torch.empty(len(h), self.num_features, device=h.device)
        step = max(1, MOST_HELD // self.num_features)
        for start in range(0, len(h), step):
            part = slice(start, start + step)
            pre = (centred[part] / inward[part]) @ t["encoder"].T + t["encoder_bias"]
            found[part] = active(pre, t.get("threshold"), self.k)
        return found

    def feature(self, h: Tensor, index: int) -> Tensor:
        """`[T]`: one feature, to the bit as an edit of the feature sees it."""
        return self.some(h, torch.tensor([index]))[:, 0]

    def some(self, h: Tensor, index: Tensor) -> Tensor:
        """`[T, len(index)]`: chosen features, to the bit as edits see them."""
        t, h = self.tensors, h.float()
        pre = self.pre(h, index)
        if self.k is None:
            threshold = t["threshold"][index] if "threshold" in t else torch.zeros(len(index))
            return active(pre, threshold, None)
        return torch.where(pre >= kth_largest(h, t["encoder"], t["encoder_bias"], self.k, self.norm), pre, 0.0).relu()

    def pre(self, h: Tensor, index: Tensor) -> Tensor:
        """`[T, len(index)]`: their pre-activations, which are the values of those that are active."""
        return exact_pre(h.float(), self.tensors["encoder"][index], self.tensors["encoder_bias"][index], self.norm)

    def reconstruction(self, h: Tensor) -> Tensor:
        """`[T, width]`: `h` as the features have it."""
        centred, _, outward = normalised(h.float(), self.norm)
        mean = h.float() - centred
        parts = [self.features(part) @ self.tensors["decoder"] + self.tensors["decoder_bias"]
                 for part in torch.split(h, max(1, MOST_HELD // self.num_features))]
        return torch.cat(parts) * outward + mean


def normalised(h: Tensor, norm: int) -> tuple[Tensor, Tensor, Tensor]:
    """`h [T, width]` as far as it is centred, what it is divided by and what a reconstruction is multiplied by, both
    `[T, 1]`."""
    one = torch.ones(len(h), 1, dtype=h.dtype, device=h.device)
    if norm == INPUT_NORMS["constant"]:
        length = h.norm(dim=-1, keepdim=True) / math.sqrt(h.shape[-1])
        return h, length, length
    if norm == INPUT_NORMS["layer"]:
        centred = h - h.mean(dim=-1, keepdim=True)
        deviation = centred.std(dim=-1, keepdim=True)
        return centred, deviation + EPSILON, deviation
    return h, one, one


def active(pre: Tensor, threshold: Tensor | None, k: int | None) -> Tensor:
    """Features of pre-activations `[T, m]`."""
    if k is None:
        return pre.relu() if threshold is None else torch.where(pre > threshold, pre, 0.0).relu()
    values, where = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, where, values.relu())


def exact_pre(h: Tensor, encoder: Tensor, bias: Tensor, norm: int) -> Tensor:
    """Pre-activations `[T, r]` float32 of `h [T, width]`, taken in double precision.

    So they do not depend on how many tokens are multiplied at once: the value that is read of a feature is the one that
    an edit finds there.
    """
    centred, inward, _ = normalised(h.double(), norm)
    return (centred @ encoder.double().T / inward + bias.double()).float()


def kth_largest(h: Tensor, encoder: Tensor, bias: Tensor, k: int, norm: int) -> Tensor:
    """`[T, 1]`: the k-th largest pre-activation of each token, so that those at or above it are the k largest."""
    centred, inward, _ = normalised(h, norm)
    step = max(1, MOST_HELD // len(encoder))
    parts = []
    for start in range(0, len(h), step):
        part = slice(start, start + step)
        pre = (centred[part] / inward[part]) @ encoder.T + bias
        parts.append(pre.topk(k, dim=-1).values[:, -1:])
    found = torch.cat(parts)
    # The k-th largest is itself one of those that are compared with it, in another precision.
    return found - found.abs() * 1e-6
