"""Tests of what a GPU does: graphs that are replayed, copies that nobody waits for, other kernels.

Each body runs on the CPU too, where graphs and delayed copies are acted out, so that the test itself is known to be
right before there is a GPU. `python -m scripts.gpu_check` runs those that need one.
"""

from collections.abc import Callable

import pytest
import torch

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="there is no GPU")])


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


class Replayed:
    """`work` recorded once and run again at each `replay`, on the addresses that it had: a CUDA graph, or the function
    itself where there are none."""

    def __init__(self, work: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._work, self._graph = work, None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Warm-up: what is made at first use must not be recorded.
                work()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.output = work()
        else:
            self.output = work()

    def replay(self) -> torch.Tensor:
        """A copy of the output, which the next replay overwrites."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.output.copy_(self._work())
        return self.output.clone()


class Late:
    """Copies that come to pass only when somebody waits for them, as on a device that lags behind."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.over = 0

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._waiting.append((to, source))

    @property
    def made(self) -> int:
        return self.over + len(self._waiting)

    def run(self, count: int) -> None:
        """Carry out copies, up to number `count` of all, with what their sources hold by now."""
        while self.over < count:
            to, source = self._waiting.pop(0)
            to.copy_(source)
            self.over += 1

    def event(self) -> "LateEvent":
        return LateEvent(self)


class LateEvent:
    def __init__(self, late: Late) -> None:
        self._late, self._behind = late, 0

    def record(self) -> None:
        self._behind = self._late.made

    def synchronize(self) -> None:
        self._late.run(self._behind)
