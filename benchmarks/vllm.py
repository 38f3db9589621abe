"""Output tokens per second of the vLLM engine, side by side with stock compiled vLLM.

    python -m benchmarks.vllm [--rounds 9] [--requests 32,256] [--json FILE]

Two engines on equal weights take turns under one process: vLLM as it comes, and vLLM as Trimtab starts it. Arms of the
second: no request steered; all by one program; each by a program of its own; with --stacks each by a stack of three,
which goes through the opaque op where `vllm_depth` is 1. Programs add a vector at every layer, another one in each,
strength not zero. Decode-heavy (short prompts, many tokens) and
prefill-heavy (long prompts, two tokens). Medians over rounds of the ratio to stock in the same round, which runs twice
there: the noise is that of stock against itself. Checks that steered requests differ from unsteered ones and that
a request gets in a batch what it gets alone.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from benchmarks.random_model import make_model
from server.engines.data import Generation, Sampling
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.sampling import sampling_params
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program

VOCAB_SIZE = 3000
MAX_LENGTH = 1100
BLOCKS = 1024
KV_BYTES = (BLOCKS + 1) * 32 * 2 * 12 * 768 * 2
# Prompt and output tokens of one request; prompts of the second are shorter where requests are many.
DECODE_TOKENS, PREFILL_TOKENS = 512, 2048
PROMPT_OF_DECODE, OUTPUT_OF_PREFILL = 16, 2


def lengths(shape: str, number: int) -> tuple[int, int]:
    """Prompt and output tokens of each of `number` requests: the work of an arm is about the same for all numbers."""
    if shape == "decode":
        return PROMPT_OF_DECODE, max(8, DECODE_TOKENS // number)
    return max(8, PREFILL_TOKENS // number), OUTPUT_OF_PREFILL


def prompt(i: int, length: int, salt: int) -> list[int]:
    """Another one for every round, so that no prefix comes from the cache."""
    return random.Random(f"{i} {salt}").choices(range(VOCAB_SIZE), k=length)


def program(engine: VllmEngine, seed: int, depth: int = 1) -> Program:
    generator = torch.Generator().manual_seed(seed)
    stack = []
    for _ in range(depth):
        vectors = torch.randn(engine.facts.num_layers, engine.facts.d_model, generator=generator)
        inline = {"vector": {str(layer): vector.tolist() for layer, vector in enumerate(vectors)}}
        stack.append(Resolved(Intervention.model_validate(
            {"op": "add", "inline": inline, "layers": "all", "strength": {"value": 8.0, "unit": "unit"}})))
    return compile_program(stack, engine.facts)


Arm = Callable[[int], Awaitable[None]]
# Nats by which a log-probability may be off by rounding.
CLOSE = 0.02
WARM_REQUESTS, WARM_LENGTH, WARM_TOKENS = 8, 16, 4


class Stock:
    """vLLM as it comes, with the same scheduler settings."""

    def __init__(self, folder: str, requests: int) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=folder, dtype="bfloat16", max_model_len=MAX_LENGTH, max_num_seqs=requests,
            max_num_batched_tokens=2048, block_size=32, num_gpu_blocks_override=BLOCKS,
            kv_cache_memory_bytes=KV_BYTES, enable_log_requests=False))
        self.count = 0

    async def warm(self, salt: int) -> None:
        await asyncio.gather(*(self._one(i, (WARM_LENGTH, WARM_TOKENS), salt) for i in range(WARM_REQUESTS)))

    async def run(self, number: int, shape: str, salt: int) -> None:
        await asyncio.gather(*(self._one(i, lengths(shape, number), salt) for i in range(number)))

    async def _one(self, i: int, size: tuple[int, int], salt: int) -> list[int]:
        self.count += 1
        length, tokens = size
        params = sampling_params(Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True), {})
        found: list[int] = []
        async for output in self.llm.generate({"prompt_token_ids": prompt(i, length, salt)}, params,
                                              f"stock-{self.count}"):
            found += output.outputs[0].token_ids
        return found


class Trimtab:
    def __init__(self, folder: str, requests: int, **changes: Any) -> None:
        self.engine = VllmEngine(VllmOptions(
            model=folder, model_id="bench", dtype="bfloat16", slots=2 * requests, max_requests=requests,
            max_batch_tokens=2048, kv_cache_tokens=BLOCKS * 32,
            extra={"kv_cache_memory_bytes": KV_BYTES}, **changes))
        self.count = 0

    async def warm(self, salt: int) -> None:
        await asyncio.gather(*(self.one(i, (WARM_LENGTH, WARM_TOKENS), salt, None) for i in range(WARM_REQUESTS)))

    async def run(self, number: int, shape: str, salt: int, programs: list[Program] | None = None) -> None:
        size = lengths(shape, number)
        await asyncio.gather(*(self.one(i, size, salt, None if programs is None else programs[i % len(programs)])
                               for i in range(number)))

    async def one(self, i: int, size: tuple[int, int], salt: int, acting: Program | None) -> list[int]:
        self.count += 1
        length, tokens = size
        generation = Generation(f"trimtab-{self.count}", prompt(i, length, salt),
                                Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True), acting)
        return [token.token_id async for token in self.engine.generate(generation)]

    async def first(self, i: int, acting: Program | None) -> tuple[int, float]:
        """Token and log-probability that follow a prompt."""
        self.count += 1
        generation = Generation(f"check-{self.count}", prompt(i, 24, 1),
                                Sampling(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=0), acting)
        token = [token async for token in self.engine.generate(generation)][0]
        assert token.logprob is not None
        return token.token_id, token.logprob


async def timed(work: Awaitable[None]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


async def check(trimtab: Trimtab, programs: list[Program]) -> None:
    """The first token of equal prompts and its log-probability, to what bfloat16 allows: it rounds by batch."""
    numbers = range(len(programs[:8]))
    plain = [await trimtab.first(i, None) for i in numbers]
    alone = [await trimtab.first(i, programs[i]) for i in numbers]
    mixed = await asyncio.gather(*(trimtab.first(i, programs[i]) for i in numbers))
    assert all(abs(a[1] - b[1]) < CLOSE for a, b in zip(alone, mixed, strict=True)), \
        f"alone {alone}, in a batch {mixed}"
    assert all(a[0] != b[0] or abs(a[1] - b[1]) > CLOSE for a, b in zip(alone, plain, strict=True)), \
        f"steered {alone}, unsteered {plain}"


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    numbers = [int(n) for n in arguments.requests.split(",")]
    most = max(numbers)
    results: dict[str, Any] = {"hidden": arguments.hidden, "layers": arguments.layers, "rounds": arguments.rounds,
                               "sites": arguments.sites, "graph_ops": arguments.graph_ops, "arms": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments.hidden, arguments.layers)
        stock = Stock(folder, most)
        changes: dict[str, Any] = {"graph_ops": arguments.graph_ops}
        if arguments.sites:
            changes["sites"] = tuple(arguments.sites.split(","))
        trimtab = Trimtab(folder, most, **changes)
        await trimtab.engine.start()
        programs = [program(trimtab.engine, seed) for seed in range(most)]
        stacks = [program(trimtab.engine, 10_000 + seed, depth=3) for seed in range(most)]
        await check(trimtab, programs)
        table = Table("requests", "shape", "arm", "s (median)", "ratio to stock (median)", "lower quartile", "upper")
        for number in numbers:
            for shape in arguments.shapes.split(","):
                plain = partial(stock.run, number, shape)
                ours = partial(trimtab.run, number, shape)
                arms: dict[str, tuple[Arm, Arm]] = {
                    "stock": (plain, stock.warm), "stock again": (plain, stock.warm), "idle": (ours, trimtab.warm),
                    "one program": (partial(ours, programs=programs[:1]), trimtab.warm),
                    f"{number} programs": (partial(ours, programs=programs[:number]), trimtab.warm)}
                if arguments.stacks:
                    arms["stacks of 3"] = (partial(ours, programs=stacks[:number]), trimtab.warm)
                rows = await measure(arms, arguments.rounds)
                for name, row in rows.items():
                    results["arms"][f"{number} {shape} {name}"] = row
                    shown = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
                    print(number, shape, name, shown, flush=True)
                    table.add_row(str(number), shape, name, f"{row['seconds']:.2f}", f"{row['ratio']:.3f}",
                                  f"{row['low']:.3f}", f"{row['high']:.3f}")
        assert all(trimtab.engine.slots.in_graph(p) for p in programs[:numbers[-1]]), "not carried out by the graph"
        stock.llm.shutdown()
        await trimtab.engine.stop()
    Console(width=110).print(table)
    return results


async def measure(arms: dict[str, tuple[Arm, Arm]], rounds: int) -> dict[str, dict[str, Any]]:
    """Arms in turn, the order reversed every other round; the first round warms up. Before each its engine does a
    little untimed: that the other one has just been running is nobody's cost."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        found = {}
        for i, name in enumerate(list(arms) if number % 2 else list(reversed(arms))):
            run, warm = arms[name]
            await warm(1000 * number + 500 + i)
            found[name] = await timed(run(1000 * number + i))
        if number:
            for name, value in found.items():
                seconds[name].append(value)
    stock = [(a + b) / 2 for a, b in zip(seconds["stock"], seconds["stock again"], strict=True)]
    rows = {}
    for name, values in seconds.items():
        against = seconds["stock"] if name == "stock again" else stock
        ratios = sorted(s / v for v, s in zip(values, against, strict=True))
        rows[name] = {"seconds": statistics.median(values), "ratio": statistics.median(ratios),
                      "low": statistics.quantiles(ratios, n=4)[0], "high": statistics.quantiles(ratios, n=4)[2],
                      "rounds": values}
    return rows


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--requests", default="8,32,128,256")
    parser.add_argument("--shapes", default="decode,prefill")
    parser.add_argument("--sites", default="", help="hooked sites, all by default")
    parser.add_argument("--graph-ops", default="auto", choices=["auto", "vectors", "all"])
    parser.add_argument("--stacks", action="store_true", help="one more arm: three vectors at every layer")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    run(parser, main)
