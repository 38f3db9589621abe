"""Start and memory of `trimtab serve` beside plain loading: `python -m benchmarks.start MODEL`.

Each arm is a process of its own. CPU seconds are given beside wall seconds: on a shared machine only they mean much.
"""

import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any

import psutil
import typer

from server.cli.models import settings_with_model

POLL_S = 0.05
END_S = 900
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
import torch
disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
print("loaded", sum(p.numel() * p.element_size() for p in model.parameters()), flush=True)
sys.stdin.readline()
from steering.acting.selftest import run_selftest
from steering.models.describe import model_facts
facts = model_facts(model, model_id="m", fingerprint="")
print("begin", flush=True)
sys.stdin.readline()
run_selftest(model, facts)
print("tested", flush=True)
sys.stdin.readline()
"""


@dataclass
class Usage:
    """Of a process at a moment: seconds since its start, CPU seconds, resident bytes then and at most so far."""

    wall_s: float
    cpu_s: float
    rss: int
    peak: int

    def since(self, other: "Usage") -> tuple[float, float]:
        return self.wall_s - other.wall_s, self.cpu_s - other.cpu_s


class Watched:
    """A process whose lines are read and whose memory is sampled."""

    def __init__(self, *command: str) -> None:
        self._began = monotonic()
        self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, text=True)
        self._of = psutil.Process(self._process.pid)
        self._peak = 0
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def until(self, word: str) -> tuple[Usage, str]:
        """Reads lines until one begins with `word`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return self._now(), line
        raise RuntimeError(f"the process ended before it said {word!r}")

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self._done.set()
        self._process.terminate()
        self._process.wait(timeout=END_S)

    def _now(self) -> Usage:
        times, rss = self._of.cpu_times(), self._of.memory_info().rss
        self._peak = max(self._peak, rss)
        return Usage(monotonic() - self._began, times.user + times.system, rss, self._peak)

    def _sample(self) -> None:
        while not self._done.wait(POLL_S):
            try:
                self._peak = max(self._peak, self._of.memory_info().rss)
            except psutil.NoSuchProcess:
                return


def plain(folder: str, dtype: str) -> tuple[Usage, tuple[float, float], int]:
    """Loading alone, then the self-test's wall and CPU seconds, and the bytes of the weights."""
    process = Watched("-c", PLAIN, folder, dtype)
    loaded, line = process.until("loaded")
    process.go_on()
    begun, _ = process.until("begin")
    process.go_on()
    tested, _ = process.until("tested")
    process.end()
    return loaded, tested.since(begun), int(line.split()[1])


def serve(folder: str, dtype: str, data: str) -> Usage:
    process = Watched("-c", "from server.cli import app; app()", "serve", folder, "--dtype", dtype, "--port", "0",
                      "--data-dir", data)
    usage, _ = process.until("Ready.")
    process.end()
    return usage


def main(model: Annotated[str, typer.Argument(help="As `trimtab serve` takes it.")] = "smollm2", rounds: int = 3,
         dtype: str = "float32", kv_cache_tokens: int = 32768) -> None:
    """Medians of rounds in which the arms take turns."""
    folder = settings_with_model(model).model
    config: Any = __import__("transformers").AutoConfig.from_pretrained(folder)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 4 if dtype == "float32" else 2
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * width * kv_cache_tokens
    with tempfile.TemporaryDirectory() as data:
        # A warm start: the library is there, and the fingerprint is known.
        serve(folder, dtype, data)
        found = [(plain(folder, dtype), serve(folder, dtype, data)) for _ in range(rounds)]
    weights = found[0][0][2]
    rows = {
        "plain loading": [one.wall_s for (one, _, _), _ in found],
        "its CPU": [one.cpu_s for (one, _, _), _ in found],
        "the self-test": [test[0] for (_, test, _), _ in found],
        "self-test CPU": [test[1] for (_, test, _), _ in found],
        "until Ready": [one.wall_s for _, one in found],
        "until Ready CPU": [one.cpu_s for _, one in found]}
    for name, values in rows.items():
        print(f"{name:16} {median(values):7.1f} s   {' '.join(f'{value:.1f}' for value in values)}")
    for name, wall, test, ready in (("wall", "plain loading", "the self-test", "until Ready"),
                                    ("CPU", "its CPU", "self-test CPU", "until Ready CPU")):
        ratios = [(r - t) / p for p, t, r in zip(rows[wall], rows[test], rows[ready], strict=True)]
        print(f"start less self-test over plain loading, {name}: {median(ratios):.2f}")
    peak = median(one.peak for _, one in found)
    allowed = 1.5 * weights + cache + 600e6
    print(f"weights {weights / 1e6:.0f} MB, cache {cache / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, plain loading peak "
          f"{median(one.peak for (one, _, _), _ in found) / 1e6:.0f} MB, goal {allowed / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    typer.run(main)
