"""What an op costs at many programs: tokens grouped by row against a copy of the row for every token.

    python -m benchmarks.kernels [--rounds 9] [--rank 1 4 64] [--tokens 1 32 512] [--programs 1 32 256] [--width 1024]

First an affine op of some rank (ablation and subspace patching are the same kernel) on a batch whose tokens belong to
some number of programs, then every op. The arms take turns; CPU time of the process, as other work on the machine moves
wall time, and medians of the ratios of the same round. What the arms give is compared first.

plain: two products with one matrix for all tokens, which an op of one program cannot be cheaper than.
own: two products for the tokens of every program, in a loop. Every program's matrices are read, and nothing else is.
before: a copy of its row for every token, or a call for every program where four tokens share a matrix.
now: the kernel as it is. stage: the whole place, with sorting tokens, measuring and containing their steps and putting
them back; "stage before" is what that was, where every program had a stage of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from steering.acting.containment import UNLIMITED, contain
from steering.acting.steerer import _carried_out, measured_stage
from steering.language.scope import Scope
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import Place, Row, get_kernel, get_operation
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from steering.residency.plan import plan_step

COPIED_BYTES = 64 * 2**20
Arm = Callable[[], torch.Tensor]
Draw = Callable[..., torch.Tensor]
Make = Callable[[Draw], dict[str, torch.Tensor]]


class Case:
    """A batch whose tokens are dealt to the programs of `rows`, sorted, and its arms; each gives `[tokens, width]`."""

    def __init__(self, rows: list[Row], tokens: int, width: int) -> None:
        programs = len(rows)
        bank, blank = Bank(programs, torch.device("cpu")), Applied(None, "affine", (), (), {}, {})
        held = bank.hold([Program((Compiled("affine", Scope(), {("resid_post", 0): row}, blank),)) for row in rows])
        of = np.sort(np.arange(tokens) % programs)
        self.h = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
        (self.stage,) = plan_step(bank, np.array(held, dtype=np.int32)[of],
                                  np.ones(tokens, dtype=np.uint32))["resid_post", 0]
        self.kernel, self.pool = get_kernel(self.stage.pool.kernel), self.stage.pool.tensors
        self.runs = [np.flatnonzero(of == row) for row in range(programs)]
        self.apart = self.stage.pool.has_matrices and tokens >= 4 * programs
        self.arms: dict[str, Arm] = {"before": self.before, "now": self.now, "stage before": self.stage_before,
                                     "stage": self.whole}
        if self.stage.pool.kernel == "affine":
            self.arms |= {"plain": self.plain, "own": self.own}

    def plain(self) -> torch.Tensor:
        return (self.h @ self.pool["down"][0].T) @ self.pool["up"][0]

    def own(self) -> torch.Tensor:
        inner = self.h.new_empty(len(self.h), self.pool["bias"].shape[1])
        out = torch.empty_like(self.h)
        for row, run in enumerate(self.runs):
            part = slice(run[0], run[-1] + 1)
            torch.mm(self.h[part], self.pool["down"][row].T, out=inner[part])
            torch.mm(inner[part], self.pool["up"][row], out=out[part])
        return out

    def before(self) -> torch.Tensor:
        if self.apart or len(self.runs) == 1:
            return torch.cat([self._one(row, self.h[run[0]:run[-1] + 1]) for row, run in enumerate(self.runs)])
        size = max(1, COPIED_BYTES // sum(tensor[0].nbytes for tensor in self.pool.values()))
        return torch.cat([self.kernel(h, {name: tensor[rows] for name, tensor in self.pool.items()})
                          for h, rows in zip(self.h.split(size), self.stage.rows.split(size), strict=True)])

    def stage_before(self) -> torch.Tensor:
        if not self.apart or len(self.runs) == 1:
            return contain(self.h, self.before())[0]
        out = self.h
        for row, run in enumerate(self.runs):
            tokens = torch.from_numpy(run)
            out = out.index_copy(0, tokens, contain(out[tokens], self._one(row, out[tokens]))[0])
        return out

    def now(self) -> torch.Tensor:
        return _carried_out(self.h, self.stage)

    def whole(self) -> torch.Tensor:
        return measured_stage(self.h, self.stage, UNLIMITED)[0]

    def _one(self, row: int, h: torch.Tensor) -> torch.Tensor:
        return self.kernel(h, {name: tensor[row:row + 1] for name, tensor in self.pool.items()})


def affine_rows(rank: int, programs: int, width: int) -> list[Row]:
    g = torch.Generator().manual_seed(rank)
    return [Row("affine", {"up": torch.randn(rank, width, generator=g) / width,
                           "down": torch.randn(rank, width, generator=g) / width**0.5,
                           "bias": torch.randn(rank, generator=g)}) for _ in range(programs)]


def ops(rank: int, width: int) -> list[tuple[str, Op, Site, Mapping[str, Any], Make]]:
    """Name, op, site, options, and the numbers of one program from a source of normal ones."""
    def basis(draw: Draw, rows: int = rank) -> torch.Tensor:
        return torch.linalg.qr(draw(width, rows))[0].T.contiguous()

    def signs(draw: Draw) -> dict[str, torch.Tensor]:
        return {"dims": torch.arange(width // 2), "polarity": torch.where(draw(width // 2) > 0, 1, -1)}

    def curve(draw: Draw) -> dict[str, torch.Tensor]:
        return {"basis": basis(draw), "mean": draw(width), "knots": torch.arange(8.0).unsqueeze(1),
                "points": draw(8, rank), "period": torch.zeros(1)}

    return [
        ("add", "add", "resid_post", {}, lambda draw: {"vector": draw(width)}),
        ("add, norm kept", "add", "resid_post", {"preserve_norm": True}, lambda draw: {"vector": draw(width)}),
        ("ablate a vector", "ablate", "resid_post", {}, lambda draw: {"vector": draw(width)}),
        ("ablate a subspace", "ablate", "resid_post", {}, lambda draw: {"basis": basis(draw)}),
        ("affine, diagonal", "affine", "resid_post", {}, lambda draw: {"scale": draw(width), "shift": draw(width)}),
        ("clamp", "clamp", "resid_post", {"min": 0.1}, lambda draw: {"vector": draw(width)}),
        ("rotate", "rotate", "resid_post", {"angle": 30}, lambda draw: {"basis": basis(draw, 2)}),
        ("sign_flip", "sign_flip", "resid_post", {}, signs),
        ("sign_flip, the largest", "sign_flip", "resid_post", {"fraction": 0.3}, signs),
        ("mask", "mask", "resid_post", {}, lambda draw: {"dims": torch.arange(64)}),
        ("head_mask", "head_mask", "head_out", {}, lambda draw: {"heads": torch.arange(2)}),
        ("patch a vector", "patch", "resid_post", {}, lambda draw: {"vector": draw(width)}),
        ("patch a subspace", "patch", "resid_post", {}, lambda draw: {"basis": basis(draw), "mean": draw(width)}),
        ("manifold, to a point", "manifold", "resid_post", {"target": 3}, curve),
        ("manifold, along it", "manifold", "resid_post", {"target": 3, "fraction": 0.5}, curve),
    ]


def seconds(arm: Arm, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        arm()
    return (time.process_time() - start) / repeats


def measured(case: Case, rounds: int) -> list[dict[str, float]]:
    """Seconds of every arm, by round."""
    whole = case.now()
    for name in ("before", "stage before", "stage"):
        torch.testing.assert_close(case.arms[name](), whole, rtol=1e-3, atol=1e-3)
    repeats = {name: max(1, int(0.004 / max(seconds(arm, 1), 1e-6))) for name, arm in case.arms.items()}
    names = list(case.arms)
    return [{name: seconds(case.arms[name], repeats[name]) for name in (names, names[::-1])[n % 2]}
            for n in range(rounds)]


def ratio(taken: list[dict[str, float]], arm: str, to: str) -> str:
    return f"{statistics.median(one[arm] / one[to] for one in taken):.2f}"


def micros(taken: list[dict[str, float]], arm: str) -> str:
    return f"{statistics.median(one[arm] for one in taken) * 1e6:.0f}"


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print("| width | rank | tokens | programs | plain, us | own | before | now | stage, of before |")
    print("|---|---|---|---|---|---|---|---|---|")
    shapes = [(tokens, programs) for tokens in arguments.tokens for programs in arguments.programs
              if programs <= tokens]
    for width in arguments.width:
        for rank in arguments.rank:
            for tokens, programs in shapes:
                taken = measured(Case(affine_rows(rank, programs, width), tokens, width), arguments.rounds)
                found = [micros(taken, "plain"), *(ratio(taken, arm, "plain") for arm in ("own", "before", "now")),
                         ratio(taken, "stage", "stage before")]
                print(f"| {width} | {rank} | {tokens} | {programs} | {' | '.join(found)} |", flush=True)
    width, rank = arguments.width[-1], arguments.rank[-1]
    facts = ModelFacts("m", "f", "llama", num_layers=1, d_model=width, num_heads=width // 64, head_dim=64,
                       d_ff=4 * width, vocab_size=50, context_length=64)
    print("\n| op | tokens | programs | before, us | now, us | now, of before | stage, of before |")
    print("|---|---|---|---|---|---|---|")
    for name, op, site, options, make in ops(rank, width):
        for tokens, programs in [(tokens, min(tokens, 32)) for tokens in arguments.tokens]:
            g = torch.Generator().manual_seed(1)
            rows = [get_operation(op).row(make(lambda *shape, g=g: torch.randn(*shape, generator=g)),
                                          get_operation(op).options.model_validate(options), Place(facts, site, 0, 1.0))
                    for _ in range(programs)]
            taken = measured(Case(rows, tokens, facts.width(site)), arguments.rounds)
            found = [micros(taken, "before"), micros(taken, "now"), ratio(taken, "now", "before"),
                     ratio(taken, "stage", "stage before")]
            print(f"| {name} | {tokens} | {programs} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    for name, default in (("rank", (1, 4, 64)), ("tokens", (1, 32, 512)), ("programs", (1, 32, 256)),
                          ("width", (576, 1024))):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    with torch.inference_mode():
        main(parser.parse_args())
