"""What one step left, on its way from the device to the host."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engines.vllm.wire import Key
from steering.acting.containment import StepLimit

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sheet:
    """Who is where in the flat batch of one step: the first token of each request and the end, and how many of its
    tokens were computed before."""

    request_ids: list[str]
    starts: IntArray
    computed: IntArray

    def owners(self, tokens: IntArray) -> IntArray:
        found: IntArray = np.searchsorted(self.starts, tokens, side="right") - 1
        return found

    def positions(self, tokens: IntArray, owners: IntArray) -> IntArray:
        found: IntArray = self.computed[owners] + tokens - self.starts[owners]
        return found


@dataclass
class Entry:
    """Steps taken at one place.

    tokens: of the flat batch. interventions: which one of its program each step is, `[n]` or `[n, stages]`, NOBODY
    where none acts. steps: of the same shape, on the device. limit: what holds for them.
    """

    key: Key
    tokens: IntArray
    interventions: npt.NDArray[np.int8]
    steps: Tensor
    limit: StepLimit


@dataclass
class Readout:
    """What a step left, on its way to the host: `values` hold the steps of all entries and then, for each token of the
    batch, whether its hidden state is finite, if `checked`."""

    sheet: Sheet
    entries: list[Entry]
    checked: int
    values: Tensor
    copied: Any = None
    done: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def take(cls, sheet: Sheet, entries: Sequence[Entry], hidden: Tensor | None) -> "Readout":
        """hidden: final hidden states `[T, d_model]` of the real tokens, where this worker has them."""
        parts = [entry.steps.reshape(-1).float() for entry in entries]
        if hidden is not None:
            parts.append(hidden.isfinite().all(-1).float())
        values = torch.cat(parts) if parts else torch.zeros(0)
        copied = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            values = host
        return cls(sheet, list(entries), 0 if hidden is None else len(hidden), values, copied)

    def read(self) -> npt.NDArray[np.float32]:
        if self.copied is not None:
            self.copied.synchronize()
        found: npt.NDArray[np.float32] = self.values.numpy()
        return found
