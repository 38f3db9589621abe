"""What live chats lose while jobs run, and how soon a job is gone that is cancelled: `python -m benchmarks.guests`.

A server on SmolLM2 in a process of its own. In each round every kind of job is begun, the same chats are asked beside
it and again when it was cancelled, so that both arms have met the same load of a shared machine; the figures are ratios
of neighbours. In later rounds the chats begin only when the job has done a part of its work, because its first steps
are not like its last ones. A round counts only where the job still ran when its last chat was answered.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from trimtab_client import Client
from trimtab_client.models import Job

from benchmarks.command import options_of, run
from benchmarks.hour.pairs import NEUTRAL_PROMPTS, TONE_PROMPTS, asked, tone
from lab.real.serving import serving

NAME = "guests-tone"
CHATS = ("What is a lake?", "Tell me about bread.", "How do I clean a shoe?", "Why is the sky blue?")
TOKENS = 16
# Share of a job's work after which chats begin, in rounds that take turns.
BEGIN_AT = (0.0, 0.25, 0.5)
POLL_S = 0.2
WAIT_S = 600.0


def kinds(client: Client) -> dict[str, Callable[[], Job]]:
    """How a job of each kind is begun."""
    spec = {"interventions": [{"artifact": NAME}]}
    return {
        "extract": lambda: client.start_extraction(tone(), name=f"{NAME}-again", trial={"effort": "normal"}),
        "calibrate": lambda: client.start_calibration(NAME, asked(NEUTRAL_PROMPTS + TONE_PROMPTS[:8]),
                                                      seed=time.time_ns() % 2**32),
        "evaluate": lambda: client.start_evaluation(asked(TONE_PROMPTS), [{"kind": "sentiment"}], spec=spec, draws=20),
        "tune": lambda: client.start_tuning(NAME, pairs=tone(), trial={"effort": "normal"}),
    }


def chats(client: Client) -> list[float]:
    """Seconds of each chat."""
    found = []
    for prompt in CHATS:
        began = time.perf_counter()
        client.chat(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        found.append(time.perf_counter() - began)
    return found


def until(client: Client, job: Job, wanted: Callable[[Job], bool]) -> Job:
    """The job when it is as wanted, or over."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        found = client.get_job(job.id)
        if wanted(found) or found.finished:
            return found
        time.sleep(POLL_S)
    raise TimeoutError(f"{job.kind} stays {job.status}")


def one_round(client: Client, begin: Callable[[], Job], share: float) -> dict[str, Any] | None:
    """None where the job was over too soon."""
    job = until(client, begin(), lambda found: found.status == "running" and found.progress >= share)
    beside = chats(client)
    last = client.get_job(job.id)
    if last.finished:
        if last.status == "failed":
            raise RuntimeError(f"{job.kind} failed: {last.error}")
        return None
    began = time.perf_counter()
    client.cancel_job(job.id)
    until(client, job, lambda found: False)
    cancelled = time.perf_counter() - began
    alone = chats(client)
    return {"stage": last.stage, "beside": beside, "alone": alone, "cancel_s": cancelled,
            "ratio": median(beside) / median(alone)}


def main(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, \
            serving(Path(folder), options.model, *options.serve) as (_, url), Client(url, timeout=WAIT_S) as client:
        client.extract(tone()[:12], name=NAME, trial={"effort": "none"}, layers=[14])
        chats(client)
        for number in range(options.rounds):
            for kind, begin in kinds(client).items():
                if kind in options.kinds:
                    got = one_round(client, begin, BEGIN_AT[number % len(BEGIN_AT)])
                    found.setdefault(kind, []).extend([] if got is None else [got])
                    print(kind, got, flush=True)
    table = Table("job", "rounds", "chat beside, of alone", "lowest to highest", "alone, s", "cancelled, s at most")
    for kind, rounds in found.items():
        ratios = [one["ratio"] for one in rounds] or [float("nan")]
        table.add_row(kind, str(len(rounds)), f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
                      f"{median([t for one in rounds for t in one['alone']] or [0.0]):.2f}",
                      f"{max([one['cancel_s'] for one in rounds] or [0.0]):.2f}")
    Console().print(table)
    return found


if __name__ == "__main__":
    parser = options_of(__doc__)
    parser.add_argument("--model", default="smollm2", help="As `trimtab serve` takes it.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", default=["extract", "calibrate", "evaluate", "tune"])
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="Further options of `trimtab serve`.")
    run(parser, main)
