"""What marking the tokens of a step costs in a vLLM worker: `python -m benchmarks.vllm_slots [--steps 2000]`.

Before each forward pass a worker turns "which request is where" into one number per token, for the compiled graph to
read. Every request has a program of its own; a batch decodes one token each, one step after another. Beside it the same
work done plainly, request by request. Checks that both mark the same tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from server.engines.vllm.wire import EXTRA, Rows
from server.engines.vllm.worker.steps import Steps
from server.engines.vllm.worker.tables import VARIANTS, GraphTables
from steering.ops.base import Row

WIDTH, PROMPT, LENGTH = 64, 8, 4096
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
        self.graph.add_place(("resid_post", 0), WIDTH, elementwise=True, columns=slice(0, WIDTH))
        self.steps = Steps(number, torch.device("cpu"), self.graph)
        self.names = [f"r{i}" for i in range(number)]
        vectors = torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(0))
        for i, name in enumerate(self.names):
            rows = Rows(name, ({("resid_post", 0): Row("add", {"delta": vectors[i]})},), (0,))
            assert self.steps.place(i + 1, rows), "not carried out by the graph"
            touch = {"prompt": PROMPT, "length": LENGTH, "runs": [[self.first(i), LENGTH, 1, 0]], "rules": [[], []]}
            self.steps.add(name, SimpleNamespace(extra_args={EXTRA: {"slot": i + 1, "touch": touch}}))
        self.starts = np.arange(number + 1, dtype=np.int64)

    @staticmethod
    def first(i: int) -> int:
        return PROMPT + i % 7

    def vectorised(self, position: int) -> None:
        self.steps.begin(self.names, self.starts, np.full(self.number, position), self.number, no_ids)

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
    table = Table("requests", "a step (µs, median)", "limit", "request by request (µs)", "ratio")
    results: dict[str, Any] = {}
    for number, limit in LIMITS.items():
        batch = Batch(number)
        batch.check()
        ours = microseconds(batch.vectorised, arguments.steps)
        plain = microseconds(batch.plain, arguments.steps // 10)
        results[str(number)] = {"step_us": ours, "limit_us": limit, "plain_us": plain}
        table.add_row(str(number), f"{ours:.1f}", f"{limit:.0f}", f"{plain:.0f}", f"{plain / ours:.0f}")
    Console(width=100).print(table)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    outcome = main(options)
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1))
