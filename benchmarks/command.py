"""The command line that the benchmarks share: how one is started, and its results as JSON where they are wanted."""

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import torch


def cpu_seconds() -> float:
    """CPU time of this process and of those it started, among which vLLM runs the model."""
    me = psutil.Process()
    return sum(times.user + times.system for times in (p.cpu_times() for p in (me, *me.children(recursive=True))))


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser for the options of one benchmark. description: the docstring of its module."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], Any]) -> None:
    """Run `main`, a function or a coroutine function, on the options given, and write what it returns to --json."""
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    outcome = main(options)
    if isinstance(outcome, Coroutine):
        outcome = asyncio.run(outcome)
    if options.json:
        options.json.write_text(json.dumps(outcome, indent=1))
