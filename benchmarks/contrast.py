"""What a contrast costs: CPU time for each token, against unsteered requests of the same round.

    python -m benchmarks.contrast [--rounds 5] [--concurrent 16] [--hidden 512] [--layers 8] [--tokens 48] [--json FILE]

Four arms take turns on one engine: nothing steered; every request under a spec of its own; every request under its spec
contrasted with the untouched model; every request under its spec contrasted with another one. Medians over rounds.
Checks first that a contrast in a batch is what it is alone, and that it shows.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from benchmarks.embedded import Trimtab, make_model, program, prompt
from server.engines.data import Contrast, Generation, Sampling
from steering.programs.program import Program

ALPHA, BETA = 0.1, 0.5
Pair = tuple[Program | None, Contrast | None]


async def complete(bench: Trimtab, i: int, tokens: int, pair: Pair) -> list[int]:
    bench.count += 1
    completion = bench.engine.generate(Generation(
        f"contrast-{bench.count}", prompt(i), Sampling(max_tokens=tokens, temperature=0.0), pair[0], contrast=pair[1]))
    return [token.token_id async for token in completion]


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"hidden": arguments.hidden, "layers": arguments.layers, "rounds": arguments.rounds,
                               "threads": torch.get_num_threads(), "concurrent": arguments.concurrent, "arms": {}}
    number, tokens = arguments.concurrent, arguments.tokens
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, arguments.hidden, arguments.layers)
        bench = Trimtab(folder, "cpu")
        await bench.engine.start()
        programs = [program(bench.engine, seed) for seed in range(2 * number)]
        arms: dict[str, list[Pair]] = {
            "nothing steered": [(None, None)] * number,
            "all steered": [(programs[i], None) for i in range(number)],
            "contrast with the untouched model": [(programs[i], Contrast(None, ALPHA, BETA)) for i in range(number)],
            "contrast of two specs": [(programs[i], Contrast(programs[number + i], ALPHA, BETA))
                                      for i in range(number)]}

        async def all_of(pairs: list[Pair], count: int) -> list[list[int]]:
            return await asyncio.gather(*(complete(bench, i, count, pair) for i, pair in enumerate(pairs)))

        for name in list(arms)[2:]:
            together = await all_of(arms[name], 8)
            assert together[:4] == [await complete(bench, i, 8, pair) for i, pair in enumerate(arms[name][:4])], name
            assert together != await all_of(arms["all steered"], 8), "the contrast does not show"
        spent: dict[str, list[float]] = {name: [] for name in arms}
        for round_number in range(arguments.rounds + 1):
            for name in list(arms) if round_number % 2 else list(reversed(arms)):
                began = time.process_time()
                await all_of(arms[name], tokens)
                if round_number:  # the first round warms up
                    spent[name].append((time.process_time() - began) / (number * tokens))
        await bench.engine.stop()
    table = Table("arm", "CPU ms a token (median)", "ratio to nothing steered (median)", "lowest", "highest")
    for name, values in spent.items():
        ratios = [v / s for v, s in zip(values, spent["nothing steered"], strict=True)]
        row = {"ms": 1000 * statistics.median(values), "ratio": statistics.median(ratios), "lowest": min(ratios),
               "highest": max(ratios)}
        results["arms"][name] = row
        table.add_row(name, f"{row['ms']:.2f}", f"{row['ratio']:.3f}", f"{row['lowest']:.3f}", f"{row['highest']:.3f}")
    Console().print(table)
    return results


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    run(parser, main)
