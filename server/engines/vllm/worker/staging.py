"""Copies of each step's numbers to the device, made from a buffer that no earlier copy still reads.

A copy from pinned memory does not wait, so the host goes on to the next step while the device may be a step behind.
A buffer is written again only when the event behind its last copy has come to pass.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The host is never further ahead than this in practice, so that nothing is waited for.
BUFFERS = 4


class Event(Protocol):
    """As much of `torch.cuda.Event` as is used."""

    def record(self) -> Any: ...

    def synchronize(self) -> None: ...


class Staging:
    """Copies int32 numbers into the front of `target`, which stays where it is.

    Args:
        target: `[size]` int32 on the device.
        copy: how one tensor gets into another. event: made once per buffer; None where copies are over at once.
    """

    def __init__(self, target: Tensor, *, buffers: int = BUFFERS, copy: Callable[[Tensor, Tensor], Any] | None = None,
                 event: Callable[[], Event] | None = None) -> None:
        pinned = target.device.type == "cuda"
        if event is None and pinned:
            event = torch.cuda.Event
        self._target = target
        self._copy = copy or (lambda to, source: to.copy_(source, non_blocking=True))
        self._buffers = [torch.zeros(target.shape, dtype=torch.int32, pin_memory=pinned) for _ in range(buffers)]
        self._events: list[Event | None] = [event() if event is not None else None for _ in range(buffers)]
        self._used = [False] * buffers
        self._next = 0
        self._filled = 0

    @property
    def filled(self) -> int:
        """How many numbers the last step had."""
        return self._filled

    def put(self, numbers: npt.NDArray[np.integer[Any]]) -> None:
        """The next step's numbers; zeros behind them, as far as the step before had any."""
        n, self._next = self._next, (self._next + 1) % len(self._buffers)
        event = self._events[n]
        if event is not None and self._used[n]:
            event.synchronize()
        count = len(numbers)
        last = max(count, self._filled)
        staged = self._buffers[n].numpy()
        staged[:count] = numbers
        staged[count:last] = 0
        self._copy(self._target[:last], self._buffers[n][:last])
        if event is not None:
            event.record()
        self._used[n], self._filled = True, count
