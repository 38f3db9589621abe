"""Which tokens of a step the compiled graph steers, for the sums of what it did."""

import numpy as np
import numpy.typing as npt
import torch

from server.engines.vllm.wire import Key
from server.engines.vllm.worker.readout import Entry
from server.engines.vllm.worker.tables import GraphTables

IntArray = npt.NDArray[np.int64]


class GraphRows:
    """Tokens of the step at hand that the graph steers, and which interventions that are at each place."""

    def __init__(self, graph: GraphTables) -> None:
        self._graph = graph
        self._whole = False
        self._tokens: IntArray = np.zeros(0, dtype=np.int64)
        self._on_device: torch.Tensor | None = None
        self._owners: npt.NDArray[np.int8] = np.zeros((0, 0), dtype=np.int8)
        self._columns: dict[Key, slice] = {}

    def __bool__(self) -> bool:
        return bool(self._columns)

    def clear(self) -> None:
        self._columns = {}

    def set(self, numbers: npt.NDArray[np.uint32]) -> None:
        """`numbers [T]`: see `GraphTables.fill`."""
        tokens = np.flatnonzero(numbers)
        if not len(tokens):
            return
        if not np.array_equal(tokens, self._tokens) or self._on_device is None:
            self._tokens = tokens
            self._on_device = torch.from_numpy(tokens).to(self._graph.device)
        self._whole = len(tokens) == len(numbers)
        self._owners = self._graph.owners[numbers[tokens]]
        depth = self._graph.depth
        acting = np.flatnonzero((self._owners >= 0).reshape(len(tokens), -1, depth).any((0, 2))).tolist()
        keys = list(self._graph.places)
        self._columns = {keys[n]: slice(n * depth, (n + 1) * depth) for n in acting}

    def entry(self, key: Key, taken: torch.Tensor) -> Entry | None:
        columns = self._columns.get(key)
        if columns is None:
            return None
        assert self._on_device is not None
        mine = taken[:len(self._tokens)].clone() if self._whole else taken[self._on_device]
        return Entry(key, self._tokens, self._owners[:, columns], mine, self._graph.limit)
