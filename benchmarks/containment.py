"""What it costs to keep values that are not finite with their request, and to measure relative steps.

    python -m benchmarks.containment [--rounds 9] [--hidden 512] [--layers 8] [--tokens 24] [--concurrent 16]

Four arms take turns on one engine: nothing steered and every request steered at every layer, each with the containment
as it is and with it taken out. CPU time of the process, as other work on the machine moves wall time; medians of the
ratios of the same round.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from benchmarks.embedded import Trimtab, make_model, program
from server.engines.transformers.finite import Watch
from server.engines.transformers.steps import Steps
from steering.acting import steerer
from steering.acting.containment import StepLimit
from steering.acting.record import Record
from steering.residency.plan import Stage

FINITE = torch.tensor(0.0)


def _unmeasured(h: torch.Tensor, stage: Stage, limit: StepLimit) -> tuple[torch.Tensor, torch.Tensor]:
    before = h if stage.tokens is None else h[stage.tokens]
    after = steerer._carried_out(before.float(), stage).to(h.dtype)
    return (after if stage.tokens is None else h.index_copy(0, stage.tokens, after)), FINITE


@contextmanager
def without_containment() -> Iterator[None]:
    with patch.object(steerer, "measured_stage", _unmeasured), patch.object(Watch, "total", lambda self: FINITE), \
            patch.object(Steps, "_settle", lambda self, record: None), \
            patch.object(Record, "note", lambda self, stage, step: None):
        yield


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, arguments.hidden, arguments.layers)
        trimtab = Trimtab(folder, "cpu")
        await trimtab.engine.start()
        programs = [program(trimtab.engine, seed) for seed in range(arguments.concurrent)]

        async def seconds(steered: bool) -> float:
            start = time.process_time()
            await trimtab.run(arguments.concurrent, arguments.tokens, programs if steered else None)
            return time.process_time() - start

        ratios: dict[bool, list[float]] = {False: [], True: []}
        for number in range(arguments.rounds + 1):
            for steered in (False, True):
                found = {}
                for contained in ((True, False) if number % 2 else (False, True)):
                    if contained:
                        found[contained] = await seconds(steered)
                    else:
                        with without_containment():
                            found[contained] = await seconds(steered)
                if number:  # the first round warms up
                    ratios[steered].append(found[True] / found[False])
        await trimtab.engine.stop()
    for steered, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{arguments.concurrent} concurrent, {'all layers steered' if steered else 'nothing steered'}: CPU time "
              f"{middle:.3f} of that without containment (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 9), ("hidden", 512), ("layers", 8), ("tokens", 24), ("concurrent", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    torch.set_num_threads(1)
    asyncio.run(main(parser.parse_args()))
