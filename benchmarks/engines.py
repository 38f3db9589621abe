"""Output tokens per second of the embedded engine beside stock vLLM and the stock batcher of transformers.

    python -m benchmarks.engines [--model FOLDER] [--requests 16] [--prompt 96] [--tokens 64] [--rounds 7] [--json FILE]

The three load the same weights in bfloat16 and take turns in one process, unsteered. Prompts are drawn anew for each
round, so that none comes from a cache. Told are medians of the ratio to vLLM in the same round, of the wall clock and
of CPU time, that of vLLM's own processes included. Without --model: a random Llama of 12 layers. For one core each
start it with VLLM_CPU_OMP_THREADS_BIND=0 and --threads 1.

Checks that all three give the same tokens for most requests: they round apart in bfloat16, and then go on apart.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import cpu_seconds, options_of, run
from benchmarks.random_model import make_model
from server.engines.data import Generation, Sampling
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.verify.overhead import prompts_of
from server.verify.stock_transformers import StockTransformers
from server.verify.stock_vllm import StockVllm

PAGE, BATCH_TOKENS, KV_TOKENS, MOST_REQUESTS = 32, 512, 16384, 64
# Share of first tokens that two engines must agree on.
AGREE = 0.7


class Runs(Protocol):
    async def run(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]: ...


class Embedded:
    """The embedded engine, with nothing steered."""

    def __init__(self, folder: str) -> None:
        self.engine = TransformersEngine(EngineOptions(
            model=folder, model_id="bench", device="cpu", dtype="bfloat16", kv_cache_tokens=KV_TOKENS, page_size=PAGE,
            max_batch_tokens=BATCH_TOKENS, max_requests=MOST_REQUESTS, share_prefixes=False, self_test=False))
        self._count = 0

    async def run(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        return await asyncio.gather(*(self._one(prompt, max_tokens) for prompt in prompts))

    async def _one(self, prompt: list[int], max_tokens: int) -> list[int]:
        self._count += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        completion = self.engine.generate(Generation(f"embedded-{self._count}", prompt, sampling))
        return [token.token_id async for token in completion]


async def check(arms: dict[str, Runs], size: int) -> None:
    prompts = prompts_of(size, 12, 16, 7)
    firsts = {name: [tokens[0] for tokens in await arm.run(prompts, 4)] for name, arm in arms.items()}
    expected = firsts["vLLM"]
    for name, found in firsts.items():
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same >= AGREE * len(expected), f"{name} and vLLM agree on {same} of {len(expected)} first tokens"


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or folder
        if not arguments.model:
            make_model(Path(folder), 768, 12)
        embedded = Embedded(model)
        config = embedded.engine.facts
        batcher = StockTransformers(model, torch.bfloat16, torch.device("cpu"), page_size=PAGE,
                                    max_batch_tokens=BATCH_TOKENS, max_requests_per_batch=MOST_REQUESTS,
                                    num_blocks=KV_TOKENS // PAGE)
        vllm = StockVllm(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=MOST_REQUESTS,
                         max_num_batched_tokens=BATCH_TOKENS, block_size=PAGE, kv_cache_memory_bytes=2**30,
                         num_gpu_blocks_override=KV_TOKENS // PAGE, enable_prefix_caching=False,
                         skip_tokenizer_init=True)
        arms: dict[str, Runs] = {"vLLM": vllm, "embedded": embedded, "stock batcher": batcher}
        await vllm.start()
        await batcher.start()
        await embedded.engine.start()
        try:
            await check(arms, config.vocab_size)
            rounds = [await _round(arms, arguments, config.vocab_size, number)
                      for number in range(arguments.rounds + 1)][1:]
        finally:
            await embedded.engine.stop()
            await batcher.stop()
            await vllm.stop()
    return _summary(rounds, arguments)


async def _round(arms: dict[str, Runs], arguments: argparse.Namespace, size: int, number: int
                 ) -> dict[str, tuple[float, float]]:
    """Tokens per second, and per second of CPU time, by arm; the order turns round every time."""
    found = {}
    for i, name in enumerate(list(arms) if number % 2 else reversed(arms)):
        prompts = prompts_of(size, arguments.requests, arguments.prompt, 10 * number + i)
        began, worked = time.perf_counter(), cpu_seconds()
        await arms[name].run(prompts, arguments.tokens)
        produced = arguments.requests * arguments.tokens
        found[name] = produced / (time.perf_counter() - began), produced / (cpu_seconds() - worked)
    return found


def _summary(rounds: list[dict[str, tuple[float, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"model": arguments.model, "requests": arguments.requests, "prompt": arguments.prompt,
                               "tokens": arguments.tokens, "rounds": len(rounds), "arms": {}}
    table = Table("arm", "tokens/s", "of vLLM's", "quartiles", "per CPU second, of vLLM's", "quartiles", box=None)
    for name in rounds[0]:
        row: dict[str, Any] = {"tokens_per_s": statistics.median(r[name][0] for r in rounds)}
        for which, label in ((0, "ratio"), (1, "cpu_ratio")):
            first, row[label], last = statistics.quantiles([r[name][which] / r["vLLM"][which] for r in rounds], n=4)
            row[f"{label}_quartiles"] = [first, last]
        results["arms"][name] = row
        table.add_row(name, f"{row['tokens_per_s']:.0f}", *(text for label in ("ratio", "cpu_ratio") for text in (
            f"{row[label]:.3f}", "{:.3f} to {:.3f}".format(*row[f"{label}_quartiles"]))))
    Console(width=130).print(table)
    return results


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = options_of(__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    run(parser, main)
