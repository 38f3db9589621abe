"""What the stage in vLLM's compiled graph costs a layer: `python -m benchmarks.vllm_stage [--tokens 256]`.

The stage as it is traced, compiled alone, on tokens that no program touches: none of it, vectors only
(`vllm_graph_ops=vectors`) without measuring and containing the step, the same with it, all of it. They take turns.
Checks that untouched tokens stay bit for bit and that a touched one moves by the vector.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from server.engines.vllm.worker.stage import steered
from server.engines.vllm.worker.tables import IDENTITY_SCALARS

RANK = 2
SLOTS, ROWS = 512 * 7 + 1, 8192


def stage(form: str, h: torch.Tensor, residual: torch.Tensor, pool: torch.Tensor, index: torch.Tensor,
          scalars: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """What a block's hook adds to the graph, without the opaque op."""
    if form == "none":
        return h + 0
    x = h.float() + residual.float()
    rows = index[token]
    if form == "vectors, not contained":
        y = x + x * pool[rows[:, 0]].float() + pool[rows[:, 1]].float()
    else:
        y, _ = steered(x, pool, rows, scalars[token], 1, RANK, form == "vectors", h.dtype)
    return (h.float() + (y - x)).to(h.dtype)


def check(form: str, run: Callable[..., torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    assert torch.equal(run(**given), given["h"]), f"{form}: untouched tokens change"
    if form == "none":
        return
    given["pool"][1] = 3.0
    # The offset is the second row of a stage.
    given["index"][1, 1] = 1
    given["token"][0] = 1
    moved = (run(**given).float() - given["h"].float()).abs()
    assert bool((moved[0] > 2.9).all()) and not bool(moved[1:].any()), f"{form}: the vector does not arrive"
    given["token"][0] = 0


def main(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    h, residual = torch.randn(2, arguments.tokens, arguments.width, generator=generator).bfloat16()
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    with torch.inference_mode():
        for form in ("none", "vectors, not contained", "vectors", "all"):
            given = {"h": h, "residual": residual, "pool": torch.zeros(ROWS + 1, arguments.width, dtype=h.dtype),
                     "index": torch.zeros(SLOTS, 3 + 2 * RANK if form == "all" else 2, dtype=torch.int32),
                     "scalars": torch.tensor([*IDENTITY_SCALARS, *[0.0] * RANK]).repeat(SLOTS, 1),
                     "token": torch.zeros(arguments.tokens, dtype=torch.int32)}
            compiled = torch.compile(partial(stage, form), dynamic=True)
            check(form, compiled, given)
            runs[form] = partial(compiled, **given)
        taken: dict[str, list[float]] = {form: [] for form in runs}
        for _ in range(arguments.rounds):
            for form, run in runs.items():
                start = time.perf_counter()
                run()
                taken[form].append(time.perf_counter() - start)
    table = Table("in the graph", "microseconds a layer (median)")
    for form, seconds in taken.items():
        table.add_row(form, f"{statistics.median(seconds) * 1e6:.0f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=300)
    main(parser.parse_args())
