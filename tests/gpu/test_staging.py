"""Steps are staged faster than the device copies them: each copy must still bring its own step's numbers."""

import numpy as np
import pytest
import torch

from server.engines.vllm.worker.staging import Staging
from tests.gpu.conftest import CUDA, Late

STEPS, SIZE = 40, 1000


def numbers(step: int) -> np.ndarray:
    """Of one step; steps differ in length, so that what is left of longer ones shows."""
    return np.full(SIZE - 17 * (step % 11), 1 + step, dtype=np.uint32)


def expected(step: int) -> torch.Tensor:
    row = torch.zeros(SIZE, dtype=torch.int32)
    row[:len(numbers(step))] = 1 + step
    return row


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_no_copy_brings_another_steps_numbers(buffers: int) -> None:
    """The device is as late as it can be: a copy happens when its buffer is wanted again."""
    late = Late()
    target = torch.zeros(SIZE, dtype=torch.int32)
    staging = Staging(target, buffers=buffers, copy=late.copy, event=late.event)
    found: list[torch.Tensor] = []
    for step in range(STEPS):
        staging.put(numbers(step))
        while len(found) < late.over:
            # More than one copy may have come to pass: only the last one's result is there to be seen.
            found.append(target.clone() if len(found) == late.over - 1 else torch.empty(0))
    assert late.made == STEPS and late.over == STEPS - buffers, "a buffer is waited for, and nothing else"
    for step, row in enumerate(found):
        assert torch.equal(row, expected(step)), step
    late.run(STEPS)
    assert torch.equal(target, expected(STEPS - 1))


def test_without_waiting_the_test_would_fail() -> None:
    """Control: the same with events that nobody waits for."""

    class Careless:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    late = Late()
    target = torch.zeros(SIZE, dtype=torch.int32)
    staging = Staging(target, buffers=1, copy=late.copy, event=Careless)
    for step in range(2):
        staging.put(numbers(step))
    late.run(1)
    assert not torch.equal(target, expected(0))


@pytest.mark.parametrize("device", [CUDA])
def test_no_copy_brings_another_steps_numbers_on_a_gpu(device: str) -> None:
    """Behind a kernel that keeps the stream busy all copies of a while are under way at once; what each of them brought
    is noted on the device right behind it."""
    target = torch.zeros(SIZE, dtype=torch.int32, device=device)
    noted = torch.zeros(STEPS, SIZE, dtype=torch.int32, device=device)
    staging = Staging(target)
    for step in range(STEPS):
        torch.cuda._sleep(20_000_000)
        staging.put(numbers(step))
        noted[step].copy_(target)
    torch.cuda.synchronize()
    for step in range(STEPS):
        assert torch.equal(noted[step].cpu(), expected(step)), step
