"""Activations of all pairs on disk, so that memory holds one layer at a time."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from steering.language.vocabulary import Site
from vectors.extract.contract import Cancelled, Capture, Pair, Progress, TokenPosition
from vectors.extract.errors import ExtractionCancelled, FitFailed
from vectors.scratch import ScratchFolder

BATCH_TOKENS = 4096
BATCH_TEXTS = 64


class ActivationStore:
    """One pooled activation per text and layer, float32 in a file that goes when the store is closed.

    residual_norm: per layer the mean length of the activations that were read, before pooling.
    """

    def __init__(self, layers: Sequence[int], num_pairs: int, width: int) -> None:
        self.layers = tuple(layers)
        self.residual_norm: dict[int, float] = {}
        self._folder = ScratchFolder()
        # Layer first: fitting reads one layer of all texts at once.
        self._data: npt.NDArray[np.float32] = self._folder.array(
            "activations", np.float32, (len(self.layers), num_pairs, 2, width))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        del self._data
        self._folder.cleanup()

    def fill(self, pairs: Sequence[Pair], capture: Capture, site: Site, token: TokenPosition, progress: Progress,
             cancelled: Cancelled) -> None:
        """Read every text through `capture`, in batches of bounded size.

        Raises:
            ExtractionCancelled: `cancelled` said so.
            FitFailed: the model gave an activation that is not finite.
        """
        num_vectors = 0
        total_norm = torch.zeros(len(self.layers), dtype=torch.float64)
        positions = None if token == "mean" else [-1 if token == "last" else int(token)]
        done = 0
        for batch in batches(pairs):
            if cancelled():
                raise ExtractionCancelled("the extraction was cancelled while it read activations")
            captured = capture([_ids(pairs, where) for where in batch], site, self.layers, positions)
            for (number, side), layers in zip(batch, captured, strict=True):
                vectors = self._stack(layers, token, f"pairs[{number}]")
                total_norm += vectors.norm(dim=-1).sum(dim=1)
                num_vectors += vectors.shape[1]
                self._data[:, number, side] = vectors.mean(dim=1).float().numpy()
            done += len(batch)
            progress(done / (2 * len(pairs)), "capture")
        self.residual_norm = {layer: float(total_norm[row]) / num_vectors for row, layer in enumerate(self.layers)}

    def _stack(self, layers: Mapping[int, torch.Tensor], token: TokenPosition, where: str) -> torch.Tensor:
        """`[num_layers, num_positions, width]` float64 of one text, without the sink position where it is pooled."""
        vectors = torch.stack([layers[layer] for layer in self.layers]).double()
        if not bool(torch.isfinite(vectors).all()):
            raise FitFailed("the model gave an activation that is not finite", param=where,
                            fix="Load the model in float32 or bfloat16.")
        return vectors[:, 1:] if token == "mean" and vectors.shape[1] > 1 else vectors

    def layer(self, layer: int, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations `[len(members), width]` float64 of the positive and of the negative texts."""
        rows = torch.from_numpy(self._data[self.layers.index(layer)][list(members)]).double()
        return rows[:, 0], rows[:, 1]


def batches(pairs: Sequence[Pair]) -> Iterator[list[tuple[int, int]]]:
    """(pair, side) of every text once; side 0 is the positive one. Only a batch of one text may exceed BATCH_TOKENS."""
    batch: list[tuple[int, int]] = []
    num_tokens = 0
    for where in ((number, side) for number in range(len(pairs)) for side in (0, 1)):
        length = len(_ids(pairs, where))
        if batch and (num_tokens + length > BATCH_TOKENS or len(batch) == BATCH_TEXTS):
            yield batch
            batch, num_tokens = [], 0
        batch.append(where)
        num_tokens += length
    if batch:
        yield batch


def _ids(pairs: Sequence[Pair], where: tuple[int, int]) -> tuple[int, ...]:
    number, side = where
    return pairs[number].negative if side else pairs[number].positive
