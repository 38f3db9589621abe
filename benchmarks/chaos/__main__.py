"""A real server in a process of its own, hurt in every way from outside, with innocent requests beside it.

    python -m benchmarks.chaos [--minutes 60] [--engine vllm] [--only floods --only terminate] [--json FILE]
                               [--mixed 700 --uploads 474 --kills 20 --mutations 600]

All scenarios run once in a random order; then again, in other orders, until the minutes are over. The oracle: every
innocent answer is the one it has alone; what was acknowledged is there; memory stays; readiness tells the truth within
two seconds; no request hangs; every refusal has a code, and no failure is the server's own. Ends with 1 if it does not
hold.
"""

import argparse
import asyncio
import json
import signal
import sys

from rich.console import Console

from benchmarks.chaos.chaos import Amounts
from benchmarks.chaos.run import run
from benchmarks.chaos.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--model", default="lab-dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="may be given more than once")
    for name in ("size", "mixed", "uploads", "kills", "mutations"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Amounts, name))
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    amounts = Amounts(options.size, options.mixed, options.uploads, options.kills, options.mutations)
    # Ended from outside, it ends its server too.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    result = asyncio.run(run(options.model, options.engine, options.seed, amounts, options.minutes, options.only))
    console = Console()
    console.print({key: value for key, value in result.items() if key != "faults"})
    console.print(f"{len(result['faults'])} faults")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
