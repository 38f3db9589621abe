"""Adapters on a CPU: what requests without one compute is what they compute without adapters.

vLLM marks their tokens with -1, which its kernels for GPUs leave alone. Those for the CPU take it for an index, that of
the last adapter, as soon as a batch holds a request with an adapter. Here such rows are put back as they were.
"""

from collections.abc import Callable
from typing import Any

import torch

# The functions by which `punica_cpu` adds what an adapter computes.
ADDING = ("sgmv_expand", "sgmv_expand_slice")


def spare_others() -> None:
    """Does nothing the second time."""
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ADDING:
        stock = getattr(punica_cpu, name)
        if not getattr(stock, "trimtab", False):
            setattr(punica_cpu, name, sparing(stock))


def sparing(stock: Callable[..., None]) -> Callable[..., None]:
    """`stock`, which leaves the rows of tokens without an adapter as they are."""

    def add(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, starts: torch.Tensor,
            lengths: torch.Tensor, adapters: torch.Tensor, *rest: Any) -> None:
        without = torch.repeat_interleave(adapters < 0, lengths).nonzero().squeeze(1)
        before = output[without]
        stock(inputs, weights, output, starts, lengths, adapters, *rest)
        output[without] = before

    add.trimtab = True  # type: ignore[attr-defined]
    return add
