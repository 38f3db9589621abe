"""Speed and memory of captures: what the server stores, beside plain forward passes of the same model over the texts.

    python -m benchmarks.captures [--model NAME] [--tokens 1000000] [--rounds 3] [--threads 1] [--json FILE]

The arms take turns: a capture of one layer by way of the server, job, disk and all, and plain forward passes of
transformers in batches of as many tokens, of which nothing is kept. Memory is the peak of the process while a capture
runs, over what it was before; a file of so many tokens would not fit into that.
"""

import argparse
import asyncio
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.command import cpu_seconds, options_of, run
from lab import model_path
from server.boot import build
from server.settings import Settings

MODEL, LENGTH, LAYER = "lab-dense", 128, 3
# As the steps of a job that has the engine to itself.
BATCH_TOKENS = 4096
MEBIBYTE = 2**20


async def captured(client: httpx.AsyncClient, name: str, texts: list[list[int]]) -> dict[str, Any]:
    body = {"model": name, "input": texts, "sites": {"resid_post": [LAYER]}}
    answer = await client.post("/v1/activations", json=body)
    answer.raise_for_status()
    job = answer.json()
    while job["status"] not in ("succeeded", "failed"):
        await asyncio.sleep(0.05)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    if job["status"] == "failed":
        raise RuntimeError(job["error"])
    found: dict[str, Any] = job["result"]
    await client.delete(f"/v1/activations/{found['id']}")
    return found


def forward(model: Any, texts: list[list[int]]) -> None:
    """The layers alone: a capture makes no logits but those of each text's last token."""
    size = BATCH_TOKENS // LENGTH
    with torch.no_grad():
        for start in range(0, len(texts), size):
            model.model(input_ids=torch.tensor(texts[start:start + size]), use_cache=False)


def peak() -> float:
    """MiB, of this process, ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = str(model_path(arguments.model)) if "/" not in arguments.model else arguments.model
    draw = random.Random(0)
    texts = [[draw.randrange(5, 200) for _ in range(LENGTH)] for _ in range(max(arguments.tokens // LENGTH, 1))]
    found: dict[str, Any] = {"model": arguments.model, "tokens": len(texts) * LENGTH, "rounds": []}
    with tempfile.TemporaryDirectory() as data:
        app = build(Settings(model=folder, served_model_name=MODEL, data_dir=Path(data), max_body_bytes=2**28))
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=None) as client:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=app.state.server.engine.model.dtype).eval()
            await captured(client, MODEL, texts[:32])
            forward(model, texts[:32])
            for turn in range(arguments.rounds):
                one: dict[str, float] = {}
                for arm in ("capture", "forward") if turn % 2 else ("forward", "capture"):
                    wall, cpu, before = time.monotonic(), cpu_seconds(), peak()
                    if arm == "capture":
                        told = await captured(client, MODEL, texts)
                        one["file_mib"], one["peak_mib"] = told["bytes"] / MEBIBYTE, peak() - before
                    else:
                        await asyncio.to_thread(forward, model, texts)
                    one[f"{arm}_s"], one[f"{arm}_cpu_s"] = time.monotonic() - wall, cpu_seconds() - cpu
                found["rounds"].append(one)
    for unit in ("s", "cpu_s"):
        found[f"speed_of_forward_{unit}"] = statistics.median(
            one[f"forward_{unit}"] / one[f"capture_{unit}"] for one in found["rounds"])
    Console().print_json(data=found)
    return found


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--model", default=MODEL, help="a bundled model, or a folder")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    run(parser, measure)
