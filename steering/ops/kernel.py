"""Kernels: what ops come down to on a batch. Several ops share one; a registry refuses duplicates.

A kernel acts on `h [n, width]`, one row of numbers for every token: `rows[name][i]` belongs to `h[i]`; or with one row
for all of them, `rows[name] [1, ...]`. Where rows hold matrices it multiplies by `segments.down` and `segments.up`,
which copy none of them. It computes in float32 and is free of Python work per token, so one call serves tokens of many
requests.
"""

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Protocol

import torch

Rows = Mapping[str, torch.Tensor]
GATED = "gated:"


class Kernel(Protocol):
    def __call__(self, h: torch.Tensor, rows: Rows) -> torch.Tensor:
        """New values for `h [n, width]` (float32), given one row per token or one for all."""
        ...


_KERNELS: dict[str, Kernel] = {}
_RANKED: dict[str, Mapping[str, int]] = {}


def kernel(name: str, matrices: Mapping[str, int] | None = None) -> Callable[[Kernel], Kernel]:
    """Register a kernel under `name`.

    matrices: given where a row holds matrices, so that tokens are to be sorted by row. It names the tensors that have a
    rank and which of their axes that is, where zeros may be added to the rank and change nothing.
    """

    def register(function: Kernel) -> Kernel:
        if name in _KERNELS:
            raise ValueError(f"kernel {name!r} is registered twice")
        _KERNELS[name] = function
        if matrices is not None:
            _RANKED[name] = matrices
        return function

    return register


def get_kernel(name: str) -> Kernel:
    """The kernel, or for "gated:NAME" the kernel NAME on the tokens whose condition holds."""
    if name.startswith(GATED):
        return _gated(name.removeprefix(GATED))
    return _KERNELS[name]


@cache
def _gated(name: str) -> Kernel:
    """gate_weight `[n, width]`, gate_bias `[n]`: a token keeps its value, bit for bit, unless weight . h + bias > 0.

    Where the score is not finite the condition cannot be decided. The token becomes NaN then, which is reported as an
    overflow of the op.
    """

    inner = _KERNELS[name]

    def kernel(h: torch.Tensor, rows: Rows) -> torch.Tensor:
        score = (h * rows["gate_weight"]).sum(-1) + rows["gate_bias"]
        gated = torch.where((score > 0).unsqueeze(-1), inner(h, rows), h)
        return gated.masked_fill(~score.isfinite().unsqueeze(-1), torch.nan)

    return kernel


def has_matrices(name: str) -> bool:
    """Whether the rows of a kernel hold matrices."""
    return name.removeprefix(GATED) in _RANKED


def rank_axes(name: str) -> Mapping[str, int]:
    """The tensors of a kernel that can be padded to a higher rank, with the axis of each."""
    return _RANKED.get(name.removeprefix(GATED), MappingProxyType({}))


def kernel_names() -> tuple[str, ...]:
    return tuple(sorted(_KERNELS))
