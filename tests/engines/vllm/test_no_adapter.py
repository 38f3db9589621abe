"""Rows of tokens without an adapter, in a batch with some that have one, on a CPU."""

import pytest
import torch
from vllm.lora.ops.torch_ops import sgmv_expand_slice

from server.engines.vllm.worker.adapters import sparing


@pytest.mark.parametrize("broken", [False, True])
def test_tokens_without_an_adapter_are_left_alone(broken: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(6, 2, generator=generator), torch.randn(3, 1, 4, 2, generator=generator)
    if broken:
        weights[2] = torch.nan
    output = torch.randn(6, 8, generator=generator)
    # Two tokens of the first adapter, three of none and one of the second.
    lengths, adapters = torch.tensor([2, 3, 1]), torch.tensor([0, -1, 1])
    stretches = (torch.tensor([0, 2, 5]), lengths, adapters, 3, 3, 6)
    expected = output.clone()
    for row, adapter in ((0, 0), (1, 0), (5, 1)):
        expected[row, 2:6] += weights[adapter, 0] @ inputs[row]
    stock, ours = output.clone(), output.clone()
    sgmv_expand_slice(inputs, weights, stock, *stretches, 2, 4, True)
    sparing(sgmv_expand_slice)(inputs, weights, ours, *stretches, 2, 4, True)
    assert torch.allclose(ours, expected, atol=1e-6) and torch.equal(ours[2:5], output[2:5])
    assert not torch.equal(stock[2:5], output[2:5]), "vLLM has mended this, so that nothing is to be done here"
