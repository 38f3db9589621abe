"""What an op costs at many programs: tokens grouped by row against a copy of the row for every token.

    python -m benchmarks.kernels [--rounds 9] [--rank 1 4 64] [--tokens 1 32 512] [--programs 1 32 256] [--width 1024]

An affine op of some rank (ablation and subspace patching are the same kernel) on a batch whose tokens belong to some
number of programs. The arms take turns; CPU time of the process, as other work on the machine moves wall time, and
medians of the ratios of the same round. Every arm's result is checked against the others' first.

plain: two products with one matrix for all tokens. What is done anew for every program cannot be less than this.
own: two products for the tokens of every program, in a loop. Every program's matrices are read, and nothing else is.
before: a copy of its matrices for every token, or a stage for every program where four tokens share one.
now: the kernel as it is. stage: with sorting tokens, measuring and containing their steps, and putting them back; to
be compared with the stages of before.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from steering.acting.containment import UNLIMITED, contain
from steering.acting.steerer import _carried_out, measured_stage
from steering.language.scope import Scope
from steering.ops import Row
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step

GATHERED_BYTES = 64 * 2**20
Arm = Callable[[], torch.Tensor]


class Case:
    """A batch and its arms; each gives the steered activations, `[tokens, width]`, sorted by program."""

    def __init__(self, rank: int, tokens: int, programs: int, width: int) -> None:
        g = torch.Generator().manual_seed(rank)
        rows = [Row("affine", {"up": torch.randn(rank, width, generator=g) / width,
                               "down": torch.randn(rank, width, generator=g) / width**0.5,
                               "bias": torch.randn(rank, generator=g)}) for _ in range(programs)]
        bank, blank = Bank(programs, torch.device("cpu")), Applied(None, "affine", (), (), {}, {})
        held = [bank.acquire(Program((Compiled("affine", Scope(), {("resid_post", 0): row}, blank),))) for row in rows]
        self.of = np.sort(np.arange(tokens) % programs)
        slots = np.array(held, dtype=np.int32)[self.of]
        self.h = torch.randn(tokens, width, generator=g)
        (self.stage,) = plan_step(bank, slots, np.ones(tokens, dtype=np.uint32))["resid_post", 0]
        self.rows, self.programs = self.stage.rows, programs
        self.pool = self.stage.pool.tensors
        self.arms: dict[str, Arm] = {"plain": self.plain, "own": self.own, "before": self.before, "now": self.now,
                                     "stage before": self.stages_before, "stage": self.whole}

    def plain(self) -> torch.Tensor:
        return (self.h @ self.pool["down"][0].T) @ self.pool["up"][0]

    def own(self) -> torch.Tensor:
        inner = self.h.new_empty(len(self.h), self.pool["bias"].shape[1])
        out = torch.empty_like(self.h)
        assert self.stage.segments is not None
        for row, run in self.stage.segments.runs():
            torch.mm(self.h[run], self.pool["down"][row].T, out=inner[run])
            torch.mm(inner[run], self.pool["up"][row], out=out[run])
        return out

    def before(self) -> torch.Tensor:
        if self.programs == 1:
            return self._one(0, self.h)
        if len(self.h) >= 4 * self.programs:
            return torch.cat([self._one(row, self.h[self.rows == row]) for row in range(self.programs)])
        size = max(1, GATHERED_BYTES // (8 * self.pool["up"][0].numel()))
        return torch.cat([self._gathered(h, rows) for h, rows in
                          zip(self.h.split(size), self.rows.split(size), strict=True)])

    def stages_before(self) -> torch.Tensor:
        if self.programs == 1 or len(self.h) < 4 * self.programs:
            return contain(self.h, self.before())[0]
        out = self.h
        for row in range(self.programs):
            tokens = torch.from_numpy(np.flatnonzero(self.of == row))
            out = out.index_copy(0, tokens, contain(out[tokens], self._one(row, out[tokens]))[0])
        return out

    def now(self) -> torch.Tensor:
        return _carried_out(self.h, self.stage)

    def whole(self) -> torch.Tensor:
        return measured_stage(self.h, self.stage, UNLIMITED)[0]

    def _one(self, row: int, h: torch.Tensor) -> torch.Tensor:
        return h + (h @ self.pool["down"][row].T + self.pool["bias"][row]) @ self.pool["up"][row]

    def _gathered(self, h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("nrd,nd->nr", self.pool["down"][rows], h) + self.pool["bias"][rows]
        return h + torch.einsum("nr,nrd->nd", inner, self.pool["up"][rows])


def seconds(arm: Arm, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        arm()
    return (time.process_time() - start) / repeats


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of `plain`, and of the other arms the ratio to it in the same round."""
    whole = case.now()
    for name in ("before", "stage before", "stage"):
        torch.testing.assert_close(case.arms[name](), whole, rtol=1e-4, atol=1e-4)
    repeats = {name: max(1, int(0.004 / max(seconds(arm, 1), 1e-6))) for name, arm in case.arms.items()}
    taken = [{name: seconds(case.arms[name], repeats[name]) for name in order}
             for order in ([*case.arms], [*case.arms][::-1]) * rounds][:rounds]
    found = {name: statistics.median(one[name] / one["plain"] for one in taken) for name in case.arms}
    return found | {"plain": statistics.median(one["plain"] for one in taken),
                    "stages": statistics.median(one["stage"] / one["stage before"] for one in taken)}


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print("| width | rank | tokens | programs | plain, us | own | before | now | stage, of before |")
    print("|---|---|---|---|---|---|---|---|---|")
    for width in arguments.width:
        for rank in arguments.rank:
            for tokens in arguments.tokens:
                for programs in arguments.programs:
                    if programs > tokens:
                        continue
                    found = measured(Case(rank, tokens, programs, width), arguments.rounds)
                    numbers = " | ".join(f"{found[name]:.2f}" for name in ("own", "before", "now", "stages"))
                    print(f"| {width} | {rank} | {tokens} | {programs} | {found['plain'] * 1e6:.0f} | {numbers} |",
                          flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    for name, default in (("rank", (1, 4, 64)), ("tokens", (1, 32, 512)), ("programs", (1, 32, 256)),
                          ("width", (576, 1024))):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    with torch.inference_mode():
        main(parser.parse_args())
