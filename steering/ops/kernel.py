"""Kernels: what ops come down to on a batch. Several ops share one; a registry refuses duplicates.

A kernel acts on `h [n, width]`, one row of numbers for every token: `rows[name][i]` belongs to `h[i]`. It computes in
float32 and is free of Python work per token, so one call serves tokens of many requests.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Rows = Mapping[str, torch.Tensor]


class Kernel(Protocol):
    def __call__(self, h: torch.Tensor, rows: Rows) -> torch.Tensor:
        """New values for `h [n, width]` (float32), given one row per token."""
        ...


_KERNELS: dict[str, Kernel] = {}


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Register a kernel under `name`."""

    def register(function: Kernel) -> Kernel:
        if name in _KERNELS:
            raise ValueError(f"kernel {name!r} is registered twice")
        _KERNELS[name] = function
        return function

    return register


def get_kernel(name: str) -> Kernel:
    return _KERNELS[name]


def kernel_names() -> tuple[str, ...]:
    return tuple(sorted(_KERNELS))
