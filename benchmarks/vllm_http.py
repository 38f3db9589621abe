"""Time to first token and between tokens over HTTP: `trimtab serve --engine vllm` against vLLM's own server.

    python -m benchmarks.vllm_http [--rounds 5] [--concurrency 8] [--json FILE]

Both servers run side by side on equal random weights (a Llama of about 100 M parameters in bfloat16) and take turns
under the same outside load, vLLM's own `bench serve`: stock, Trimtab unsteered, Trimtab with every request steered by a
named artifact at every layer. Medians over rounds of the ratio to stock in the same round. Checks that the steered
answers differ from the unsteered ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import options_of, run
from benchmarks.random_model import make_model

PORTS = {"stock": 8160, "trimtab": 8161}
STEERING = {"steering": {"interventions": [{"artifact": "push"}]}}
LOAD = "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser(); " \
       "add_cli_args(p); main(p.parse_args())"
METRICS = ("median_ttft_ms", "median_itl_ms", "output_throughput")


@contextmanager
def serving(arguments: list[str], port: int, **environment: str) -> Iterator[str]:
    """A server in a process of its own, from when it answers until the block ends."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(arguments, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{arguments[:4]} ended with {process.returncode} before it answered")
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def load(url: str, folder: Path, number: int, concurrency: int, seed: int, extra: dict[str, Any]) -> dict[str, float]:
    """What vLLM's load generator measures."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", LOAD, "--backend", "openai", "--base-url", url, "--endpoint",
                   "/v1/completions", "--model", "bench", "--tokenizer", str(folder), "--dataset-name", "random",
                   "--random-input-len", "96", "--random-output-len", "32", "--num-prompts", str(number),
                   "--max-concurrency", str(concurrency), "--num-warmups", "4", "--ignore-eos", "--seed", str(seed),
                   "--save-result", "--result-dir", out, "--result-filename", "result.json",
                   "--disable-tqdm", *(["--extra-body", json.dumps(extra)] if extra else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})
        file = Path(out) / "result.json"
        if not file.exists():
            raise RuntimeError(done.stderr[-2000:])
        result = json.loads(file.read_text())
        if result["completed"] != number:
            raise RuntimeError(f"{result['completed']} of {number} requests completed: {done.stderr[-2000:]}")
        return {name: float(result[name]) for name in METRICS}


def upload(url: str, hidden: int, layers: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {str(n): {"vector": (torch.randn(hidden, generator=generator) / hidden**0.5 * 4).tolist()}
               for n in range(layers)}
    httpx.post(f"{url}/v1/artifacts", timeout=60, json={
        "metadata": {"name": "push", "kind": "vector", "op": "add", "site": "resid_post"},
        "tensors": tensors}).raise_for_status()


def check(url: str) -> None:
    body = {"model": "bench", "prompt": "The cat sat near the", "max_tokens": 8, "temperature": 0}
    plain, steered = (httpx.post(f"{url}/v1/completions", json=body | extra, timeout=60).json()
                      for extra in ({}, STEERING))
    assert plain["choices"][0]["text"] != steered["choices"][0]["text"], "steering does not show"
    assert steered["steering"]["applied"][0]["artifact"] == "push@1"


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder_name, ExitStack() as stack:
        folder = Path(folder_name)
        make_model(folder / "model", arguments.hidden, arguments.layers)
        model = str(folder / "model")
        stock = stack.enter_context(serving(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name",
             "bench", "--port", str(PORTS["stock"]), "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs",
             "32", "--block-size", "32", "--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", "1024",
             "--kv-cache-memory-bytes", str(2**31)], PORTS["stock"]))
        trimtab = stack.enter_context(serving(
            [str(Path(sys.executable).with_name("trimtab")), "serve", model, "--engine", "vllm", "--name", "bench",
             "--port", str(PORTS["trimtab"]), "--dtype", "bfloat16", "--data-dir", str(folder / "data")],
            PORTS["trimtab"],
            TRIMTAB_MAX_REQUESTS="32", TRIMTAB_MAX_BATCH_TOKENS="2048", TRIMTAB_KV_CACHE_TOKENS="32768",
            TRIMTAB_SHADOW_SAMPLE=str(arguments.shadow)))
        upload(trimtab, arguments.hidden, arguments.layers)
        check(trimtab)
        arms = {"vllm serve": (stock, {}), "trimtab, unsteered": (trimtab, {}), "trimtab, steered": (trimtab, STEERING)}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for number in range(arguments.rounds + 1):
            for name in list(arms) if number % 2 else list(reversed(arms)):
                url, extra = arms[name]
                result = load(url, folder / "model", arguments.requests, arguments.concurrency, number, extra)
                if number:  # the first round warms up
                    found[name].append(result)
    return table(found, arguments)


def table(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    printed = Table("arm", *(f"{m} (median)" for m in METRICS), *(f"{m} ratio [lowest, highest]" for m in METRICS))
    results: dict[str, Any] = {"rounds": arguments.rounds, "concurrency": arguments.concurrency, "arms": {}}
    for name, rounds in found.items():
        row = {m: statistics.median(r[m] for r in rounds) for m in METRICS}
        ratios = {m: [r[m] / s[m] for r, s in zip(rounds, found["vllm serve"], strict=True)] for m in METRICS}
        results["arms"][name] = row | {f"{m}_ratio": [statistics.median(v), min(v), max(v)] for m, v in ratios.items()}
        printed.add_row(name, *(f"{row[m]:.1f}" for m in METRICS),
                        *(f"{statistics.median(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in ratios.values()))
    Console(width=150).print(printed)
    return results


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shadow", type=float, default=0.0, help="share of steered requests whose effect is measured")
    run(parser, main)
