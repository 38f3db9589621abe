"""The tensor code of a stage that stands in the compiled graph: pure, without a branch on values."""

import torch
from torch import Tensor

from server.engines.vllm.worker.fuse import CLAMP, NORM_MATCH, NORM_PRESERVE, NUM_FIXED_SCALARS, ROTATE
from steering.acting.containment import UNLIMITED, StepLimit, contain


def steered(x: Tensor, pool: Tensor, index: Tensor, scalars: Tensor, depth: int, rank: int, elementwise: bool,
            dtype: torch.dtype = torch.float32, limit: StepLimit = UNLIMITED) -> tuple[Tensor, Tensor]:
    """All stages on `x [T, width]` (float32); index `[T, rows]`, scalars `[T, ...]` of each token. Pure tensor code.

    Each stage is contained as `contain` says, in what `dtype` can hold.

    Returns:
        The activations, and the relative step of each token in each stage, `[T, depth]`.
    """
    per_stage = index.shape[1] // depth
    width = NUM_FIXED_SCALARS + rank
    taken = []
    for d in range(depth):
        rows = index[:, d * per_stage:(d + 1) * per_stage]
        y = _stage(x, pool, rows, scalars[:, d * width:(d + 1) * width], rank, elementwise)
        x, step = contain(x, held_by(y, dtype), limit)
        taken.append(step)
    return x, torch.stack(taken, dim=-1)


def poisoned(x: Tensor, taken: Tensor, limit: StepLimit) -> Tensor:
    """`x [T, width]` with NaN in the rows of tokens one of whose steps `taken [T, stages]` was not carried out.

    In a pipeline only the last rank is heard by the scheduler, and that is how it comes to know. Nobody else's rows are
    touched, and the request ends with this step.
    """
    refused = taken == torch.inf
    if limit.action == "refuse" and limit != UNLIMITED:
        refused = refused | (taken > limit.largest)
    return torch.where(refused.any(-1, keepdim=True), torch.nan, x)


def held_by(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` (float32) with infinity in the place of what `dtype` cannot hold."""
    return y if dtype == torch.float32 else torch.where(y.abs() <= torch.finfo(dtype).max, y, torch.inf)


def _stage(h: Tensor, pool: Tensor, rows: Tensor, numbers: Tensor, rank: int, elementwise: bool) -> Tensor:
    def row(n: int) -> Tensor:
        return pool[rows[:, n]].float()

    if elementwise:
        return h + h * row(0) + row(1)
    norm = numbers[:, 0:1]
    length = h.norm(dim=-1, keepdim=True)
    x = h + h * row(0) + row(1) * torch.where(norm == NORM_MATCH, length, 1.0)
    moved = x.norm(dim=-1, keepdim=True)
    x = torch.where((norm == NORM_PRESERVE) & (moved > 0), x * (length / moved.clamp_min(1e-30)), x)

    shape = numbers[:, 1:2]
    a, b, c, e = (numbers[:, i:i + 1] for i in range(2, 6))
    read = [(x * row(3 + r)).sum(-1, keepdim=True) for r in range(rank)]
    write = [value + numbers[:, NUM_FIXED_SCALARS + r:NUM_FIXED_SCALARS + r + 1] for r, value in enumerate(read)]
    write[0] = torch.where(shape == CLAMP, c * (torch.minimum(torch.maximum(read[0], a), b) - read[0]), write[0])
    if rank > 1:
        # a, b, c, e: cos, sin, absolute, adaptive.
        first, second = read[0], read[1]
        radius = torch.sqrt(first * first + second * second)
        to_first = torch.where(c > 0, radius * a, first * a - second * b)
        to_second = torch.where(c > 0, radius * b, first * b + second * a)
        turned = (shape == ROTATE) & ~((e > 0) & (first <= 0))
        write[0] = torch.where(turned, to_first - first, torch.where(shape == ROTATE, 0.0, write[0]))
        write[1] = torch.where(turned, to_second - second, torch.where(shape == ROTATE, 0.0, write[1]))
    for r in range(rank):
        x = x + write[r] * row(3 + rank + r)

    mode, amount = numbers[:, 6:7], numbers[:, 7:8]
    polarity = row(2)
    agreement = torch.sign(x) * polarity
    wanted = torch.where(mode == 0, agreement > 0, torch.where(mode == 1, agreement < 0, polarity != 0))
    return torch.where(wanted & (polarity != 0) & (mode >= 0), x * (1 - 2 * amount), x)
