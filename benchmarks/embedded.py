"""Output tokens per second of the embedded engine, side by side with the stock engine it is built on.

    python -m benchmarks.embedded [--rounds 7] [--hidden 512] [--layers 8] [--tokens 48] [--json FILE]

Three arms take turns in one process, on equal weights: transformers' continuous batching as it comes; Trimtab with no
request steered; Trimtab with every request steered at every layer by a spec of its own (strength not zero). Medians
over rounds, as ratios to the stock engine of the same round. Checks that steered requests differ from unsteered ones
and that each gets in a batch what it gets alone.
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
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.command import options_of, run
from server.engines.data import Generation, Sampling
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.verify.stock_transformers import StockTransformers
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program

PROMPT_LENGTH = 32
VOCAB_SIZE = 4096
BATCHING = {"page_size": 32, "max_batch_tokens": 512, "max_requests_per_batch": 64}
KV_CACHE_TOKENS = 8192


def make_model(folder: str, hidden: int, layers: int) -> None:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 32 * 32, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, vocab_size=VOCAB_SIZE,
                         max_position_embeddings=2048, initializer_range=0.05)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def prompt(i: int) -> list[int]:
    return [(17 * i + 31 * t + t * t) % VOCAB_SIZE for t in range(PROMPT_LENGTH)]


def program(engine: TransformersEngine, seed: int) -> Program:
    vector = torch.randn(engine.facts.d_model, generator=torch.Generator().manual_seed(seed))
    add = Intervention.model_validate({"op": "add", "inline": {"vector": vector.tolist()}, "layers": "all",
                                       "strength": {"value": 1.0, "unit": "unit"}})
    return compile_program([Resolved(add)], engine.facts)


class Trimtab:
    def __init__(self, folder: str, device: str) -> None:
        self.engine = TransformersEngine(EngineOptions(
            model=folder, model_id="bench", device=device, dtype="float32", kv_cache_tokens=KV_CACHE_TOKENS,  # type: ignore[arg-type]
            page_size=BATCHING["page_size"], max_batch_tokens=BATCHING["max_batch_tokens"],
            max_requests=BATCHING["max_requests_per_batch"], share_prefixes=False, self_test=False))
        self.count = 0

    async def run(self, number: int, max_tokens: int, programs: list[Program] | None = None) -> list[list[int]]:
        chosen = [None if programs is None else programs[i] for i in range(number)]
        return await asyncio.gather(*(self._one(i, max_tokens, p) for i, p in enumerate(chosen)))

    async def _one(self, i: int, max_tokens: int, acting: Program | None) -> list[int]:
        self.count += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        completion = self.engine.generate(Generation(f"trimtab-{self.count}", prompt(i), sampling, acting))
        return [token.token_id async for token in completion]


async def timed(work: Any, produced: int) -> float:
    start = time.perf_counter()
    await work
    return produced / (time.perf_counter() - start)


async def check(stock: StockTransformers, trimtab: Trimtab, programs: list[Program]) -> None:
    plain, idle = await stock.run([prompt(i) for i in range(4)], 12), await trimtab.run(4, 12)
    assert plain == idle, "an unsteered request differs from the stock engine"
    mixed = await trimtab.run(4, 12, programs)
    alone = [(await asyncio.gather(trimtab._one(i, 12, programs[i])))[0] for i in range(4)]
    assert mixed == alone, "a steered request differs between a batch and alone"
    assert all(a != b for a, b in zip(mixed, plain, strict=True)), "steering does not show"


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    console = Console()
    results: dict[str, Any] = {"hidden": arguments.hidden, "layers": arguments.layers, "device": arguments.device,
                               "threads": torch.get_num_threads(), "rounds": arguments.rounds, "arms": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, arguments.hidden, arguments.layers)
        stock = StockTransformers(folder, torch.float32, torch.device(arguments.device), **BATCHING,
                                  num_blocks=KV_CACHE_TOKENS // BATCHING["page_size"])
        trimtab = Trimtab(folder, arguments.device)
        await stock.start()
        await trimtab.engine.start()
        programs = [program(trimtab.engine, seed) for seed in range(16)]
        await check(stock, trimtab, programs)
        table = Table("concurrent", "arm", "tokens/s (median)", "ratio to stock (median)", "lowest", "highest")
        for number in (1, 16):
            arms = {"stock": lambda n=number: stock.run([prompt(i) for i in range(n)], arguments.tokens),
                    "idle": lambda n=number: trimtab.run(n, arguments.tokens),
                    "all steered": lambda n=number: trimtab.run(n, arguments.tokens, programs)}
            speeds: dict[str, list[float]] = {name: [] for name in arms}
            for round_number in range(arguments.rounds + 1):
                order = list(arms) if round_number % 2 else list(reversed(arms))
                found = {name: await timed(arms[name](), number * arguments.tokens) for name in order}
                if round_number:  # the first round warms up
                    for name, speed in found.items():
                        speeds[name].append(speed)
            for name, values in speeds.items():
                ratios = [v / s for v, s in zip(values, speeds["stock"], strict=True)]
                row = {"tokens_per_s": statistics.median(values), "ratio": statistics.median(ratios),
                       "lowest": min(ratios), "highest": max(ratios)}
                results["arms"][f"{number} {name}"] = row
                table.add_row(str(number), name, f"{row['tokens_per_s']:.0f}", f"{row['ratio']:.3f}",
                              f"{row['lowest']:.3f}", f"{row['highest']:.3f}")
        await stock.stop()
        await trimtab.engine.stop()
    console.print(table)
    return results


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    run(parser, main)
