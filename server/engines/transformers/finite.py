"""Whether the values of a forward pass are finite, and whose fault it is where they are not.

Steering contains its own steps (`steering.acting.containment`), but a step that is finite may still drive the layers
behind it out of their dtype, and a model may leave float16 without any steering. In a packed batch one key that is not
a number makes the attention scores of every request NaN. So each pass is **watched**: one sum over the last block's
output, into which any such value finds its way along the residual stream. A pass that fails is run again, **examined**:
keys and values that are not finite are zeros for attention, each with a note of its token, so that every other request
gets what it gets alone, and the requests that made them are known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.models.taps import attach


class Watch:
    """Sees the last block's output of every pass of a model."""

    def __init__(self, model: Any, last_layer: int) -> None:
        self.last_layer = last_layer
        self._last: Tensor | None = None
        self._hook = attach(model, "resid_post", last_layer, self._look)

    def detach(self) -> None:
        self._hook.remove()

    def total(self) -> Tensor:
        """A number on the device that is finite if every value of the last pass was."""
        if self._last is None:
            raise RuntimeError("no pass has been watched")
        return self._last.sum(dtype=torch.float32)

    def broken(self) -> Tensor:
        """Tokens of the last pass whose values are not finite, bool `[T]`."""
        if self._last is None:
            raise RuntimeError("no pass has been watched")
        return ~self._last.sum(dim=-1, dtype=torch.float32).isfinite()

    def rows(self, index: Tensor) -> Tensor:
        """The last block's output at some tokens of the last pass, a copy `[n, d_model]`."""
        if self._last is None:
            raise RuntimeError("no pass has been watched")
        return self._last[index]

    def forget(self) -> None:
        """Let go of what was seen."""
        self._last = None

    def _look(self, h: Tensor) -> Tensor:
        self._last = h
        return h


@dataclass
class Examined:
    """Where values stopped being finite.

    tokens: index in the flat batch -> first layer whose keys or values were not. cached: index of a request in the
    batch -> (layer, position) of an entry of its cache that was not.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    cached: dict[int, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def examining(cache: Any) -> Iterator[Examined]:
    """Passes of the block go through transformers' paged cache with zeros in the place of keys and values that are not
    finite. Waits for the device at every layer; for passes that went wrong."""
    found = Examined()
    update = cache.update

    def examined(key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
                 ) -> tuple[Tensor, Tensor]:
        keys, values, broken = _zeroed(key_states, value_states)
        for token in broken:
            found.tokens.setdefault(token, layer_idx)
        keys, values = update(key_states=keys, value_states=values, layer_idx=layer_idx, kwargs=kwargs)
        keys, values, broken = _zeroed(keys, values)
        if broken:
            ends = kwargs["cu_seq_lens_k"].tolist()
            for row in broken:
                owner = next(i for i, end in enumerate(ends[1:]) if row < end)
                found.cached.setdefault(owner, (layer_idx, row - ends[owner]))
        return keys, values

    # On the instance, which hides the class's own method.
    cache.update = examined
    try:
        yield found
    finally:
        del cache.update


def _zeroed(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """`keys`, `values [1, heads, T, width]` with zeros where either is not finite at a token, and those tokens."""
    fine = keys.isfinite().all(dim=-1).all(dim=1)[0] & values.isfinite().all(dim=-1).all(dim=1)[0]
    broken: list[int] = (~fine).nonzero().flatten().tolist()
    if not broken:
        return keys, values, broken
    mask = fine.view(1, 1, -1, 1)
    return torch.where(mask, keys, 0), torch.where(mask, values, 0), broken
