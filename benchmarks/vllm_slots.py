"""What marking the tokens of a step costs in a vLLM worker: `python -m benchmarks.vllm_slots [--steps 2000]`.

Before each forward pass a worker turns "which request is where" into one number per token, for the compiled graph to
read. Every request has a program of its own; a batch decodes one token each, one step after another. Beside it the same
work done plainly, request by request. Checks that both mark the same tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from server.engines.vllm.wire import EXTRA, Key, Rows
from server.engines.vllm.worker.steps import Steps
from server.engines.vllm.worker.tables import VARIANTS, GraphTables
from steering.ops.base import Row

WIDTH, PROMPT, LENGTH = 64, 8, 4096
LAYERS, HIDDEN = 12, 768
LIMITS = {32: 20.0, 256: 60.0}
IntArray = npt.NDArray[np.int64]


def no_ids() -> IntArray:
    raise AssertionError("no scope here asks for token ids")


class Batch:
    """`number` requests, each steered on generated tokens from its own position on."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.graph = GraphTables(number, num_rows=number, depth=1, rank=2, max_tokens=number, dtype=torch.float32,
                                 device=torch.device("cpu"))
        keys: list[Key] = [("resid_post", layer) for layer in range(LAYERS)]
        for key in keys:
            self.graph.add_place(key, WIDTH, elementwise=True, columns=slice(0, WIDTH))
        self.steps = Steps(number, torch.device("cpu"), self.graph)
        self.names = [f"r{i}" for i in range(number)]
        vectors = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(0))
        for i, name in enumerate(self.names):
            rows = Rows(name, (dict.fromkeys(keys, Row("add", {"delta": vectors[i]})),), (0,))
            assert self.steps.place(i + 1, rows), "not carried out by the graph"
            touch = {"prompt": PROMPT, "length": LENGTH, "runs": [[self.first(i), LENGTH, 1, 0]], "rules": [[], []]}
            self.steps.add(name, SimpleNamespace(extra_args={EXTRA: {"slot": i + 1, "digest": name, "touch": touch}}))
        self.starts = np.arange(number + 1, dtype=np.int64)
        self.taken, self.hidden = torch.full((number, 1), 0.5), torch.zeros(number, HIDDEN)
        self.idle = Steps(number, torch.device("cpu"), self.graph)
        for name in self.names:
            self.idle.add(name, SimpleNamespace(extra_args=None))

    @staticmethod
    def first(i: int) -> int:
        return PROMPT + i % 7

    def vectorised(self, position: int) -> None:
        self.steps.begin(self.names, self.starts, np.full(self.number, position), self.number, no_ids)

    def summed(self, position: int) -> None:
        """The same, and what the graph did at every layer is read and summed up, as behind a step of a model."""
        self._read(self.steps, position)

    def unsteered(self, position: int) -> None:
        """The same for requests without programs, in an engine that could steer."""
        self._read(self.idle, position)

    def _read(self, steps: Steps, position: int) -> None:
        steps.begin(self.names, self.starts, np.full(self.number, position), self.number, no_ids)
        if steps.busy:
            for key in self.graph.places:
                steps.note_graph(key, self.taken)
        steps.collect(self.hidden)
        steps.done()
        steps.tallies.settle(steps.readout)

    def plain(self, position: int) -> None:
        for i in range(self.number):
            self.graph.token[i] = 1 + i * VARIANTS if position >= self.first(i) else 0

    def check(self) -> None:
        for position in range(PROMPT, PROMPT + 10):
            self.vectorised(position)
            found = self.graph.token.clone()
            self.plain(position)
            assert torch.equal(found, self.graph.token), f"tokens at {position} are marked otherwise"


def microseconds(work: Callable[[int], None], steps: int) -> float:
    taken = []
    for step in range(steps):
        start = time.perf_counter()
        work(PROMPT + step % 1000)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    table = Table("requests", "a step (µs, median)", "limit", "request by request (µs)", "ratio",
                  f"with the sums of {LAYERS} layers (µs)", "unsteered, with sums (µs)")
    results: dict[str, Any] = {}
    for number, limit in LIMITS.items():
        batch = Batch(number)
        batch.check()
        ours = microseconds(batch.vectorised, arguments.steps)
        plain = microseconds(batch.plain, arguments.steps // 10)
        summed, unsteered = (microseconds(work, arguments.steps // 2) for work in (batch.summed, batch.unsteered))
        results[str(number)] = {"step_us": ours, "limit_us": limit, "plain_us": plain, "summed_us": summed,
                                "unsteered_us": unsteered}
        table.add_row(str(number), f"{ours:.1f}", f"{limit:.0f}", f"{plain:.0f}", f"{plain / ours:.0f}",
                      f"{summed:.0f}", f"{unsteered:.0f}")
    Console(width=100).print(table)
    return results


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    run(parser, main)
